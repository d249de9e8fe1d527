"""What is distributed: the README as an index shows it, the versions that are installed, the module that is run."""

import importlib.metadata
import importlib.util
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- the README


def targets(text):
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.fixture(scope="module")
def setup_script():
    pytest.importorskip("setuptools", reason="setup.py needs it")
    return load(ROOT / "setup.py")


@pytest.mark.parametrize(
    ("address", "inside"),
    [("https://github.com/a/b", ""), ("https://gitlab.com/a/b.git", "/-"), ("https://gitlab.com/a/b/", "/-")],
)
def test_with_an_address_every_link_leads_to_a_file_there(setup_script, address, inside):
    text = setup_script.standalone(README, address)
    base = address.removesuffix("/").removesuffix(".git") + inside
    relative = [target for target in targets(README) if not target.startswith("http")]
    there = [target.split("/HEAD/", 1) for target in targets(text) if target.startswith(base)]
    assert len(relative) == len(there) > 20
    for start, path in there:
        assert (ROOT / path.partition("#")[0]).exists()
        assert start == f"{base}/{'raw' if path.endswith('.svg') else 'blob'}"
    assert all(target.startswith("https://") for target in targets(text))
    assert f"({base}/raw/HEAD/docs/images/paper-time.svg)" in text


def test_without_an_address_there_is_no_link_and_no_picture_that_would_be_broken(setup_script):
    text = setup_script.standalone(README, None)
    assert all(target.startswith("https://") for target in targets(text))
    assert "docs/guide.md: the loop" in text
    assert "![" not in text
    assert text.endswith(setup_script.NO_ADDRESS)


def test_code_stays_as_it_is(setup_script):
    code = "```python\nx[a](b)\n```\n"
    assert setup_script.standalone(code + "[a](b)", "https://example.org/a") == (
        code + "[a](https://example.org/a/blob/HEAD/b)"
    )


def test_the_address_is_that_of_the_metadata(setup_script):
    assert setup_script.repository() == PROJECT["urls"].get("Repository")


# ---------------------------------------------------------------- versions


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    names = [line.split("==")[0] for line in lines if not line.startswith("#")]
    assert [normal(name) for name in names] == sorted({normal(name) for name in names})
    return {normal(line.split("==")[0]): line.split("==")[1] for line in lines if not line.startswith("#")}


def extras_of_make():
    (extras,) = re.findall(r'-e "\.\[([\w,]+)\]"', (ROOT / "Makefile").read_text(encoding="utf-8"))
    return extras.split(",")


def test_constraints_hold_every_package_that_make_sets_up():
    requirements = pytest.importorskip("packaging.requirements")
    versions = pinned()
    parts = [(text, "") for extra in extras_of_make() for text in PROJECT["optional-dependencies"][extra]]
    waiting, seen = [*parts, *((text, "") for text in PROJECT["dependencies"])], set()
    while waiting:
        text, extra = waiting.pop()
        one = requirements.Requirement(text)
        if (text, extra) in seen or (one.marker and not one.marker.evaluate({"extra": extra})):
            continue
        seen.add((text, extra))
        name = normal(one.name)
        if name.startswith(("nvidia-", "cuda-")) or name == "triton":  # a CUDA wheel of torch pins these itself
            continue
        assert name in versions, f"constraints.txt lacks {name}, which is needed as {text}"
        assert one.specifier.contains(versions[name], prereleases=True), f"{text}, but {versions[name]} is pinned"
        try:
            needs = importlib.metadata.requires(one.name) or ()
        except importlib.metadata.PackageNotFoundError:
            continue  # not in this environment: what it needs is not known
        waiting += [(needed, part) for needed in needs for part in ("", *one.extras)]


# ---------------------------------------------------------------- the module


def test_python_m_runs_the_command(monkeypatch, capsys):
    pytest.importorskip("typer")
    monkeypatch.setattr(sys, "argv", ["apoptosis", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("apoptosis", run_name="__main__")
    assert ended.value.code == 0
    assert "inspect" in capsys.readouterr().out
