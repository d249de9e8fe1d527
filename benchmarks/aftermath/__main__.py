"""Learn from experiments what a removal costs in the long run.

    python -m benchmarks.aftermath --data-dir DIR               all tasks that can run here; an hour or two on one core
    python -m benchmarks.aftermath --data-dir DIR --long        some trials more, to the end of the run
    python -m benchmarks.aftermath --quick                      a tiny network on bundled digits, for CI; writes nowhere
    python -m benchmarks.aftermath --fit                        what the trials say together, and nothing else

Resumable: a trial that is in the JSON is not made again. MiniLM and EfficientNet need the packages of the extra
`pretrained`; without them these tasks are left out, and a line says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from apoptosis.errors import ApoptosisError
from apoptosis.tools.recipes.folder import write_json
from benchmarks import shared
from benchmarks.aftermath import pretrained, tables, tasks
from benchmarks.aftermath.trials import Bank

RESULT = shared.RESULTS / "aftermath.json"
TASKS = {"mlp": tasks.mlp, "gpt": tasks.gpt, "cnn": tasks.cnn, "resnet": tasks.resnet, "minilm": pretrained.minilm,
         "efficientnet": pretrained.efficientnet}  # fmt: skip
DIGITS = 5  # significant, of what is written


def rounded(value: Any) -> Any:
    """Return a record with floats of a few digits, so that hundreds of trials stay a small file."""
    match value:
        case float():
            return float(f"{value:.{DIGITS}g}")
        case dict():
            return {key: rounded(item) for key, item in value.items()}
        case list() | tuple():
            return [rounded(item) for item in value]
    return value


def main(arguments: list[str] | None = None) -> int:
    """Run what the arguments ask for; data that is missing gets one line."""
    parser = shared.parser(__doc__)
    parser.add_argument("--data-dir", type=Path, help="where the publishers' files lie")
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"comma-separated: {', '.join(TASKS)}")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON to go on with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--long", action="store_true", help="trials that go on to the end of the run")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fit", action="store_true", help="only say what the trials of the JSON say together")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if unknown := [name for name in given.tasks.split(",") if name not in TASKS]:
        parser.error(f"unknown tasks {', '.join(unknown)}; there are {', '.join(TASKS)}")
    try:
        return quick() if given.quick else fit(given.out) if given.fit else run(given)
    except (ApoptosisError, OSError) as error:
        print(f"benchmarks.aftermath: error: {error}", file=sys.stderr)
        return 1


def quick() -> int:
    """All kinds of trials on a tiny network; a line for each."""
    found: list[dict[str, Any]] = []
    Bank(tasks.digits(None), 0, set(), found.append).trials()
    for record in found:
        later = record.get("later")
        print(record["key"], record.get("skipped", record.get("at_once", {}).get("kl")), later and later[-1][2])
    return 0 if found else 1


def fit(path: Path) -> int:
    """All tables of the page from one JSON."""
    results = {"aftermath": json.loads(path.read_text(encoding="utf-8"))}
    for name, make in tables.TABLES.items():
        print(f"{name}\n\n{make(results)}\n")
    return 0


def run(given: argparse.Namespace) -> int:
    """Make the trials that the JSON lacks; it is written after each."""
    known = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {"trials": []}
    record = shared.result("aftermath", seed=given.seed, trials=known["trials"])

    def write(trial: dict[str, Any]) -> None:
        record["trials"].append(rounded(trial))
        write_json(given.out, record)

    for name in given.tasks.split(","):
        try:
            task = TASKS[name](given.data_dir)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        Bank(task, given.seed, {trial["key"] for trial in record["trials"]}, write).trials(long=given.long)
    return 0


if __name__ == "__main__":
    sys.exit(main())
