"""Pictures of the cells: metric against time, widths over time, parameters against metric, certificates, events.

Holds: drawing. Elsewhere: any figure that the cells' JSON does not hold.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.paper.summary import CORE

Cell = Mapping[str, Any]
COLOURS = {
    "dense": "#444444",
    "apoptosis": "#c0392b",
    "torch-pruning": "#2471a3",
    "group lasso": "#7d3c98",
    "half width": "#b7950b",
    "same widths": "#1e8449",
    "same widths, longer": "#76d7c4",
    "train-prune-fine-tune": "#5dade2",
    "early stopping": "#999999",
}


ACROSS = 4  # pictures in a row
MOST_NAMED = 6  # groups that fit into a legend
METHODS = {
    "interpolative": "#c0392b",
    "reconstruction": "#e59866",
    "magnitude": "#7d3c98",
    "torch-pruning": "#2471a3",
    "same widths": "#1e8449",
}


def draw_all(cells: Sequence[Cell], frontiers: Sequence[Cell], times: Sequence[Cell], folder: Path) -> list[Path]:
    """Draw every picture for which there are cells; returns what was written, SVG."""
    import matplotlib
    from matplotlib import pyplot

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # fonts that only formulas would ask for
    matplotlib.use("svg")
    looks = {"svg.hashsalt": "paper", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    matplotlib.rcParams.update(looks)
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, tuple[Callable[[Any, Sequence[Cell]], None], Sequence[Cell]]] = {
        "time": (_metric_against_time, [c for c in cells if c["task"] in CORE]),
        "time-others": (_metric_against_time, [c for c in cells if c["task"] not in CORE]),
        "widths": (_widths, cells),
        "sizes": (_sizes, cells),
        "frontier": (_frontier, frontiers),
        "certificates": (_certificates, frontiers),
        "events": (_where_time_goes, times),
    }
    written = []
    for name, (draw, shown) in pictures.items():
        if not shown:
            continue
        present = {c["task"] for c in shown}
        tasks = [g for g in (*CORE, *sorted(present.difference(CORE))) if g in present]
        rows, columns = -(-len(tasks) // ACROSS), min(ACROSS, len(tasks))
        size = ((3.4 if columns > 2 else 4.8) * columns, (3.0 if columns > 2 else 3.6) * rows)
        figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        for axis in axes.flat[len(tasks) :]:
            axis.set_visible(False)
        for axis, task in zip(axes.flat, tasks, strict=False):
            here = [c for c in shown if c["task"] == task]
            axis.set_title(task)
            draw(axis, here)
        handles, labels = axes[0][0].get_legend_handles_labels()
        if name == "widths":  # groups have other names on every task
            for axis in axes.flat[: len(tasks)]:
                if len(axis.get_lines()) <= MOST_NAMED:
                    axis.legend(frameon=False, fontsize=7)
        elif handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
        path = folder / f"paper-{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
        written.append(path)
    return written


def _metric_against_time(axis: Any, cells: Sequence[Cell]) -> None:
    """Validation metric at the end of every epoch, means over seeds."""
    for name, colour in COLOURS.items():
        runs = [c["methods"][name]["points"] for c in cells if name in c["methods"]]
        if not runs or name == "early stopping":
            continue
        if name == "train-prune-fine-tune":  # before that it is the dense run
            runs = [points[cells[0]["epochs"] - 1 :] for points in runs]
        length = min(len(points) for points in runs)
        seconds = [fmean(points[i]["seconds"] for points in runs) for i in range(length)]
        value = [fmean(points[i]["validation"] for points in runs) for i in range(length)]
        axis.plot(seconds, value, color=colour, label=name, linewidth=2 if name == "apoptosis" else 1)
    values = [p["validation"] for c in cells for p in c["methods"]["dense"]["points"]]
    axis.set_ylim(sorted(values)[len(values) // 4] - 0.01, max(values) + 0.01)
    axis.set_xlabel("seconds of training")
    axis.set_ylabel(f"validation {cells[0]['metric']}")


def _widths(axis: Any, cells: Sequence[Cell]) -> None:
    """Channels of every group after every event, first seed."""
    run = cells[0]["methods"]["apoptosis"]
    for name in run["widths"]:
        steps = [event["step"] for event in run["events"]]
        axis.step(steps, [event["widths"].get(name) for event in run["events"]], where="post", label=name)
    axis.set_xlabel("step")
    axis.set_ylabel("channels")
    axis.set_ylim(bottom=0)


def _frontier(axis: Any, cells: Sequence[Cell]) -> None:
    """Parameters against the test metric over tolerances, one curve per method."""
    for name, colour in METHODS.items():
        points = sorted((p["parameters"], p["test"]) for p in cells[0]["points"] if p["method"] == name)
        if points:
            axis.plot(*zip(*points, strict=True), "o-", color=colour, label=name, markersize=3, linewidth=1)
    dense = next(p for p in cells[0]["points"] if p["method"] == "dense")
    axis.axhline(dense["test"], color=COLOURS["dense"], linewidth=0.8, label="dense")
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter("")
    axis.set_xlabel("parameters")
    axis.set_ylabel(f"test {cells[0]['metric']}")


def _sizes(axis: Any, cells: Sequence[Cell]) -> None:
    """Parameters against the paired difference of the test metric, default settings, every seed."""
    unit = cells[0]["unit"]
    for name, colour in COLOURS.items():
        pairs = [(c["methods"]["dense"], c["methods"][name]) for c in cells if name in c["methods"]]
        if pairs:
            size = [own["parameters"] for _, own in pairs]
            axis.scatter(size, [unit * (o["test"] - d["test"]) for d, o in pairs], color=colour, label=name, s=18)
    axis.axhline(0, color="#cccccc", linewidth=0.8)
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter("")
    axis.set_xlabel("parameters")
    axis.set_ylabel("difference to dense" + (", points" if unit == 100 else ""))


def _certificates(axis: Any, cells: Sequence[Cell]) -> None:
    """Every event of every tolerance: the worst site's certificate against what the outputs did on held-out rows."""
    for name in ("interpolative", "reconstruction", "magnitude"):
        events = [e for p in cells[0]["points"] if p["method"] == name for e in p["events"]]
        pairs = [(e["site_error"], e["measured"]["output_rms"]) for e in events if e["site_error"]]
        if pairs:
            axis.scatter(*zip(*pairs, strict=True), color=METHODS[name], s=9, label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("certificate: relative error of the worst site")
    axis.set_ylabel("measured: relative change of the outputs")


def _where_time_goes(axis: Any, cells: Sequence[Cell]) -> None:
    """Milliseconds of the parts of every event."""
    events = cells[0]["events"]
    below = [0.0] * len(events)
    for part in events[0]["parts"]:
        heights = [1000 * event["parts"][part] for event in events]
        axis.bar([str(event["step"]) for event in events], heights, bottom=below, label=part)
        below = [b + h for b, h in zip(below, heights, strict=True)]
    axis.set_xlabel("event at step")
    axis.set_ylabel("ms")
