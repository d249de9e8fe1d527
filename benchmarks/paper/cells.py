"""One cell of the table: all methods of one task and seed, trained epoch by epoch in turn, in one process.

Holds: the order of training, and the cell's JSON. Elsewhere: methods, tables.
Interleaving keeps it fair: whatever else the machine does meets all alike. Two rounds: what needs no result first; then
what needs the widths that apoptosis found or the trained dense network, so that its seconds are of a later time than
dense's (processor time is reported, too).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import apoptosis
from apoptosis.criteria import get_criterion
from apoptosis.tools.recipes.machine import machine, versions
from benchmarks.paper.measure import energy_joules, latencies, training_memory
from benchmarks.paper.methods import (
    CRITERIA,
    EarlyStopping,
    FineTuning,
    Lasso,
    Pruning,
    Shrinking,
    small,
)
from benchmarks.paper.tasks import Task, TaskData
from benchmarks.paper.training import MethodRun

SCHEMA = 3
Say = Callable[[str], None]


def run_cell(task: Task, data: TaskData, seed: int, say: Say, *, criteria: bool = True) -> dict[str, Any]:
    """Train all methods of a task with one seed.

    Args:
        criteria: also apoptosis with each other criterion (core tasks, first seed).

    Returns: the cell as plain values.
    """
    energy = energy_joules()
    dense = MethodRun("dense", task, data, seed)
    shrunk = Shrinking("apoptosis", task, data, seed)
    others: list[MethodRun] = [Pruning("torch-pruning", task, data, seed, shrunk.macs)]
    if task.core:
        others.append(MethodRun("half width", task, data, seed, scale=0.5))
        others.append(Lasso("group lasso", task, data, seed, shrunk.macs))
        if criteria and seed == 0:
            others += [Shrinking(f"apoptosis, {c}", task, data, seed, criterion=c) for c in CRITERIA]
    early = EarlyStopping(dense)
    train([dense, shrunk, *others], say, after=lambda: early.look())
    same = small("same widths", shrunk)
    late: list[MethodRun] = [same]
    if task.core:
        late.append(FineTuning("train-prune-fine-tune", dense, shrunk.macs()))
    train(late, say)
    if task.core:  # for as long as apoptosis took, at the pace of these very widths
        longer = small("same widths, longer", shrunk, epochs=task.epochs * shrunk.seconds / same.seconds)
        train([longer], say)
        late.append(longer)
    everyone = [dense, shrunk, *others, *late]
    records = {c.name: c.record() for c in everyone}
    if task.core:
        records["early stopping"] = early.record()
    _measure(records, everyone, data)
    after = energy_joules()
    joules = None if energy is None or after is None else after - energy
    return header("paper-cell", task, data, seed) | {"joules": joules, "methods": records}


def _measure(records: dict[str, dict[str, Any]], everyone: Sequence[MethodRun], data: TaskData) -> None:
    """Add latencies of all networks, and the memory of a training step of the first two."""
    inputs = data.test.between(0, min(256, len(data.test)))[0]
    for name, found in latencies({c.name: c.model for c in everyone}, inputs).items():
        records[name]["latency"] = found
    batch = data.train.between(0, everyone[0].batch)[0]
    for method in everyone[:2]:
        records[method.name]["memory"] = training_memory(method.model, batch)


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
        "tolerance": get_criterion("interpolative").tolerance,
        "source": source(),
        "versions": versions() | {"torch-pruning": version("torch-pruning")},
        "machine": machine(torch.device("cpu")),
    }


def source() -> str:
    """Return a short digest of the library's code."""
    found = hashlib.sha256()
    for path in sorted(Path(apoptosis.__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def train(methods: Sequence[MethodRun], say: Say, after: Callable[[], None] | None = None) -> None:
    """Train epoch by epoch in turn; dense and apoptosis lead alternately, baselines that follow it come after."""
    number = 0
    while any(not c.finished for c in methods):
        order = list(methods)
        if number % 2:
            order[:2] = order[1::-1]
        for method in order:
            if not method.finished:
                method.run_epoch()
                point = method.points[-1]
                say(
                    f"  epoch {method.epoch:2d} {method.name:24s} validation {point.validation:.4f}  "
                    f"{point.seconds:7.1f} s  {point.parameters:10,d} parameters  {point.macs:12,d} multiply-adds"
                )
        if after is not None:
            after()
        number += 1


def cell_path(folder: Path, task: str, seed: int) -> Path:
    """Return where a cell's JSON lies."""
    return folder / f"{task}-{seed}.json"


def fits(cell: Mapping[str, Any], task: Task, train_rows: int | None = None) -> bool:
    """Whether a cell was run as the task asks now; train_rows: None if whatever there was is fine."""
    asked = (SCHEMA, task.name, task.epochs, task.batch, task.lr, get_criterion("interpolative").tolerance)
    same = tuple(cell.get(key) for key in ("schema", "task", "epochs", "batch", "lr", "tolerance")) == asked
    same = same and cell["machine"]["threads"] == torch.get_num_threads()
    return same and (train_rows is None or cell.get("train_rows") == train_rows)


def write_cell(path: Path, cell: dict[str, Any]) -> None:
    """Write whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(cell, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)
