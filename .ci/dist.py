"""Build the source distribution and the wheel into dist/, and try them as those would who get them.

    make dist

Checked: both are whole (every file of the repository; every file of the package), twine's strict check, a README
without relative links, the wheel in an environment that holds torch and the other declared dependencies and nothing
else, what importing takes, the README's loop, the command without its extra and with it; the source distribution:
installed, and some of its own tests inside it.

Nothing is downloaded: dependencies are links to what this environment has.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAME = PROJECT["name"]
#: Tests of the source distribution that are run here: its pages, its sources, one test of the engine, all quick.
TRIED = ("tests/test_sources.py", "tests/test_distribution.py", "tests/decide/test_policy.py")
IMPORT_LIMIT = 0.5  # seconds of `import apoptosis` beyond Python's own start, which loads no torch
IMPORT = """
import json, sys, time
start = time.perf_counter()
import apoptosis
bare, early = time.perf_counter() - start, "torch" in sys.modules
import torch
start = time.perf_counter()
from apoptosis import Apoptosis, load, save, shrink_
print(json.dumps({"bare": bare, "early": early, "beyond": time.perf_counter() - start, "at": apoptosis.__file__}))
"""


def say(text: str) -> None:
    print(text, flush=True)


def run(*command: str | Path, cwd: Path = ROOT, status: int = 0) -> str:
    """Run a command without this checkout on the path; return what it wrote, raise SystemExit on another status."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=kept, capture_output=True, text=True)
    if done.returncode != status:
        raise SystemExit(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def check(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"make dist: {what}")


def build(out: Path) -> tuple[Path, Path]:
    """Build the source distribution, and the wheel from that; return both."""
    shutil.rmtree(out, ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    (source,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    run(sys.executable, "-m", "twine", "check", "--strict", source, wheel)
    return source, wheel


def tracked() -> set[str]:
    """Files of the repository; nothing where this is no checkout."""
    if not (ROOT / ".git").exists():
        return set()
    return set(run("git", "ls-files", "-z").split("\0")) - {""}


def check_contents(source: Path, wheel: Path) -> None:
    """Nothing is lost on the way."""
    with tarfile.open(source) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    files = tracked()
    check(files <= packed, f"the source distribution lacks {sorted(files - packed)[:5]}; see MANIFEST.in")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        metadata = archive.read(next(n for n in packed if n.endswith(".dist-info/METADATA"))).decode()
    files = {name.removeprefix("src/") for name in files if name.startswith("src/")}
    check(files <= packed, f"the wheel lacks {sorted(files - packed)[:5]}; see package-data in pyproject.toml")
    extra = {name for name in packed if not name.startswith(("apoptosis/", NAME.replace("-", "_")))}
    check(not extra, f"the wheel holds {sorted(extra)[:5]}")
    text = re.sub(r"^```.*?^```", "", metadata, flags=re.DOTALL | re.MULTILINE)
    relative = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not target.startswith(("http", "#"))]
    check(not relative, f"the description has relative links: {relative[:5]}; see setup.py")


def needed(requirements: Iterable[str]) -> dict[str, Distribution]:
    """Return the installed distributions that requirements ask for, with all that these ask for in turn."""
    found: dict[str, Distribution] = {}
    waiting = [(Requirement(text), "") for text in requirements]
    done: set[tuple[str, str]] = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for part in ("", *sorted(requirement.extras)):
            if (requirement.name.lower(), part) in done:
                continue
            done.add((requirement.name.lower(), part))
            try:
                one = distribution(requirement.name)
            except PackageNotFoundError:
                raise SystemExit(f"{requirement.name} is not installed; make setup installs it") from None
            found[requirement.name.lower()] = one
            waiting += [(Requirement(text), part) for text in one.requires or ()]
    return found


def link(environment: Path, distributions: Iterable[Distribution]) -> None:
    """Put installed distributions into an environment, by links."""
    target = next((environment / "lib").glob("python*/site-packages"))
    for one in distributions:
        home = Path(str(one.locate_file("")))
        for top in {file.parts[0] for file in one.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if (home / top).exists() and not (target / top).exists():
                (target / top).symlink_to(home / top)


def new_environment(folder: Path, requirements: Sequence[str]) -> Path:
    """Make an environment of what the requirements ask for alone; return its bin."""
    venv.create(folder, symlinks=True)
    link(folder, needed(requirements).values())
    return folder / "bin"


def pip(bin_: Path, *command: str | Path) -> None:
    """Run this environment's pip for another one, without a package index."""
    run(sys.executable, "-m", "pip", "--python", bin_ / "python", *command, cwd=bin_.parent)


def try_wheel(wheel: Path, work: Path) -> None:
    """Install the wheel beside its dependencies alone, import it, run the command."""
    bin_ = new_environment(work / "env", PROJECT["dependencies"])
    pip(bin_, "install", "--no-index", wheel)
    pip(bin_, "check")
    told = json.loads(run(bin_ / "python", "-c", IMPORT, cwd=work))
    check(str(work) in told["at"], f"apoptosis was imported from {told['at']}")
    check(not told["early"], "import apoptosis loads torch")
    check(told["bare"] < IMPORT_LIMIT, f"import apoptosis takes {told['bare']:.2f} s")
    say(f"import apoptosis: {1000 * told['bare']:.0f} ms; all public names: {told['beyond']:.2f} s beyond torch's own")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    loop = readme.partition("```python\n")[2].partition("```")[0]
    say(f"the README's loop: {run(bin_ / 'python', '-c', loop, cwd=work).strip().splitlines()[-1].strip()}")
    text = run(bin_ / "python", "-m", "apoptosis", "inspect", cwd=work, status=2)
    check("torch-apoptosis[cli]" in text, f"the command without its extra says: {text}")
    link(work / "env", needed(PROJECT["optional-dependencies"]["cli"]).values())
    check(f"apoptosis {PROJECT['version']} " in run(bin_ / "apoptosis", "--version", cwd=work), "--version is another")


def try_source(source: Path, work: Path) -> None:
    """Install from the source distribution, and run some of its tests inside it."""
    parts = [*PROJECT["dependencies"], "setuptools", *PROJECT["optional-dependencies"]["dev"]]
    parts += PROJECT["optional-dependencies"]["cli"]
    bin_ = new_environment(work / "env-source", parts)
    pip(bin_, "install", "--no-index", "--no-build-isolation", source)
    with tarfile.open(source) as archive:
        archive.extractall(work, filter="data")
    (unpacked,) = work.glob("torch_apoptosis-*")
    told = run(bin_ / "python", "-m", "pytest", "-p", "no:cacheprovider", *TRIED, cwd=unpacked)
    say(f"inside the source distribution: {told.strip().splitlines()[-1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the distributions go")
    given = parser.parse_args()
    source, wheel = build(given.out)
    check_contents(source, wheel)
    for path in (source, wheel):
        say(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
    with tempfile.TemporaryDirectory() as folder:
        try_wheel(wheel, Path(folder).resolve())
        try_source(source, Path(folder).resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
