"""One cell of the table: all contestants of one ground and seed, trained epoch by epoch in turn, in one process.

Holds: who trains when, and the cell's JSON. Elsewhere: methods, tables.
Interleaving keeps it fair: whatever else the machine does meets all alike. Two rounds: what needs no result first; then
what needs the widths that apoptosis found or the trained dense network, so that its seconds are of a later time than
dense's (processor time is told beside).
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
from benchmarks.paper.contestants import (
    CRITERIA,
    EarlyStopping,
    FineTuning,
    Lasso,
    Pruning,
    Shrinking,
    small,
)
from benchmarks.paper.grounds import Ground, Task
from benchmarks.paper.measure import energy_joules, latencies, training_memory
from benchmarks.paper.training import Contestant

SCHEMA = 3
Say = Callable[[str], None]


def run_cell(ground: Ground, task: Task, seed: int, say: Say, *, criteria: bool = True) -> dict[str, Any]:
    """Train all contestants of a ground with one seed.

    Args:
        criteria: also apoptosis with each other criterion (core grounds, first seed).

    Returns: the cell as plain values.
    """
    energy = energy_joules()
    dense = Contestant("dense", ground, task, seed)
    shrunk = Shrinking("apoptosis", ground, task, seed)
    others: list[Contestant] = [Pruning("torch-pruning", ground, task, seed, shrunk.macs)]
    if ground.core:
        others.append(Contestant("half width", ground, task, seed, scale=0.5))
        others.append(Lasso("group lasso", ground, task, seed, shrunk.macs))
        if criteria and seed == 0:
            others += [Shrinking(f"apoptosis, {c}", ground, task, seed, criterion=c) for c in CRITERIA]
    early = EarlyStopping(dense)
    train([dense, shrunk, *others], say, after=lambda: early.look())
    same = small("same widths", shrunk)
    late: list[Contestant] = [same]
    if ground.core:
        late.append(FineTuning("train-prune-fine-tune", dense, shrunk.macs()))
    train(late, say)
    if ground.core:  # for as long as apoptosis took, at the pace of these very widths
        longer = small("same widths, longer", shrunk, epochs=ground.epochs * shrunk.seconds / same.seconds)
        train([longer], say)
        late.append(longer)
    everyone = [dense, shrunk, *others, *late]
    records = {c.name: c.record() for c in everyone}
    if ground.core:
        records["early stopping"] = early.record()
    _measure(records, everyone, task)
    spent = energy_joules()
    joules = None if energy is None or spent is None else spent - energy
    return header("paper-cell", ground, task, seed) | {"joules": joules, "contestants": records}


def _measure(records: dict[str, dict[str, Any]], everyone: Sequence[Contestant], task: Task) -> None:
    """Add latencies of all networks, and the memory of a training step of the first two."""
    inputs = task.test.between(0, min(256, len(task.test)))[0]
    for name, found in latencies({c.name: c.model for c in everyone}, inputs).items():
        records[name]["latency"] = found
    batch = task.train.between(0, everyone[0].batch)[0]
    for contestant in everyone[:2]:
        records[contestant.name]["memory"] = training_memory(contestant.model, batch)


def header(kind: str, ground: Ground, task: Task, seed: int) -> dict[str, Any]:
    """Return what was run, with what, on what."""
    return {
        "kind": kind,
        "schema": SCHEMA,
        "ground": ground.name,
        "seed": seed,
        "metric": ground.metric,
        "unit": ground.unit,
        "core": ground.core,
        "epochs": ground.epochs,
        "batch": ground.batch,
        "lr": ground.lr,
        "train_rows": len(task.train),
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


def train(contestants: Sequence[Contestant], say: Say, after: Callable[[], None] | None = None) -> None:
    """Train epoch by epoch in turn; dense and apoptosis lead alternately, rivals that follow apoptosis come after."""
    number = 0
    while any(not c.finished for c in contestants):
        order = list(contestants)
        if number % 2:
            order[:2] = order[1::-1]
        for contestant in order:
            if not contestant.finished:
                contestant.run_epoch()
                point = contestant.points[-1]
                say(
                    f"  epoch {contestant.epoch:2d} {contestant.name:24s} validation {point.validation:.4f}  "
                    f"{point.seconds:7.1f} s  {point.parameters:10,d} parameters  {point.macs:12,d} multiply-adds"
                )
        if after is not None:
            after()
        number += 1


def cell_path(folder: Path, ground: str, seed: int) -> Path:
    """Return where a cell's JSON lies."""
    return folder / f"{ground}-{seed}.json"


def fits(cell: Mapping[str, Any], ground: Ground, train_rows: int | None = None) -> bool:
    """Whether a cell was run as the ground asks now; train_rows: None if whatever there was is fine."""
    asked = (SCHEMA, ground.name, ground.epochs, ground.batch, ground.lr, get_criterion("interpolative").tolerance)
    same = tuple(cell.get(key) for key in ("schema", "ground", "epochs", "batch", "lr", "tolerance")) == asked
    same = same and cell["machine"]["threads"] == torch.get_num_threads()
    return same and (train_rows is None or cell.get("train_rows") == train_rows)


def write_cell(path: Path, cell: dict[str, Any]) -> None:
    """Write whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(cell, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)
