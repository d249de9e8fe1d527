"""Tables of what people train: by kind of network every task and method, and what was aimed at there.

Holds: columns, limits and the comparison at equal multiply-adds. Elsewhere: means and intervals (summary).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.paper.method_table import TARGETS
from benchmarks.paper.summary import Cell, Row, pooled, summarise, table
from benchmarks.paper.tasks import BY_NAME, TASKS

EMPTY = "No results are committed yet; `python -m benchmarks.paper --data-dir DIR --only {tasks}` makes them."
NEAR = 1.1  # multiply-adds that are equal, for two methods
REACHED = 0.05  # of a target that a run may be off


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is aimed at for a kind: the whole run at least so much faster, the mean difference and its lower end."""

    speed: float
    mean: float
    lower: float


LIMITS: Mapping[str, Limits] = {
    "pretrained transformer": Limits(speed=1.7, mean=-0.5, lower=-1.0),
    "pretrained convolutional": Limits(speed=1.6, mean=-0.5, lower=-1.0),
    "convolutional from scratch": Limits(speed=1.6, mean=-0.3, lower=-0.8),
    "transformer from scratch": Limits(speed=0.995, mean=-0.2, lower=-math.inf),
}
NATS = 0.005  # the mean difference of a language model


def by_kind(cells: Sequence[Cell], frontiers: Sequence[Cell]) -> str:
    """Every method of every task of a kind, kind after kind."""
    rows = rows_by_kind(cells)
    head = ("kind of network", "data", "method", "seeds", "whole run", "processor time", "test metric",
            "difference (95 %)", "parameters", "multiply-adds", "of the whole run", "own share", "latency")  # fmt: skip
    lines = [_line(kind, row) for kind, found in rows.items() for row in found]
    lines += [
        (task.kind, name_of(cell), method, "1", "failed:", text.replace("\n", " ")[:160], *[""] * 7)
        for cell in cells
        for method, text in cell.get("failed", {}).items()
        if (task := BY_NAME[cell["task"]]).kind
    ]
    tasks = ",".join(task.name for task in TASKS.values() if task.turn)
    return table(head, lines) if lines else EMPTY.format(tasks=tasks)


def gains(cells: Sequence[Cell], frontiers: Sequence[Cell]) -> str:
    """Who gains how much: the methods of every kind that need no other one, dense left out."""
    head = ("kind of network", "data", "method", "seeds", "whole run", "multiply-adds", "difference (95 %)")
    lines = [
        (kind, row.task, row.method, str(row.seeds), f"{row.cpu_speedup:.2f}x", f"{row.macs:.2f}x fewer",
         row.difference_text)
        for kind, rows in rows_by_kind(cells).items()
        for row in rows
        if row.method != "dense" and not row.method.startswith(("same widths", "torch-pruning"))
    ]  # fmt: skip
    return table(head, lines) if lines else EMPTY.format(tasks=",".join(t.name for t in TASKS.values() if t.turn))


def rows_by_kind(cells: Sequence[Cell]) -> dict[str, list[Row]]:
    """Return the rows of all tasks that are of a kind, in the order of the tasks."""
    named = {name_of(cell): BY_NAME[cell["task"]].kind for cell in cells if BY_NAME[cell["task"]].kind}
    rows = summarise([{**cell, "task": name_of(cell)} for cell in cells if name_of(cell) in named])
    kinds = dict.fromkeys(task.kind for task in BY_NAME.values() if task.kind)
    return {kind: found for kind in kinds if (found := [row for row in rows if named[row.task] == kind])}


def name_of(cell: Cell) -> str:
    """Return the task's name, with what is less than all of it: rows, epochs."""
    full = cell.get("full", {})
    parts = [cell["task"]]
    if "train_rows" in full:
        parts.append(f"{cell['train_rows']:,} of {full['train_rows']:,} rows")
    if "epochs" in full:
        parts.append(f"{cell['epochs']} of {full['epochs']} epochs")
    return ", ".join(parts)


def _line(kind: str, row: Row) -> tuple[str, ...]:
    metric = f"{100 * row.metric:.2f} %" if row.unit == 100 else f"{row.metric:.4f}"
    return (
        kind,
        row.task,
        row.method,
        str(row.seeds),
        f"{row.speedup:.2f}x",
        f"{row.cpu_speedup:.2f}x",
        metric,
        row.difference_text,
        f"{row.parameters:.2f}x fewer",
        f"{row.macs:.2f}x fewer",
        f"{row.run_macs:.2f}x fewer",
        "" if row.own_share is None else f"{100 * row.own_share:.1f} %",
        ", ".join(f"{ratio:.2f}x at {batch}" for batch, ratio in row.latency.items()),
    )


def aims(cells: Sequence[Cell], frontiers: Sequence[Cell]) -> str:
    """What was aimed at for every kind, and what was measured."""
    lines: list[tuple[str, str, str]] = []
    for kind, rows in rows_by_kind(cells).items():
        if kind in LIMITS:
            lines += _at_defaults(kind, [row for row in rows if row.method == "apoptosis"], LIMITS[kind])
        lines += _at_targets(rows)
    tasks = ",".join(task.name for task in TASKS.values() if task.turn)
    return table(("aim", "measured", "met"), lines) if lines else EMPTY.format(tasks=tasks)


def _at_defaults(kind: str, rows: Sequence[Row], limits: Limits) -> list[tuple[str, str, str]]:
    if not rows:
        return []
    lines = [
        (f"{row.task}: whole run at least {limits.speed:g}x as fast", f"{row.speedup:.2f}x",
         _met(row.speedup >= limits.speed)) for row in rows
    ]  # fmt: skip
    if any(row.unit != 100 for row in rows):  # points and nats have no common mean
        for row in rows:
            limit = limits.mean if row.unit == 100 else -NATS
            what = f"{row.task}: mean difference at least {limit:g}"
            lines.append((what, row.difference_text, _met(row.difference >= limit)))
        return lines
    middle = fmean(row.difference for row in rows)
    lines.append((f"{kind}: mean difference at least {limits.mean:g} points", f"{middle:+.2f}",
                  _met(middle >= limits.mean)))  # fmt: skip
    what = f"{kind}: lower end of the pooled 95 % interval at least {limits.lower:g} points"
    if min(row.seeds for row in rows) < 2:
        lines.append((what, f"{', '.join(row.difference_text for row in rows)}", "one seed has no interval"))
    else:
        middle, width = pooled([row.differences for row in rows])
        lines.append((what, f"{middle - width:+.2f}", _met(middle - width >= limits.lower)))
    return lines


def _at_targets(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Whether targets are reached, and whether other methods of about the same multiply-adds are behind."""
    lines = []
    for own in (row for row in rows if row.method.startswith("apoptosis")):
        target = own.method.removeprefix("apoptosis, ")
        what = f"{own.task}, {own.method}"
        if target in TARGETS:
            off = own.macs / float(target.rstrip("x")) - 1
            reached = f"{own.macs:.2f}x fewer multiply-adds"
            lines.append((f"{what}: reached within 5 %", reached, _met(abs(off) <= REACHED)))
        others = [row for row in rows if row.task == own.task and not row.method.startswith(("apoptosis", "dense"))]
        near = [row for row in others if 1 / NEAR <= row.macs / own.macs <= NEAR]
        if near and own.macs > NEAR:
            text = f"{own.difference_text}; {', '.join(f'{r.method} {r.difference_text}' for r in near)}"
            ahead = own.difference > max(row.difference for row in near)
            lines.append((f"{what}: ahead at equal multiply-adds", text, _met(ahead)))
    return lines


def _met(yes: bool) -> str:
    return "yes" if yes else "**no**"
