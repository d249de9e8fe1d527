"""`Apoptosis.plot()`: widths and sizes over the steps of a run.

Holds: drawing into axes of matplotlib, which is imported when something is drawn. Elsewhere: the report's plots
(tools/report), what a run remembers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from apoptosis.display.text import shown_name
from apoptosis.errors import ApoptosisError, ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes  # for others, too

Sizes = tuple[Mapping[str, int], int, float]  # channels by group, parameters, MACs per example
_LABELLED = 8
_GREY = "#8a929d"
#: Okabe and Ito's colours, which people with colour-vision deficiencies can tell apart, dark enough for lines.
COLOURS = ("#0067a5", "#c2500a", "#00805f", "#a85c8e", "#7a6a00", "#2f8fc9", "#6b4fa0", "#4d4d4d")
DASHES = ("-", "--", "-.", ":")


def plot_run(
    full_widths: Mapping[str, int],
    removals: Sequence[tuple[int, Mapping[str, int], int, float]],
    now: Sizes,
    *,
    full: tuple[int, float],
    step: int,
    rolled_back: Sequence[int] = (),
    axes: Sequence[Axes] | None = None,
) -> tuple[Axes, Axes]:
    """Draw a run.

    Args:
        full_widths: channels of every group that is drawn, at full width.
        removals: what each event left: its step, the channels of the groups it changed, parameters, MACs per example.
        now: the same as they are now.
        full: parameters and MACs at full width.
        step: the last one.
        rolled_back: steps of attempts that were rolled back.
        axes: two axes, or None for a new figure.

    Raises: ApoptosisError: matplotlib is missing. ArgumentError: axes= are not two.
    """
    left, right = _pair(axes)
    for name, line in _lines(full_widths, removals, now[0], step).items():
        left.step([x for x, _ in line], [y for _, y in line], where="post", **_look(name, full_widths))
    if rolled_back:
        left.plot(rolled_back, [0.0] * len(rolled_back), "x", color=_GREY, label="rolled back", clip_on=False)
    left.set(xlabel="step", ylabel="channels", title="Widths of groups", ylim=(0, None), xlim=(0, max(step, 1)))
    steps = [0, *(at for at, *_ in removals), step]
    sizes = [full, *((parameters, macs) for *_, parameters, macs in removals), (now[1], now[2])]
    for i, (label, dash) in enumerate((("parameters", "-"), ("multiply-adds", "--"))):
        shares = [100.0 * size[i] / full[i] if full[i] else 100.0 for size in sizes]
        right.step(steps, shares, where="post", color=COLOURS[i], linestyle=dash, label=label)
    right.set(xlabel="step", ylabel="% of the network as given", title="What is left", ylim=(0, 105))
    right.set_xlim(0, max(step, 1))
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            for text in ax.legend(loc="best", fontsize="small").get_texts():
                text.set_parse_math(False)  # names of groups are names, whatever dollar signs they hold
    return left, right


def _pair(axes: Sequence[Axes] | None) -> tuple[Axes, Axes]:
    if axes is None:
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ApoptosisError(f"plot() needs matplotlib ({error}): pip install matplotlib.") from None
        figure = pyplot.figure(figsize=(10, 3.8), layout="constrained")
        made: Any = figure.subplots(1, 2)
        return made[0], made[1]
    given: list[Any] = list(axes) if hasattr(axes, "__iter__") else [axes]
    if len(given) != 2 or not all(hasattr(ax, "step") for ax in given):
        raise ArgumentError("axes= must be two axes of matplotlib, as `pyplot.subplots(1, 2)[1]` gives.")
    return given[0], given[1]


def _lines(
    full_widths: Mapping[str, int],
    removals: Sequence[tuple[int, Mapping[str, int], int, float]],
    now: Mapping[str, int],
    step: int,
) -> dict[str, list[tuple[int, int]]]:
    """Return (step, channels) by group; a width holds until the next point."""
    lines = {name: [(0, width)] for name, width in full_widths.items()}
    for at, widths, *_ in removals:
        for name, width in widths.items():
            if name in lines:
                lines[name].append((at, width))
    for name, line in lines.items():
        line.append((step, now.get(name, line[-1][1])))
    return lines


def _look(name: str, full_widths: Mapping[str, int]) -> dict[str, Any]:
    """Return how a group is drawn: the widest with a colour and a name, the others thin and grey."""
    order = sorted(full_widths, key=lambda group: -full_widths[group])[:_LABELLED]
    if name not in order:
        return {"color": _GREY, "linewidth": 0.8}
    i = order.index(name)
    return {"color": COLOURS[i], "linestyle": DASHES[i % len(DASHES)], "label": shown_name(name)}
