"""Axes of channels that the model splits into rows, or cuts into parts, of equal length: they must stay rectangular.

Holds: what follows from such splits once channels are known: equally many per row where one group fills the rows, else
rows that are tied. Elsewhere: noticing the splits (rules/movement.py), the ids themselves (values.py).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from apoptosis.graph.explain import Code
from apoptosis.graph.groups.classes import Classes, classify, hard_pins, numbered
from apoptosis.graph.trace.result import Grid, TraceResult
from apoptosis.records import IntArray, Split


def classify_rectangular(trace: TraceResult) -> tuple[Classes, dict[int, IntArray]]:
    """Classify channels so that every grid stays rectangular.

    Returns: the classes, and by group number (see `numbered`) the classes of its rows, (rows, columns), where an event
    has to keep equally many of each row.
    """
    while True:
        classes = classify(trace)
        group, _ = numbered(trace, classes)
        sizes = np.bincount(group[group >= 0]) if bool((group >= 0).any()) else np.zeros(0, dtype=np.int64)
        rows: dict[int, IntArray] = {}
        hard = hard_pins(trace, classes)
        results = [_rectangular(trace, grid, classes, (group, sizes, hard), rows) for grid in trace.grids]
        if all(results):
            return classes, rows


def _rectangular(
    trace: TraceResult,
    grid: Grid,
    classes: Classes,
    known_of: tuple[IntArray, IntArray, npt.NDArray[np.bool_]],
    rows: dict[int, IntArray],
) -> bool:
    """Whether the grid stays rectangular as things are; else a tie or a pin is added that makes it so.

    known_of: the group of every class, the size of every group, and which classes are pinned for whole heads, too.
    """
    group, sizes, hard = known_of
    labels = classes.labels[grid.ids]
    pinned = classes.first_pin[labels] >= 0
    if bool(pinned.all()):
        return True
    labels = labels[np.sort(np.unique(labels, axis=0, return_index=True)[1])]
    if len(labels) == 1 or bool((labels == labels[:, :1]).all()):  # one row, or rows that are removed as a whole
        return True
    if bool(pinned.any()):  # rows that can be removed as a whole do not change the width of the others
        whole = not bool(hard[classes.labels[grid.ids[pinned]]].any())
        trace.pin(grid.ids[~pinned], Code.SPLIT_WITH_PINNED(where=grid.where), inner=whole)
        return False
    number = int(group[labels[0, 0]])
    alone = number >= 0 and bool((group[labels] == number).all()) and labels.size == sizes[number]
    if alone and np.unique(labels).size == labels.size:
        known = rows.setdefault(number, labels)
        if known.shape == labels.shape and np.array_equal(np.sort(known, 1), np.sort(labels, 1)):
            return True
        if len(known) % len(labels) == 0 and _coarser(known, labels):
            return True  # equally many of every finer row is equally many of every coarser one
    trace.ties.append((grid.ids[1:].reshape(-1), np.broadcast_to(grid.ids[:1], grid.ids[1:].shape).reshape(-1)))
    return False


def _coarser(fine: IntArray, coarse: IntArray) -> bool:
    """Whether every row of `fine` lies within one row of `coarse`."""
    row_of = {int(label): index for index, row in enumerate(coarse) for label in row}
    return all(len({row_of.get(int(label), -1) for label in row}) == 1 for row in fine)


def splits(trace: TraceResult, classes: Classes, *, rigid: bool = False) -> tuple[Split, ...]:
    """Return every split that may change, with the classes at its places; rigid: those that never change instead."""
    out = []
    for grid in trace.grids:
        labels = classes.labels[grid.ids]
        if bool((classes.first_pin[labels] >= 0).all()) == rigid:
            out.append(Split(module=grid.module, classes=labels, where=grid.where))
    return tuple(out)
