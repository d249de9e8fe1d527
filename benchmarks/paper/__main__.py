"""All tasks of the paper, all methods, one command.

    python -m benchmarks.paper --data-dir DIR                 every cell that is not there yet; hours on two cores
    python -m benchmarks.paper --only mnist,higgs --seeds 0   some of them
    python -m benchmarks.paper --quick                        a small network on bundled digits, for CI: under 5 minutes
    python -m benchmarks.paper --frontier --data-dir DIR      the same networks at many tolerances, one seed
    python -m benchmarks.paper --event-time --data-dir DIR    where the time of events goes, by profile
    python -m benchmarks.paper --table                        only read what is there: table, targets, pictures

    python -m benchmarks.paper --data-dir DIR --only minilm-sst2 --methods "apoptosis;4 of 6 layers" --results OTHER
    python -m benchmarks.paper --data-dir DIR --only vgg11-cifar10 --rows 12000 --epochs 10     said in JSON and tables

Resumable per cell (task and seed): a cell whose JSON exists is not run again, and one that was stopped goes on from
what lies in the folder `unfinished` beside the JSON (the four core tasks excepted, which start again). Tasks whose
packages are missing (extra `pretrained`) are left out with a line that says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from apoptosis.errors import ApoptosisError
from benchmarks.paper import kinds
from benchmarks.paper.cells import cell_path, fits, run_cell, write_cell
from benchmarks.paper.event_time import EVENT_TIME, read_event_time, run_event_time
from benchmarks.paper.frontier import TASKS as FRONTIERS
from benchmarks.paper.frontier import frontier_path, run_frontier
from benchmarks.paper.pictures import draw_all
from benchmarks.paper.pretrained import MissingPackage
from benchmarks.paper.summary import read_cells, read_frontiers
from benchmarks.paper.tables import aims, methods
from benchmarks.paper.tasks import QUICK, QUICK_TASKS, TASKS, Task

RESULTS = Path(__file__).resolve().parents[1] / "results" / "paper"


def main(arguments: list[str] | None = None) -> int:
    """Run what the arguments ask for; data that is missing or damaged, and losses that are not finite, get one line."""
    try:
        return _main(arguments)
    except (ApoptosisError, OSError, FloatingPointError) as error:
        print(f"benchmarks.paper: error: {error}", file=sys.stderr)
        return 1


def _main(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="where the publishers' files lie")
    every = ", ".join(TASKS)
    parser.add_argument("--only", help=f"tasks, comma-separated: {every}; with --quick: {', '.join(QUICK_TASKS)}")
    parser.add_argument("--methods", help="some of a task's, separated by semicolons, with dense and what they need")
    parser.add_argument("--seeds", help="comma-separated; default: each task's own number of them, from 0")
    parser.add_argument("--results", type=Path, help="folder of the cells' JSON (--quick: a new one)")
    parser.add_argument("--no-criteria", action="store_true", help="leave the other criteria out")
    parser.add_argument("--rows", type=int, help="training rows instead of all: a trial, give --results")
    parser.add_argument("--epochs", type=int, help="instead of the task's: a trial, give --results")
    parser.add_argument("--pictures", type=Path, help="folder to draw the pictures into")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--event-time", action="store_true", help="profile the events of one run (mnist) instead")
    parser.add_argument("--frontier", action="store_true", help="many tolerances instead of the table's defaults")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="of every process (default 1)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    there = QUICK_TASKS if given.quick else TASKS
    given.only = (QUICK.name if given.quick else ",".join(TASKS)) if given.only is None else given.only
    given.methods = None if given.methods is None else [name.strip() for name in given.methods.split(";")]
    if unknown := [name for name in given.only.split(",") if name not in there]:
        parser.error(f"unknown tasks {', '.join(unknown)}; there are {', '.join(there)}")
    if given.results is None:
        given.results = Path(tempfile.mkdtemp(prefix="paper-")) if given.quick else RESULTS
    fixed = [name for name in given.only.split(",") if not there[name].kind]
    if given.results == RESULTS and (given.rows or given.epochs) and not given.table and fixed:
        parser.error(f"--rows and --epochs make trials of {', '.join(fixed)}: give --results, another folder")
    given.results.mkdir(parents=True, exist_ok=True)
    if given.frontier:
        _run_frontiers(given)
    elif given.event_time:
        data = TASKS["mnist"].load(given.data_dir, given.rows)
        write_cell(
            given.results / EVENT_TIME, run_event_time(TASKS["mnist"], data, lambda line: print(line, flush=True))
        )
    elif not given.table:
        _run(given)
    cells = read_cells(given.results, only=given.only.split(","))
    if not cells:
        print("no cells yet", file=sys.stderr)
        return 1
    frontiers = read_frontiers(given.results)
    if any(not there[cell["task"]].turn for cell in cells):
        print(methods(cells, frontiers), aims(cells, frontiers), sep="\n\n")
    if any(there[cell["task"]].kind for cell in cells):
        print(kinds.by_kind(cells, frontiers), kinds.aims(cells, frontiers), sep="\n\n")
    if given.pictures is not None:
        for path in draw_all(cells, frontiers, read_event_time(given.results / EVENT_TIME), given.pictures):
            print(f"wrote {path}")
    return 0


def _run(given: argparse.Namespace) -> None:
    for name in given.only.split(","):
        task = QUICK_TASKS[name] if given.quick else TASKS[name]
        task = task if given.epochs is None else replace(task, epochs=given.epochs)
        try:
            _run_task(task, given)
        except MissingPackage as missing:
            print(f"{name} is left out: {missing}", file=sys.stderr)


def _run_task(task: Task, given: argparse.Namespace) -> None:
    data = None
    for seed in range(task.seeds) if given.seeds is None else [int(seed) for seed in given.seeds.split(",")]:
        path = cell_path(given.results, task.name, seed)
        if not given.quick and path.exists() and fits(json.loads(path.read_text()), task, given.rows, given.methods):
            continue
        data = task.load(given.data_dir, given.rows) if data is None else data
        print(f"{task.name}, seed {seed}", flush=True)
        options = {"criteria": not given.no_criteria, "names": given.methods, "path": path}
        write_cell(path, run_cell(task, data, seed, lambda line: print(line, flush=True), **options))


def _run_frontiers(given: argparse.Namespace) -> None:
    for name in (n for n in given.only.split(",") if n in FRONTIERS):
        path = frontier_path(given.results, name)
        if path.exists() and fits(json.loads(path.read_text()), TASKS[name], given.rows):
            continue
        print(f"{name}, frontier", flush=True)
        data = TASKS[name].load(given.data_dir, given.rows)
        write_cell(path, run_frontier(TASKS[name], data, 0, lambda line: print(line, flush=True)))


if __name__ == "__main__":
    sys.exit(main())
