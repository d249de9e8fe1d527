"""From figures to what the page and the folder of plots hold: SVG panels, their legend as a list, one PNG.

Holds: rendering. Elsewhere: what is drawn (figures.py), markup (templates).

On a page every panel is a picture of its own, so that a phone shows them below each other, and the legend is text
beside them, which wraps where the window is narrow. The PNG has all panels in a row, each with its legend.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from apoptosis.tools.report.theme import VARIABLES

PNG_DPI = 144
WIDE = 9.6  # inches of a PNG of one panel


class Entry(NamedTuple):
    """A line of a legend: its name, and an SVG of how it is drawn."""

    label: str
    swatch: str


def rendered(figures: Sequence[Figure], key: str) -> tuple[bytes, tuple[str, ...], tuple[Entry, ...]]:
    """Return a plot as PNG bytes, as inline SVGs and as the legend of these.

    Args: figures: one for every panel, of one height. key: of the plot, which ids of the page begin with.
    """
    svgs: list[str] = []
    entries: dict[str, Entry] = {}
    for number, fig in enumerate(figures):
        FigureCanvasAgg(fig)
        for entry in _entries(fig):
            entries.setdefault(entry.label, entry)
        svg = io.StringIO()
        fig.savefig(svg, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        svgs.append(inline(svg.getvalue(), f"{key}-{number}"))
    return _png(figures), tuple(svgs), tuple(entries.values())


def _without_legend(fig: Figure) -> list[Axes]:
    return [ax for ax in fig.axes if ax.get_legend() is None and ax.get_legend_handles_labels()[1]]


def _entries(fig: Figure) -> list[Entry]:
    found = []
    for ax in _without_legend(fig):
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.append(Entry(label.strip(), _swatch(handle)))
    return found


def _swatch(line: Any) -> str:
    """Return how a line is drawn, 30 by 12 pixels; of what is no line only that it is there."""
    if not isinstance(line, Line2D):
        return '<svg viewBox="0 0 30 12" width="30" height="12" aria-hidden="true"><path d="M1 2H29V10H1Z"/></svg>'
    colour, width = _themed(str(line.get_color())), min(2.0, line.get_linewidth())
    dashes = {"--": "7 4", "-.": "8 3 2 3", ":": "2 3"}.get(str(line.get_linestyle()), "")
    parts = []
    if line.get_linestyle() not in ("", " ", "None", "none"):
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        parts.append(f'<path d="M1 6H29" stroke="{colour}" stroke-width="{width}"{dashed}/>')
    fill = "none" if line.get_markerfacecolor() == "none" else colour
    shape = {
        "o": '<circle cx="15" cy="6" r="3.5"',
        "s": '<rect x="11.5" y="2.5" width="7" height="7"',
        "v": '<path d="M11 2.5H19L15 10Z"',
        "x": '<path d="M11.5 2.5L18.5 9.5M18.5 2.5L11.5 9.5"',
    }.get(str(line.get_marker()))
    parts += [f'{shape} fill="{fill}" stroke="{colour}" stroke-width="1.5"/>'] if shape else []
    return f'<svg viewBox="0 0 30 12" width="30" height="12" fill="none" aria-hidden="true">{"".join(parts)}</svg>'


def _png(figures: Sequence[Figure]) -> bytes:
    """Return all panels in a row, each with a legend."""
    panels: list[Any] = []
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncols": 3, "columnspacing": 1.0}
    for fig in figures:
        if drawn := _without_legend(fig):
            if len(figures) == 1:  # names of groups may be long
                fig.set_figwidth(WIDE)
                below = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
            for ax in drawn:
                ax.legend(**below)
        fig.set(facecolor="white", dpi=PNG_DPI)
        canvas: Any = FigureCanvasAgg(fig)
        canvas.draw()
        panels.append(np.asarray(canvas.buffer_rgba())[..., :3])
    whole = io.BytesIO()
    height = max(panel.shape[0] for panel in panels)
    padded = [np.pad(p, ((0, height - p.shape[0]), (0, 0), (0, 0)), constant_values=255) for p in panels]
    image.imsave(whole, np.concatenate(padded, axis=1), format="png", dpi=PNG_DPI)
    return whole.getvalue()


def inline(svg: str, key: str) -> str:
    """Make a standalone SVG fit for the page: ids of its own, colours from the style sheet, no outside references."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"|(<svg[^>]*?)\sheight="[^"]*"', r"\1\2", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', svg)
    svg = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{key}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", svg)
    return _themed(svg).replace("<svg", '<svg aria-hidden="true"', 1).strip()  # what stands around it has its words


def _themed(text: str) -> str:
    for colour, (name, _, _) in VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return text
