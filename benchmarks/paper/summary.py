"""From cells to the table and to what was asked of it.

Lives here: means, paired intervals, geometric means, targets. Does not live here: training, pictures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

Cell = Mapping[str, Any]
SETTINGS = ("schema", "epochs", "batch", "lr", "train_rows")
LONG_STEP = 0.010  # seconds of a dense step from which arithmetic decides, not the calls around it
CORE = ("mnist", "fashion-mnist", "higgs", "cifar10")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contestant on one ground, over its seeds, against dense in the same cells.

    speedup, cpu_speedup: ratios of summed seconds. difference: mean of the paired differences of the test metric, in
    the ground's unit; interval: its 95 % half width, None for one seed. reached: seeds that reached the dense network's
    final validation metric, and the mean share of dense's training time that took.
    memory: ratio of the peaks of a training step. dense_step: seconds of a step.
    """

    ground: str
    contestant: str
    seeds: int
    unit: float
    metric: float
    difference: float
    interval: float | None
    differences: tuple[float, ...]
    speedup: float
    cpu_speedup: float
    parameters: float
    macs: float
    spent_macs: float
    own_share: float | None
    reached: int
    reached_share: float | None
    latency: Mapping[str, float]
    memory: float | None
    dense_step: float


def read_cells(folder: Path, only: Sequence[str] | None = None) -> list[Cell]:
    """Read the cells of a folder, by ground and seed."""
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    found = [c for c in cells if c.get("kind") == "paper-cell" and (only is None or c["ground"] in only)]
    return sorted(found, key=lambda c: (c["ground"], c["seed"]))


def read_frontiers(folder: Path) -> list[Cell]:
    """Read the frontiers of a folder."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("frontier-*.json"))]
    return [c for c in found if c.get("kind") == "paper-frontier"]


def summarise(cells: Sequence[Cell]) -> list[Row]:
    """One row per ground and contestant."""
    rows = []
    for ground in dict.fromkeys(c["ground"] for c in cells):
        here = [c for c in cells if c["ground"] == ground]
        if len({tuple(c[key] for key in SETTINGS) for c in here}) > 1:
            raise ValueError(f"the cells of {ground} differ in {', '.join(SETTINGS)}: run them again as one table.")
        if len({c["machine"]["threads"] for c in here}) > 1:
            raise ValueError(f"the cells of {ground} were run with different numbers of threads.")
        names = dict.fromkeys(n for c in here for n in c["contestants"])
        rows += [_row(ground, name, [c for c in here if name in c["contestants"]]) for name in names]
    return rows


def _row(ground: str, name: str, cells: Sequence[Cell]) -> Row:
    pairs = [(c["contestants"]["dense"], c["contestants"][name]) for c in cells]
    unit = cells[0]["unit"]
    differences = tuple(unit * (own["test"] - dense["test"]) for dense, own in pairs)
    own = [o["own_seconds"] / o["run_seconds"] for _, o in pairs if o["own_seconds"] is not None]
    reached = [share for dense, o in pairs if (share := _reached(dense, o)) is not None]
    latency = {b: fmean(d["latency"][b] / o["latency"][b] for d, o in pairs) for b in pairs[0][1].get("latency", {})}
    return Row(
        ground=ground,
        contestant=name,
        seeds=len(cells),
        unit=unit,
        metric=fmean(o["test"] for _, o in pairs),
        difference=fmean(differences),
        interval=half_width(differences),
        differences=differences,
        speedup=_ratio(pairs, "run_seconds"),
        cpu_speedup=_ratio(pairs, "cpu_seconds"),
        parameters=_ratio(pairs, "parameters"),
        macs=_ratio(pairs, "macs"),
        spent_macs=_ratio(pairs, "spent_macs"),
        own_share=fmean(own) if own else None,
        reached=len(reached),
        reached_share=fmean(reached) if reached else None,
        latency=latency,
        memory=_ratio(pairs, "memory") if all("memory" in d and "memory" in o for d, o in pairs) else None,
        dense_step=fmean(d["seconds"] for d, _ in pairs) / _steps(cells[0]),
    )


def _steps(cell: Cell) -> int:
    return int(cell["epochs"] * (cell["train_rows"] // cell["batch"]))


def _ratio(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], field: str) -> float:
    return sum(float(d[field]) for d, _ in pairs) / sum(float(o[field]) for _, o in pairs)


def _reached(dense: Mapping[str, Any], own: Mapping[str, Any]) -> float | None:
    """Share of dense's training seconds after which the validation metric first reached dense's final one."""
    goal = dense["points"][-1]["validation"]
    for point in own["points"]:
        if point["validation"] >= goal:
            return float(point["seconds"] / dense["seconds"])
    return None


def half_width(values: Sequence[float], confidence: float = 0.95) -> float | None:
    """Half the width of Student's interval of a mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    return float(student.ppf(0.5 + confidence / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values)))


def geometric(values: Sequence[float]) -> float:
    """Geometric mean of positive values."""
    return math.exp(fmean(math.log(v) for v in values))


def targets(rows: Sequence[Row]) -> list[tuple[str, str, bool]]:
    """What was asked, what was measured, and whether it was met: default settings on the core grounds that ran."""
    own = {r.ground: r for r in rows if r.contestant == "apoptosis" and r.ground in CORE}
    if not own:
        return []
    points = [d for r in own.values() if r.unit == 100 for d in r.differences]
    width = half_width(points)
    least = min(own.values(), key=lambda r: r.speedup)
    speed, size = (geometric([getattr(r, f) for r in own.values()]) for f in ("speedup", "parameters"))
    middle = fmean(points) if points else math.nan
    lower = None if width is None else middle - width
    told = [
        (f"whole run at least 3x faster (geometric mean of {', '.join(own)})", f"{speed:.2f}x", speed >= 3),
        ("each at least 2x", f"least: {least.ground} {least.speedup:.2f}x", least.speedup >= 2),
        ("accuracy: mean difference at least -0.1 points, all seeds of all grounds", f"{middle:+.3f}", middle >= -0.1),
        ("accuracy: lower end of the 95 % interval of that mean above -0.2", "one value" if lower is None else
         f"{lower:+.3f}", lower is not None and lower > -0.2),
        *((f"{r.ground}: difference of the {'AUC' if r.unit == 1 else 'accuracy'} at least {-0.1 / (100 / r.unit):g}",
           f"{r.difference:+.4f}" + ("" if r.interval is None else f" ± {r.interval:.4f}"),
           r.difference >= -0.1 * r.unit / 100) for r in own.values()),
        ("at least 8x fewer parameters (geometric mean)", f"{size:.1f}x", size >= 8),
    ]  # fmt: skip
    for row in (r for r in rows if r.contestant == "apoptosis" and r.dense_step > LONG_STEP):
        got = row.speedup / row.spent_macs
        told.append((f"{row.ground} (dense step {1000 * row.dense_step:.0f} ms): at least 85 % of what the "
                     "multiply-adds promise", f"{100 * got:.0f} %", got >= 0.85))  # fmt: skip
    shares = {r.ground: r.own_share or 0.0 for r in own.values()}
    worst = max(shares, key=lambda g: shares[g])
    told.append(
        ("own share at most 1 % of the run", f"most: {worst} {100 * shares[worst]:.1f} %", shares[worst] <= 0.01)
    )
    for rival in ("torch-pruning", "group lasso", "train-prune-fine-tune", "same widths", "same widths, longer"):
        both = [(own[r.ground], r) for r in rows if r.contestant == rival and r.ground in own]
        if both:
            ahead = [100 / o.unit * (o.difference - r.difference) if o.unit == 1 else o.difference - r.difference
                     for o, r in both]  # fmt: skip
            told.append((f"ahead of {rival} on every ground", ", ".join(f"{o.ground} {a:+.2f}" for (o, _), a in
                         zip(both, ahead, strict=True)), min(ahead) > 0))  # fmt: skip
    return told


def tell(rows: Sequence[Row]) -> str:
    """The table and the targets as Markdown."""
    head = ("ground", "contestant", "seeds", "whole run", "processor time", "test metric", "difference (95 %)",
            "parameters", "multiply-adds", "of the whole run", "own share", "dense's metric reached",
            "latency 1, 256", "memory")  # fmt: skip
    lines = [head, ("---",) * len(head), *(_cells(row) for row in rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    asked = "\n".join(f"| {what} | {got} | {'yes' if met else 'no'} |" for what, got, met in targets(rows))
    return table + ("\n\n| asked | measured | met |\n| --- | --- | --- |\n" + asked if asked else "")


def _cells(row: Row) -> tuple[str, ...]:
    percent = row.unit == 100
    interval = "" if row.interval is None else f" ± {row.interval:.2f}" if percent else f" ± {row.interval:.4f}"
    return (
        row.ground,
        row.contestant,
        str(row.seeds),
        f"{row.speedup:.2f}x",
        f"{row.cpu_speedup:.2f}x",
        f"{100 * row.metric:.2f} %" if percent else f"{row.metric:.4f}",
        (f"{row.difference:+.2f}" if percent else f"{row.difference:+.4f}") + interval,
        f"{row.parameters:.1f}x fewer",
        f"{row.macs:.1f}x fewer",
        f"{row.spent_macs:.1f}x fewer",
        "" if row.own_share is None else f"{100 * row.own_share:.1f} %",
        "no" if row.reached_share is None else f"{row.reached} of {row.seeds}, at {100 * row.reached_share:.0f} %",
        ", ".join(f"{v:.1f}x" for v in row.latency.values()),
        "" if row.memory is None else f"{row.memory:.1f}x less",
    )
