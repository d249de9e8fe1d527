"""The plots: widths, size, loss and metric, certificates, time.

Holds: drawing with matplotlib's object interface (no pyplot, no global state is left changed), a figure for every
panel. Elsewhere: PNG, SVG and legends (rendering.py), numbers that the log does not hold.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from apoptosis.display.text import short_number, shown_name
from apoptosis.errors import ArgumentError
from apoptosis.tools.report.rendering import Entry, rendered
from apoptosis.tools.report.run import (
    APOPTOSIS,
    DENSE,
    NOTHING_SAID,
    Curve,
    Record,
    RunData,
    certificates,
    measured,
    measured_points,
    says_nothing,
    step_of,
)
from apoptosis.tools.report.theme import (
    APOPTOSIS_COLOUR,
    DENSE_COLOUR,
    GRID,
    INK,
    MUTED,
    SERIES,
)
from apoptosis.tools.report.words import METRIC_WORDS

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 11,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,  # names of groups are names, whatever dollar signs they hold
    "lines.linewidth": 2.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "apoptosis",
    "figure.constrained_layout.use": True,
}
LOOKS: dict[str, dict[str, Any]] = {
    DENSE: {"color": DENSE_COLOUR, "linestyle": "--", "marker": "s"},
    APOPTOSIS: {"color": APOPTOSIS_COLOUR, "linestyle": "-", "marker": "o"},
}
DASHES = ("-", "--", "-.", ":")
MAX_LABELLED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One plot, or why there is none. alt: what it shows, in words and numbers, for those who do not see it."""

    key: str
    title: str
    caption: str
    alt: str = ""
    missing: str = ""
    png: bytes = b""
    svgs: tuple[str, ...] = ()
    legend: tuple[Entry, ...] = ()


class Drawn(NamedTuple):
    """What a function of PLOTS returns: a figure, or one for every panel; words for it; what it adds to the caption.

    What is labelled and has no legend of its own gets one beside the plot.
    """

    figures: Figure | Sequence[Figure]
    alt: str
    more: str = ""


#: Key -> function that draws one plot of the page, or says why it cannot; in the order of the page.
PLOTS: dict[str, Callable[[RunData], Plot]] = {}
Draw = Callable[[RunData], Drawn | str]


def plot(key: str, title: str, caption: str) -> Callable[[Draw], Draw]:
    """Add a function to PLOTS, which is all it takes to have one more plot.

    The function returns what it drew, or a sentence that says why the log does not have the data for it.
    """

    def add(draw: Draw) -> Draw:
        if key in PLOTS:
            raise ArgumentError(f"plot '{key}' is there already; there are {', '.join(PLOTS)}.")

        def made(run: RunData) -> Plot:
            drawn = draw(run)
            if isinstance(drawn, str):
                return Plot(key=key, title=title, caption=caption, missing=drawn)
            figures = [drawn.figures] if isinstance(drawn.figures, Figure) else drawn.figures
            png, svgs, legend = rendered(figures, key)
            more = {"caption": caption + drawn.more, "alt": drawn.alt}
            return Plot(key=key, title=title, **more, png=png, svgs=svgs, legend=legend)

        PLOTS[key] = made
        return draw

    return add


def draw_all(run: RunData) -> tuple[Plot, ...]:
    """Draw every plot that the log has the data for, in the order of the page."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the page has them
        return tuple(draw(run) for draw in PLOTS.values())


def _axes(num: int) -> tuple[list[Figure], list[Axes]]:
    figures = [Figure(figsize=(5.2, 3.4)) for _ in range(num)]
    axes = [fig.add_subplot() for fig in figures]
    for ax in axes:
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short_number(v)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short_number(v)))
        ax.xaxis.set_major_locator(MaxNLocator(6))
    return figures, axes


@plot(
    "widths",
    "Widths over steps",
    "Channels of each coupled channel group. Every fall is an event; widths hold in between.",
)
def _widths(run: RunData) -> Drawn | str:
    more = ""
    seed = run.seeds[0] if run.seeds else 0
    lines = run.width_steps(seed)
    if not lines:
        return "The log has no widths yet: no epoch and no event."
    fig, (ax,) = _axes(1)
    order = sorted(lines, key=lambda g: -lines[g][0][1])
    labelled = set(order[:MAX_LABELLED]) if len(order) > MAX_LABELLED else set(order)
    for i, group in enumerate(lines):
        look: dict[str, Any] = {"color": SERIES[i % len(SERIES)], "linestyle": DASHES[i % len(DASHES)]}
        look["label"] = shown_name(group)
        if group not in labelled:
            look = {"color": MUTED, "linestyle": "-", "linewidth": 0.8}
        ax.step([x for x, _ in lines[group]], [y for _, y in lines[group]], where="post", **look)
    rolled_back = [step_of(e) for e in run.events.get(seed, ()) if e.get("rolled_back")]
    if rolled_back:
        ax.plot(rolled_back, [0.0] * len(rolled_back), "x", color=MUTED, label="rolled back", clip_on=False)
        more += " A cross on the axis is an attempt that was rolled back."
    if len(lines) > MAX_LABELLED:
        more += f" {len(lines) - MAX_LABELLED} narrower groups are thin grey lines; the events table has all."
    if len(run.seeds) > 1:
        more += f" Shown is seed {seed}, one of {len(run.seeds)}."
    ax.set(xlabel="step", ylabel="channels", ylim=(0, None), xlim=(0, None))
    ends = "; ".join(f"{g} from {int(line[0][1])} to {int(line[-1][1])}" for g, line in lines.items())
    return Drawn(fig, f"Staircase plot of {len(lines)} group widths over steps: {ends}.", more)


@plot(
    "size",
    "Parameters and multiply-adds over time",
    "Parameters of the network, and multiply-adds (MACs) of a forward pass per example.",
)
def _size(run: RunData) -> Drawn | str:
    def draw(ax: Axes, method: str, seed: int, column: str) -> str:
        x, y = run.size_over_time(method, seed, column)
        if not x:
            return ""
        ax.step(x, y, where="post", label=_once(ax, _name(method)), **LOOKS[method] | {"marker": ""})
        return f"from {short_number(y[0])} to {short_number(y[-1])}"

    drawn = _over_time(run, {"parameters": "parameters", "macs": "multiply-adds per example"}, draw, ylim=(0, None))
    if drawn is None:
        return "The log has no sizes yet: no finished epoch."
    return Drawn(drawn[0], f"Staircase plots over training time. {drawn[1]}.")


@plot(
    "learning",
    "Loss and metric over time",
    "Training loss of each epoch, and the metric on the validation part after it, over training seconds.",
)
def _learning(run: RunData) -> Drawn | str:
    def draw(ax: Axes, method: str, seed: int, column: str) -> str:
        curve = run.curve(method, seed)
        x, y = curve.points("seconds", column) if curve else ([], [])
        if not x:
            return ""
        ax.plot(x, y, label=_once(ax, _name(method)), markersize=4, **LOOKS[method])
        return f"{short_number(y[-1])} after {short_number(x[-1])} s"

    metric = METRIC_WORDS.get(run.metric_name, shown_name(run.metric_name))
    drawn = _over_time(run, {"loss": "training loss", "metric": f"validation {metric}"}, draw)
    if drawn is None:
        return "The log has no finished epoch yet."
    alone = " This run has no paired run without apoptosis; the command apoptosis compare trains both."
    return Drawn(drawn[0], f"Line plots over training time. {drawn[1]}.", alone if run.curve(DENSE) is None else "")


def _over_time(
    run: RunData, columns: Mapping[str, str], draw: Callable[[Axes, str, int, str], str], **limits: Any
) -> tuple[list[Figure], str] | None:
    """Draw a panel for every column that the epochs have, over training seconds; return them in words, too."""
    found = {column: label for column, label in columns.items() if _has(run, column)}
    if not found:
        return None
    fig, axes = _axes(len(found))
    words = []
    for ax, (column, label) in zip(axes, found.items(), strict=True):
        for method, seed in _lines(run):
            if said := draw(ax, method, seed, column):
                words.append(f"{_name(method)}, {label}: {said}")
        ax.set(title=label, xlabel="training seconds", xlim=(0, None), **limits)
    return fig, "; ".join(words)


CERTIFICATE_WORDS = {
    "empirical": "sites: relative rms (empirical)",
    "accuracy": "changed predictions: share (accuracy)",
    "worst_case": "sites: rms (worst case)",
}


CERTIFIED: dict[str, Any] = {"linestyle": "", "marker": "v", "markerfacecolor": "none", "color": DENSE_COLOUR}
MEASURED: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 4, "color": APOPTOSIS_COLOUR}
MARGINS: dict[str, Any] = {"linestyle": "", "marker": "s", "markerfacecolor": "none", "color": SERIES[2]}


@plot(
    "certificates",
    "Certificates against measurements",
    "Triangles are bounds; dots are what was measured of the same quantity on the event's probe rows and belong at "
    "or below their triangle. Squares: the share of these rows whose margin is too small to rule out a change.",
)
def _certificates(run: RunData) -> Drawn | str:
    attempts = [e for seed in run.seeds for e in run.events.get(seed, ())]
    found = [c for e in attempts for c in certificates(e)]
    if not found:
        return "No event carries a certificate." if attempts else "There has been no event yet."
    kinds = [k for k in CERTIFICATE_WORDS if any(c.get("kind") == k and not says_nothing(c) for c in found)]
    outputs = measured_points(attempts, "output_rms")
    if not kinds and not outputs:
        return _left_out(attempts).strip()
    fig, axes = _axes(len(kinds) + bool(outputs))
    said = [_certificate_panel(ax, attempts, kind) for ax, kind in zip(axes, kinds, strict=False)]
    more = _left_out(attempts)
    if outputs:
        axes[-1].plot([s for s, _ in outputs], [v for _, v in outputs], label="measured", **MEASURED)
        _finish_panel(axes[-1], "outputs: relative rms change", [v for _, v in outputs])
        more += " The change of the outputs comes from all sites of an event together and has no bound of its own."
    return Drawn(fig, f"Points over steps. {'; '.join(said)}.", more)


def _certificate_panel(ax: Axes, attempts: Sequence[Record], kind: str) -> str:
    """Draw one kind of certificate with its measurements; return it in words."""
    found = [(e, c) for e in attempts for c in certificates(e) if c.get("kind") == kind and not says_nothing(c)]
    pairs = [(step_of(e), float(c["value"]), measured(e, c)) for e, c in found]
    dots = [(s, b, v) for s, b, v in pairs if v is not None]
    for step, bound, value in dots:
        ax.plot([step, step], [value, bound], color=MUTED, linewidth=0.8, zorder=1)
    if pairs:
        ax.plot([s for s, _, _ in pairs], [b for _, b, _ in pairs], label="certified", **CERTIFIED)
    margins = measured_points(attempts, "margin_share") if kind == "accuracy" else []
    if margins:
        ax.plot([s for s, _ in margins], [v for _, v in margins], label="by margins", **MARGINS)
    if dots:
        ax.plot([s for s, _, _ in dots], [v for _, _, v in dots], label="measured", **MEASURED)
    _finish_panel(ax, CERTIFICATE_WORDS[kind], [*(v for d in dots for v in d[1:]), *(b for _, b, _ in pairs),
                                               *(v for _, v in margins)])  # fmt: skip
    held = sum(v <= b for _, b, v in dots)
    return f"{kind}: {len(pairs)} certified, {len(dots)} measured, {held} of these at or below their bound"


def _left_out(attempts: Sequence[Record]) -> str:
    """Say which bounds are not drawn, and why."""
    found = Counter(str(c.get("kind")) for e in attempts for c in certificates(e) if says_nothing(c))
    reasons = [f"{number} of kind {kind.replace('_', ' ')} ({NOTHING_SAID[kind]})" for kind, number in found.items()]
    return f" Left out are bounds that say nothing: {'; '.join(reasons)}." if reasons else ""


def _finish_panel(ax: Axes, title: str, values: Sequence[float]) -> None:
    _scale(ax, values)
    ax.set(title=title, xlabel="step", xlim=(0, None))


@plot("time", "Time saved", "Cumulative training seconds at the end of each epoch; the gap is the time saved so far.")
def _time(run: RunData) -> Drawn | str:
    pairs = [(run.curve(DENSE, s), run.curve(APOPTOSIS, s), s) for s in run.seeds]
    both = [
        (d, a, s)
        for d, a, s in pairs
        if d and a and d.points("epoch", "seconds")[0] and a.points("epoch", "seconds")[0]
    ]
    if not both:
        why = "This run has no paired run without apoptosis, so the time saved is not known."
        return why if run.curves else "The log has no epoch yet."
    fig, (ax,) = _axes(1)
    said = []
    for dense, apo, seed in both:
        for curve in (dense, apo):
            x, y = curve.points("epoch", "seconds")
            look = LOOKS[curve.method] | {"markersize": 4}
            ax.plot([0.0, *x], [0.0, *y], label=_once(ax, _name(curve.method)), **look)
        if len(both) == 1:
            x, low, high = _shared(apo, dense)
            ax.fill_between([0.0, *x], [0.0, *low], [0.0, *high], color=APOPTOSIS_COLOUR, alpha=0.12, linewidth=0)
        d, a = dense.last("seconds") or 0.0, apo.last("seconds") or 0.0
        said.append(f"seed {seed}: {short_number(d)} s without, {short_number(a)} s with apoptosis")
        if len(both) == 1 and d > a:
            ax.set_title(f"{short_number(d - a)} s saved")
    ax.set(xlabel="epoch", ylabel="training seconds", ylim=(0, None), xlim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return Drawn(fig, f"Line plot of cumulative seconds by epoch. {'; '.join(said)}.")


def _shared(apo: Curve, dense: Curve) -> tuple[list[float], list[float], list[float]]:
    """Epochs that both have, with the seconds of both."""
    low, high = (dict(zip(*c.points("epoch", "seconds"), strict=True)) for c in (apo, dense))
    x = sorted(low.keys() & high.keys())
    return x, [low[e] for e in x], [high[e] for e in x]


def _scale(ax: Axes, values: Iterable[float]) -> None:
    """From 0, linear; logarithmic above the smallest positive value where two decades would hide the small ones."""
    positive = [v for v in values if v > 0]
    if positive and max(positive) > 100 * min(positive):
        ax.set_yscale("symlog", linthresh=min(positive))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short_number(v)))
    ax.set_ylim(0, None)


def _has(run: RunData, column: str) -> bool:
    return any(c.points("seconds", column)[0] for c in run.curves)


def _lines(run: RunData) -> list[tuple[str, int]]:
    return [(c, s) for c in (DENSE, APOPTOSIS) for s in run.seeds if run.curve(c, s)]


def _name(method: str) -> str:
    return "with apoptosis" if method == APOPTOSIS else "without"


def _once(ax: Axes, label: str) -> str:
    """Return the label, the first time; seeds after the first share it."""
    taken = {line.get_label() for line in ax.get_lines()}
    return f"_{label}" if label in taken else label
