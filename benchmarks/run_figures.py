"""Run the rows of docs/results.md through `apoptosis compare` and write benchmarks/results/*.json.

    python benchmarks/run_figures.py --data-dir DIR            all rows, 3 seeds (cifar10: 1); hours on two cores
    python benchmarks/run_figures.py --only mnist,higgs        some of them
    python benchmarks/run_figures.py --validate                tune: 1 seed, results beside the run, not committed

Lives here: which runs make the figures. Does not live here: training (the command), tables (table.py).
Settings are tuned on the validation split; `compare` reads the test split once, at the end of each run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

COMMON: dict[str, object] = {"optimizer": "adam", "batch": 128, "schedule": "one-cycle"}
ROWS: dict[str, dict[str, object]] = {  # fields of apoptosis.recipes.config.RunConfig
    "mnist": {"data": "mnist", "network": "mlp", "widths": (1024, 1024, 1024), "epochs": 10},
    "fashion-mnist": {"data": "fashion-mnist", "network": "mlp", "widths": (1024, 1024, 1024), "epochs": 10},
    "higgs": {"data": "higgs", "network": "mlp", "widths": (300, 300, 300, 300, 300), "epochs": 12},
    "cifar10": {
        "data": "cifar10",
        "network": "cnn",
        "widths": (64, 128, 256, 256),
        "epochs": 5,
        "criterion": "reconstruction",
        "tolerance": 0.055,
    },
}
SEEDS = {name: "0" if name == "cifar10" else "0,1,2" for name in ROWS}


def command(name: str, seeds: str, json_file: Path, out: Path, data_dir: str | None) -> list[str]:
    """The command line of one row."""
    fields = {**COMMON, **ROWS[name], **({"data_dir": data_dir} if data_dir else {})}
    call = [sys.executable, "-c", "import sys; from apoptosis.cli import main; sys.exit(main())", "compare"]
    for field, value in fields.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        call += [f"--{field.replace('_', '-')}", text]
    return [*call, "--seeds", seeds, "--json", str(json_file), "--out", str(out), "--quiet"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"rows, comma-separated: {', '.join(ROWS)}", default=",".join(ROWS))
    parser.add_argument("--data-dir", help="where the publishers' files lie")
    parser.add_argument("--seeds", help="seeds instead of the row's own, 0,1,2")
    parser.add_argument("--runs", help="folder for the run folders", default="runs/figures", type=Path)
    parser.add_argument("--validate", help="seed 100 only; JSON goes into --runs", action="store_true")
    given = parser.parse_args()
    names = given.only.split(",")
    if unknown := [n for n in names if n not in ROWS]:
        parser.error(f"unknown rows {unknown}; there are {', '.join(ROWS)}")
    given.runs.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    failed = []
    for name in names:
        seeds = "100" if given.validate else given.seeds or SEEDS[name]
        json_file = (given.runs if given.validate else RESULTS) / f"{name}.json"
        out = _free(given.runs / name)
        print(f"{name}: seeds {seeds}, run folder {out}", flush=True)
        done = subprocess.run(command(name, seeds, json_file, out, given.data_dir), check=False)
        if done.returncode:
            failed.append(name)
            continue
        record = json.loads(json_file.read_text(encoding="utf-8"))
        record["config"]["data_dir"] = None  # where the files lay says nothing about the figures
        json_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        overall = record["overall"]
        print(f"{name}: {overall['speedup_run']:.2f}x, wrote {json_file}", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    elif not given.validate:
        print("now: python benchmarks/table.py --write")
    return 1 if failed else 0


def _free(path: Path) -> Path:
    """The path, or the first of path-2, path-3 ... that is not taken: no run is written over."""
    tries = (path.with_name(f"{path.name}-{i}") for i in range(2, 10_000))
    return path if not path.exists() else next(p for p in tries if not p.exists())


if __name__ == "__main__":
    sys.exit(main())
