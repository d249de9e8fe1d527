"""Markdown of the cells for README.md and docs/results.md.

Holds: which columns a page shows. Elsewhere: means and intervals (summary), files and markers (table.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.paper.summary import CORE, Cell, Row, summarise, table, targets
from benchmarks.paper.tasks import BY_NAME

NETWORKS = {task.name: task.network for task in BY_NAME.values()}
EMPTY = "No results are committed yet; `python -m benchmarks.paper --data-dir DIR` makes them."


def overview(cells: Sequence[Cell], frontiers: Sequence[Cell]) -> str:
    """One row per task, those of kinds.py alone excepted: apoptosis at default settings against dense."""
    rows = [r for r in _ordered(_rows(cells)) if r.method == "apoptosis"]
    dense = {r.task: r for r in _rows(cells) if r.method == "dense"}
    head = ("data, network", "seeds", "whole run", "parameters", "multiply-adds", "test metric: without, with",
            "difference (95 %)", "dense, stopped early", "time in apoptosis")  # fmt: skip
    early = {r.task: r for r in _rows(cells) if r.method == "early stopping"}
    lines = [
        (
            f"{r.task}, {NETWORKS[r.task]}",
            str(r.seeds),
            _speed(r.speedup),
            f"{r.parameters:.1f}x fewer",
            f"{r.macs:.1f}x fewer",
            f"{_metric(dense[r.task])}, {_metric(r)}",
            r.difference_text,
            early[r.task].difference_text if r.task in early else "",
            "" if r.own_share is None else f"{100 * r.own_share:.1f} %",
        )
        for r in rows
    ]
    return table(head, lines) if lines else EMPTY


def methods(cells: Sequence[Cell], frontiers: Sequence[Cell]) -> str:
    """All methods of all tasks but those that kinds.py alone tells."""
    head = ("data", "method", "seeds", "whole run", "processor time", "test metric", "difference (95 %)",
            "parameters", "multiply-adds", "of the whole run", "own share", "dense's metric reached",
            "latency at 1, 256", "memory")  # fmt: skip
    lines = [row.cells() for row in _ordered(_rows(cells))]
    return table(head, lines) if lines else EMPTY


def aims(cells: Sequence[Cell], frontiers: Sequence[Cell]) -> str:
    """What was aimed at, what was measured."""
    found = targets(_rows(cells), frontiers)
    lines = [(what, got, met if isinstance(met, str) else "yes" if met else "**no**") for what, got, met in found]
    return table(("aim", "measured", "met"), lines) if lines else EMPTY


def seeds(cells: Sequence[Cell], frontiers: Sequence[Cell]) -> str:
    """Apoptosis at default settings, every seed of the core tasks."""
    lines = []
    for cell in (c for name in CORE for c in cells if c["task"] == name):
        dense, own = cell["methods"]["dense"], cell["methods"]["apoptosis"]
        percent = cell["unit"] == 100
        limit = own["ledger"].get("accuracy_cost")
        lines.append(
            (
                cell["task"],
                str(cell["seed"]),
                f"{dense['run_seconds']:.1f} s, {own['run_seconds']:.1f} s",
                "-".join(str(width) for width in own["widths"].values()),
                ", ".join(f"{100 * x:.2f} %" if percent else f"{x:.4f}" for x in (dense["test"], own["test"])),
                str(own["ledger"]["events"]),
                "" if limit is None else f"at most {100 * limit:.1f} points",
            )
        )
    head = ("data", "seed", "whole run: without, with", "final widths", "test metric: without, with", "events",
            "ledger (95 %)")  # fmt: skip
    return table(head, lines) if lines else EMPTY


def frontier(cells: Sequence[Cell], frontiers: Sequence[Cell]) -> str:
    """Every run of the frontiers."""
    lines = []
    for one in frontiers:
        dense = next(p for p in one["points"] if p["method"] == "dense")
        for point in one["points"]:
            lines.append(
                (
                    one["task"],
                    point["method"],
                    "" if point["tolerance"] is None else f"{point['tolerance']:g}",
                    f"{dense['parameters'] / point['parameters']:.1f}x fewer",
                    f"{dense['macs'] / point['macs']:.1f}x fewer",
                    _speed(dense["run_seconds"] / point["run_seconds"]),
                    f"{100 * point['test']:.2f} %" if one["unit"] == 100 else f"{point['test']:.4f}",
                    f"{one['unit'] * (point['test'] - dense['test']):+.{2 if one['unit'] == 100 else 4}f}",
                )
            )
    head = ("data", "method", "tolerance", "parameters", "multiply-adds", "whole run", "test metric", "difference")
    return table(head, lines) if lines else EMPTY.replace("--data-dir", "--frontier --data-dir")


def _speed(ratio: float) -> str:
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def _rows(cells: Sequence[Cell]) -> list[Row]:
    """Summarise the tasks that are told here: those of kinds.py may be of fewer rows or epochs from cell to cell."""
    return summarise([cell for cell in cells if not BY_NAME[cell["task"]].turn])


def _ordered(rows: Sequence[Row]) -> list[Row]:
    return [row for name in NETWORKS for row in rows if row.task == name]


def _metric(row: Row) -> str:
    if row.metric_name == "-nats":
        return f"{-row.metric:.4f} nats"
    return f"{100 * row.metric:.2f} %" if row.unit == 100 else f"{row.metric_name} {row.metric:.4f}"
