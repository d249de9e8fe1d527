"""One cell of the table: all methods of one task and seed, trained turn by turn, in one process.

Holds: the order of training, the cell's JSON, and how a cell that was stopped goes on. Elsewhere: methods, tables.
Interleaving keeps it fair: whatever else the machine does meets all alike. Two rounds: what needs no result first; then
what needs the widths that apoptosis found or the trained dense network, so that its seconds are of a later time than
dense's (processor time is reported, too).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import apoptosis
from apoptosis.criteria import get_criterion
from apoptosis.errors import ApoptosisError
from apoptosis.tools.recipes.machine import machine, versions
from benchmarks.paper.measure import energy_joules, latencies, training_memory
from benchmarks.paper.method_table import Method, chosen, methods_of
from benchmarks.paper.methods import EarlyStopping
from benchmarks.paper.tasks import BY_NAME, Task, TaskData
from benchmarks.paper.training import MethodRun

SCHEMA = 3
SNAPSHOT_SECONDS = 240.0  # seconds after which the runs of a cell are saved again
# What a baseline may end in; the others go on then.
BREAKS = (ApoptosisError, RuntimeError, ValueError, ArithmeticError, TypeError, LookupError, AttributeError, NameError)
Say = Callable[[str], None]


class Snapshots:
    """Where the runs of an unfinished cell lie, so that one that was stopped goes on: a file per method.

    Args: folder: of this cell; it is removed when the cell is done.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.last = folder, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Return where a method's run lies."""
        return self.folder / f"{name.replace(', ', '-').replace(' ', '-')}.pt"

    def restore(self, run: MethodRun) -> bool:
        """Go on with a run that lies here; whether there was one."""
        if not self.path(run.name).exists():
            return False
        run.restore(self.path(run.name))
        return True

    def save(self, runs: Sequence[MethodRun]) -> None:
        """Save runs."""
        for run in runs:
            run.save(self.path(run.name))

    def is_time(self) -> bool:
        """Whether those that train should be saved again."""
        if time.monotonic() - self.last < SNAPSHOT_SECONDS:
            return False
        self.last = time.monotonic()
        return True

    def clear(self) -> None:
        """Remove what lies here."""
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()


class Cell:
    """The runs of one task and seed, and their records.

    Args:
        head: what was run. methods: by name, in order. snapshots: where unfinished runs lie; None: a stop loses all.
        begun: the JSON of the same cell that was stopped, {} for none. write: takes the cell's JSON whenever a method
            is finished.
    """

    def __init__(
        self,
        head: Mapping[str, Any],
        methods: Mapping[str, Method],
        say: Say,
        snapshots: Snapshots | None = None,
        begun: Mapping[str, Any] | None = None,
        write: Callable[[dict[str, Any]], None] = lambda cell: None,
    ) -> None:
        begun = begun or {}
        self.head, self.methods, self.say, self.snapshots, self.write = head, methods, say, snapshots, write
        self.records: dict[str, dict[str, Any]] = dict(begun.get("methods", {}))
        self.failed: dict[str, str] = dict(begun.get("failed", {}))
        self.resumed = int(begun.get("resumed", 0))
        self.runs: dict[str, MethodRun] = {}

    def json(self, *, complete: bool) -> dict[str, Any]:
        """Return the cell as plain values, methods in the table's order."""
        names = [*self.methods, *(name for name in self.records if name not in self.methods)]
        extra = {"complete": complete, "resumed": self.resumed, "failed": self.failed}
        return {**self.head, **extra, "methods": {n: self.records[n] for n in names if n in self.records}}

    def run(self, *, early: bool) -> None:
        """Train all; early: also what the dense run would have been, stopped early."""
        waiting = [name for name in self.methods if name not in self.failed]
        while waiting:
            ready = [name for name in waiting if all(other in self.runs for other in self.methods[name].after)]
            if not ready:
                self.failed |= {name: f"needs {', '.join(self.methods[name].after)}" for name in waiting}
                return
            runs = [run for name in ready if (run := self._made(name)) is not None]
            stop = EarlyStopping(runs[0]) if early and runs and runs[0].name == "dense" else None
            self._train(runs, stop)
            waiting = [name for name in waiting if name not in ready]

    def _made(self, name: str) -> MethodRun | None:
        """Make a method's run, or go on from its snapshot."""
        if missing := [other for other in self.methods[name].beside if other not in self.runs]:
            self.failed[name] = f"needs {', '.join(missing)}"
            return None
        try:
            run = self.methods[name].make(self.runs)
        except BREAKS as error:
            self._leave_out(name, error)
            return None
        if self.snapshots is not None and self.snapshots.restore(run):
            self.say(f"  {name}: goes on after {run.step} of {run.total_steps} steps")
        self.runs[name] = run
        return run

    def _leave_out(self, name: str, error: Exception) -> None:
        """Leave a method out from now on, with what it said; without dense and apoptosis there is nothing to tell.

        Raises: error itself, of these two.
        """
        if name in ("dense", "apoptosis"):
            raise error
        self.runs.pop(name, None)
        self.failed[name] = f"{type(error).__name__}: {error}"
        self.say(f"  {name} failed: {self.failed[name]}")

    def _train(self, runs: Sequence[MethodRun], stop: EarlyStopping | None) -> None:
        self._finish(runs)
        for _ in turns(runs, self.say, failed=lambda run, error: self._leave_out(run.name, error)):
            if stop is not None:
                stop.look()
            self._finish(runs)
            if self.snapshots is not None and self.snapshots.is_time():
                self.snapshots.save([run for run in runs if run.name in self.runs and not run.finished])
        if stop is not None:
            self.records["early stopping"] = stop.record()

    def _finish(self, runs: Sequence[MethodRun]) -> None:
        """Record the runs that are done and not recorded."""
        done = [run for run in runs if run.finished and run.name in self.runs and run.name not in self.records]
        if self.snapshots is not None:
            self.snapshots.save(done)
        self.records |= {run.name: run.record() for run in done}
        if done:
            self.write(self.json(complete=False))


def run_cell(
    task: Task,
    data: TaskData,
    seed: int,
    say: Say,
    *,
    criteria: bool = True,
    names: Sequence[str] | None = None,
    path: Path | None = None,
) -> dict[str, Any]:
    """Train all methods of a task with one seed.

    Args:
        criteria: also apoptosis with each other criterion (core tasks, first seed).
        names: of the methods, and what they need; None for all.
        path: of the cell's JSON, written as methods are finished; a cell that was stopped goes on. None: neither.

    Returns: the cell as plain values.
    """
    energy = energy_joules()
    head = header("paper-cell", task, data, seed)
    methods = chosen(methods_of(task, data, seed, criteria=criteria), names)
    snapshots, begun = (None, None) if path is None or task.core else _resumed(path, head, list(methods))
    cell = Cell(
        head, methods, say, snapshots, begun, (lambda found: None) if path is None else partial(write_cell, path)
    )
    cell.run(early=task.core)
    _measure(cell.records, list(cell.runs.values()), data)
    after = energy_joules()
    joules = None if energy is None or after is None else after - energy
    if snapshots is not None:
        snapshots.clear()
    return cell.json(complete=True) | {"joules": joules}


def _resumed(path: Path, head: Mapping[str, Any], names: Sequence[str]) -> tuple[Snapshots, dict[str, Any] | None]:
    """Return where the snapshots of a cell lie, and the JSON of the same cell, of the same code and methods, that
    was stopped; None where there is none. What lies there of another one is removed.
    """
    folder = path.parent / "unfinished" / path.stem
    mark, asked = folder / "cell.json", json.loads(json.dumps({**head, "names": names}))
    lies = json.loads(mark.read_text(encoding="utf-8")) if mark.exists() else {}
    if lies.get("asked") == asked:
        write_cell(mark, {"asked": asked, "resumed": lies["resumed"] + 1})
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        begun = found if found.get("complete") is False else {}
        return Snapshots(folder), begun | {"resumed": lies["resumed"] + 1}
    Snapshots(folder).clear()
    snapshots = Snapshots(folder)
    write_cell(mark, {"asked": asked, "resumed": 0})
    return snapshots, None


def _measure(records: dict[str, dict[str, Any]], runs: Sequence[MethodRun], data: TaskData) -> None:
    """Add latencies of all networks, and the memory of a training step of the first two."""
    task = runs[0].task
    inputs = data.test.between(0, min(max(task.latency), len(data.test)))[0]
    for name, found in latencies({run.name: run.model for run in runs}, inputs, task.latency).items():
        records[name]["latency"] = found
    if not task.kind:
        batch = data.train.between(0, runs[0].batch)[0]
        for run in runs[:2]:
            records[run.name]["memory"] = training_memory(run.model, batch)


def header(kind: str, task: Task, data: TaskData, seed: int) -> dict[str, Any]:
    """Return what was run, with what, on what."""
    return {
        "kind": kind,
        "schema": SCHEMA,
        "task": task.name,
        "seed": seed,
        "metric": task.metric,
        "unit": task.unit,
        "core": task.core,
        "epochs": task.epochs,
        "batch": task.batch,
        "lr": task.lr,
        "train_rows": len(data.train),
        "recipe": task.recipe.name,
        "probe": task.probe,
        "full": _full(task, len(data.train)),
        "tolerance": get_criterion("interpolative").tolerance,
        "source": source(),
        "versions": versions() | {"torch-pruning": version("torch-pruning")},
        "machine": machine(torch.device("cpu")),
    }


def _full(task: Task, rows: int) -> dict[str, int]:
    """Return how many epochs and training rows the task has, where fewer were run."""
    whole = BY_NAME.get(task.name, task)
    epochs = {"epochs": whole.epochs} if task.epochs != whole.epochs else {}
    return epochs | ({"train_rows": whole.rows} if whole.rows and rows != whole.rows else {})


def source() -> str:
    """Return a short digest of the library's code."""
    found = hashlib.sha256()
    for path in sorted(Path(apoptosis.__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def train(methods: Sequence[MethodRun], say: Say) -> None:
    """Train to the end, turn by turn."""
    for _ in turns(methods, say):
        pass


def turns(
    methods: Sequence[MethodRun], say: Say, failed: Callable[[MethodRun, Exception], None] | None = None
) -> Iterator[None]:
    """Train turn by turn; dense and apoptosis lead alternately, baselines that follow it come after.

    Args: failed: takes a run that failed and its error, and the others go on; None: the error is raised.
    """
    number, left = 0, [run for run in methods if not run.finished]
    while left:
        order = list(left)
        if number % 2:
            order[:2] = order[1::-1]
        for run in order:
            epoch = run.epoch
            try:
                run.run_turn()
            except BREAKS as error:
                if failed is None:
                    raise
                failed(run, error)
                left.remove(run)
                continue
            if run.epoch > epoch:
                point = run.points[-1]
                say(
                    f"  epoch {run.epoch:2d} {run.name:24s} validation {point.validation:.4f}  "
                    f"{point.seconds:7.1f} s  {point.parameters:10,d} parameters  {point.macs:12,d} multiply-adds"
                )
        yield
        number += 1
        left = [run for run in left if not run.finished]


def cell_path(folder: Path, task: str, seed: int) -> Path:
    """Return where a cell's JSON lies."""
    return folder / f"{task}-{seed}.json"


def fits(
    cell: Mapping[str, Any], task: Task, train_rows: int | None = None, names: Sequence[str] | None = None
) -> bool:
    """Whether a cell was run as the task asks now, to its end.

    train_rows: None if whatever there was is fine. names: of methods that it must have; None likewise.
    """
    asked = (SCHEMA, task.name, task.epochs, task.batch, task.lr, get_criterion("interpolative").tolerance)
    same = tuple(cell.get(key) for key in ("schema", "task", "epochs", "batch", "lr", "tolerance")) == asked
    same = same and cell["machine"]["threads"] == torch.get_num_threads() and cell.get("complete", True)
    same = same and {*(names or ())} <= {*cell.get("methods", ()), *cell.get("failed", ())}
    return same and (train_rows is None or cell.get("train_rows") == train_rows)


def write_cell(path: Path, cell: dict[str, Any]) -> None:
    """Write whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(cell, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)
