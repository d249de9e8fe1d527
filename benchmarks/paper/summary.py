"""From cells to the table and to what was asked of it.

Holds: means, paired intervals, geometric means, targets. Elsewhere: training, pictures.
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
    """One method on one task, over its seeds, against dense in the same cells.

    speedup, cpu_speedup: ratios of summed seconds. difference: mean of the paired differences of the test metric, in
    the task's unit; interval: its 95 % half width, None for one seed. reached: seeds that reached the dense network's
    final validation metric, and the mean share of dense's training time that took.
    memory: ratio of the peaks of a training step. dense_step: seconds of a step.
    """

    task: str
    method: str
    seeds: int
    unit: float
    metric: float
    difference: float
    interval: float | None
    differences: tuple[float, ...]
    seed_ids: tuple[int, ...]
    speedup: float
    cpu_speedup: float
    parameters: float
    macs: float
    run_macs: float
    own_share: float | None
    reached: int
    reached_share: float | None
    latency: Mapping[str, float]
    memory: float | None
    dense_step: float
    metric_name: str

    @property
    def difference_text(self) -> str:
        """The paired difference with its interval."""
        digits = 2 if self.unit == 100 else 4
        interval = "" if self.interval is None else f" ± {self.interval:.{digits}f}"
        return f"{self.difference:+.{digits}f}{interval}" + (" points" if self.unit == 100 else "")

    def cells(self) -> tuple[str, ...]:
        """All of it, as text."""
        return (
            self.task,
            self.method,
            str(self.seeds),
            f"{self.speedup:.2f}x",
            f"{self.cpu_speedup:.2f}x",
            f"{100 * self.metric:.2f} %" if self.unit == 100 else f"{self.metric:.4f}",
            self.difference_text,
            f"{self.parameters:.1f}x fewer",
            f"{self.macs:.1f}x fewer",
            f"{self.run_macs:.1f}x fewer",
            "" if self.own_share is None else f"{100 * self.own_share:.1f} %",
            "no" if self.reached_share is None else
            f"{self.reached} of {self.seeds}, at {100 * self.reached_share:.0f} %",
            ", ".join(f"{v:.1f}x" for v in self.latency.values()),
            "" if self.memory is None else f"{self.memory:.1f}x less",
        )  # fmt: skip


def read_cells(folder: Path, only: Sequence[str] | None = None) -> list[Cell]:
    """Read the cells of a folder, by task and seed."""
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    found = [c for c in cells if c.get("kind") == "paper-cell" and (only is None or c["task"] in only)]
    return sorted(found, key=lambda c: (c["task"], c["seed"]))


def read_frontiers(folder: Path) -> list[Cell]:
    """Read the frontiers of a folder."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("frontier-*.json"))]
    return [c for c in found if c.get("kind") == "paper-frontier"]


def summarise(cells: Sequence[Cell]) -> list[Row]:
    """One row per task and method."""
    rows = []
    for task in dict.fromkeys(c["task"] for c in cells):
        here = [c for c in cells if c["task"] == task]
        if len({tuple(c[key] for key in SETTINGS) for c in here}) > 1:
            raise ValueError(f"the cells of {task} differ in {', '.join(SETTINGS)}: run them again as one table.")
        if len({c["machine"]["threads"] for c in here}) > 1:
            raise ValueError(f"the cells of {task} were run with different numbers of threads.")
        if len({c["tolerance"] for c in here}) > 1:
            raise ValueError(f"the cells of {task} were run at different default tolerances.")
        names = dict.fromkeys(n for c in here for n in c["methods"])
        rows += [_row(task, name, [c for c in here if name in c["methods"]]) for name in names]
    return rows


def _row(task: str, name: str, cells: Sequence[Cell]) -> Row:
    pairs = [(c["methods"]["dense"], c["methods"][name]) for c in cells]
    unit = cells[0]["unit"]
    differences = tuple(unit * (own["test"] - dense["test"]) for dense, own in pairs)
    own = [o["own_seconds"] / o["run_seconds"] for _, o in pairs if o["own_seconds"] is not None]
    reached = [share for dense, o in pairs if (share := _reached(dense, o)) is not None]
    latency = {b: fmean(d["latency"][b] / o["latency"][b] for d, o in pairs) for b in pairs[0][1].get("latency", {})}
    return Row(
        task=task,
        method=name,
        seeds=len(cells),
        unit=unit,
        metric=fmean(o["test"] for _, o in pairs),
        difference=fmean(differences),
        interval=half_width(differences),
        differences=differences,
        seed_ids=tuple(int(c["seed"]) for c in cells),
        speedup=_ratio(pairs, "run_seconds"),
        cpu_speedup=_ratio(pairs, "cpu_seconds"),
        parameters=_ratio(pairs, "parameters"),
        macs=_ratio(pairs, "macs"),
        run_macs=_ratio(pairs, "run_macs"),
        own_share=fmean(own) if own else None,
        reached=len(reached),
        reached_share=fmean(reached) if reached else None,
        latency=latency,
        memory=_ratio(pairs, "memory") if all(d.get("memory") and o.get("memory") for d, o in pairs) else None,
        dense_step=fmean(d["seconds"] for d, _ in pairs) / _steps(cells[0]),
        metric_name=cells[0]["metric"],
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


def pooled(groups: Sequence[Sequence[float]], confidence: float = 0.95) -> tuple[float, float]:
    """Mean of the groups' means, and half the width of its interval (Welch-Satterthwaite); two values each at least.

    What differs from task to task is no noise here: the tasks are those, not a sample of many.
    """
    parts = [stdev(values) ** 2 / len(values) for values in groups]
    total = sum(parts)
    if total == 0.0:
        return fmean(fmean(values) for values in groups), 0.0
    freedom = total**2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, groups, strict=True))
    width = float(student.ppf(0.5 + confidence / 2, freedom)) * math.sqrt(total) / len(groups)
    return fmean(fmean(values) for values in groups), width


def geometric(values: Sequence[float]) -> float:
    """Geometric mean of positive values."""
    return math.exp(fmean(math.log(v) for v in values))


def targets(rows: Sequence[Row], frontiers: Sequence[Cell]) -> list[Aim]:
    """What was aimed at, what was measured, and whether it was met: default settings on the core tasks that ran."""
    own = {r.task: r for r in rows if r.method == "apoptosis" and r.task in CORE}
    if not own:
        return []
    return [*_speed_and_loss(own), *_baselines(own, rows), *_sizes(own, frontiers), *_clock(own, rows)]


Aim = tuple[str, str, bool | str]  # whether it was met, or why that is not clear


def _speed_and_loss(own: Mapping[str, Row]) -> list[Aim]:
    """AUC counts as points, too: 0.001 is a tenth of one."""
    least = min(own.values(), key=lambda r: r.speedup)
    speed = geometric([r.speedup for r in own.values()])
    aims: list[Aim] = [
        (f"whole run at least 3x faster (geometric mean of {', '.join(own)})", f"{speed:.2f}x", speed >= 3),
        ("each at least 2x", f"least: {least.task} {least.speedup:.2f}x", least.speedup >= 2),
    ]
    for what, chosen in (
        ("all", list(own.values())),
        ("those measured by accuracy", [r for r in own.values() if r.unit == 100]),
    ):
        if chosen and all(r.seeds > 1 for r in chosen):
            middle, width = pooled([[100 / r.unit * d for d in r.differences] for r in chosen])
            aims.append((f"mean difference of {what} at least -0.1 points", f"{middle:+.2f}", middle >= -0.1))
            aims.append(
                (
                    f"lower end of the 95 % interval of the mean of {what} above -0.2",
                    f"{middle - width:+.2f}",
                    middle - width > -0.2,
                )
            )
    aims += [(f"{r.task}: mean difference at least {-0.001 * r.unit:g}", r.difference_text,
              r.difference >= -0.001 * r.unit) for r in own.values()]  # fmt: skip
    if higgs := own.get("higgs"):
        good = higgs.difference > 0 and higgs.parameters >= 3
        aims.append(("HIGGS: AUC above dense at 3x fewer parameters or less",
                     f"{higgs.difference_text} at {higgs.parameters:.1f}x fewer", good))  # fmt: skip
    return aims


def _sizes(own: Mapping[str, Row], frontiers: Sequence[Cell]) -> list[Aim]:
    size = geometric([r.parameters for r in own.values()])
    aims: list[Aim] = [("at least 8x fewer parameters (geometric mean)", f"{size:.1f}x", size >= 8)]
    for one in frontiers:
        dense = next(p for p in one["points"] if p["method"] == "dense")
        within = [p for p in one["points"] if p["method"] == "interpolative"
                  and dense["validation"] - p["validation"] <= 0.01]  # fmt: skip
        if within:
            small = min(within, key=lambda p: p["parameters"])
            ratio, lost = dense["parameters"] / small["parameters"], 100 * (dense["test"] - small["test"])
            aims.append((f"{one['task']}: the smallest network within 1 point on validation examples "
                         "has at least 30x fewer parameters, within 1 point",
                         f"tolerance {small['tolerance']:g}: {ratio:.1f}x, {-lost:+.2f} points",
                         ratio >= 30 and lost <= 1.0))  # fmt: skip
    return aims


def _clock(own: Mapping[str, Row], rows: Sequence[Row]) -> list[Aim]:
    aims: list[Aim] = []
    for row in (r for r in rows if r.method == "apoptosis" and r.dense_step > LONG_STEP):
        got = row.speedup / row.run_macs
        aims.append((f"{row.task} (dense step {1000 * row.dense_step:.0f} ms): at least 85 % of what the "
                     "multiply-adds of the run promise", f"{100 * got:.0f} %", got >= 0.85))  # fmt: skip
    shares = {r.task: r.own_share or 0.0 for r in own.values()}
    worst = max(shares, key=lambda g: shares[g])
    aims.append(
        ("own share at most 1 % of the run", f"most: {worst} {100 * shares[worst]:.1f} %", shares[worst] <= 0.01)
    )
    return aims


BASELINES = ("torch-pruning", "group lasso", "train-prune-fine-tune", "same widths", "same widths, longer",
          "early stopping")  # fmt: skip


def _baselines(own: Mapping[str, Row], rows: Sequence[Row]) -> list[Aim]:
    """Paired by seed. Ahead with confidence, ahead on average, or behind: only the first is a yes."""
    aims: list[Aim] = []
    for baseline in BASELINES:
        both = [(own[r.task], r) for r in rows if r.method == baseline and r.task in own]
        ahead = []
        for mine, other in both:
            theirs = dict(zip(other.seed_ids, other.differences, strict=True))
            mine_by_seed = zip(mine.seed_ids, mine.differences, strict=True)
            pairs = [100 / mine.unit * (d - theirs[seed]) for seed, d in mine_by_seed if seed in theirs]
            width = half_width(pairs)
            ahead.append((mine.task, fmean(pairs), math.inf if width is None else width))
        if ahead:
            text = ", ".join(f"{g} {m:+.2f}" + ("" if w == math.inf else f" ± {w:.2f}") for g, m, w in ahead)
            least = min(m for _, m, _ in ahead)
            sure = all(m - w > 0 for _, m, w in ahead)
            outcome = "no clear difference" if least > 0 and not sure else sure
            aims.append((f"ahead of {baseline} on every task, points", text, outcome))
    return aims


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    rows = [head, ("---",) * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in rows)
