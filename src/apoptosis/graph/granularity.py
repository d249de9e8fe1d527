"""What has to stay rectangular: axes of channels that the model splits into rows, or cuts into parts, of equal length.

Lives here: noticing such splits, and what follows from them once channels are known: equally many per row where one
group fills the rows, else rows that shrink alike. Does not live here: the ids themselves (values.py, rules_move.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import nn

from apoptosis.graph.classes import Classes, classify, hard_pins, numbered
from apoptosis.graph.findings import Findings, Grid, Reason
from apoptosis.graph.tracer import Call
from apoptosis.graph.values import varying
from apoptosis.records import IntArray, Split

_TOGETHER = "they are split into rows together with channels that are never removed"
_MIXED = "they are split into rows together with values that are no channels"
_MANY = 256  # grids beyond this number at one operator are not told apart


def note_split(call: Call, old_ids: IntArray, old: Sequence[int], ids: IntArray, new: Sequence[int]) -> None:
    """Record the grids that a reshape from shape `old` to shape `new` makes of axes with channels."""
    i = j = 0
    while i < len(old) and j < len(new):
        i0, j0, a, b = i, j, old[i], new[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        before = [k for k in range(i0, i) if old_ids.shape[k] > 1]
        if len(before) == 1 and j - j0 > 1 and not _packed(call, new[j0:j]):
            note_grid(call, ids, range(j0, j))


def _packed(call: Call, parts: Sequence[int]) -> bool:
    """Whether torch's attention takes its packed projection apart: with narrower heads it does not any more."""
    module = call.tracer.module
    return (
        isinstance(module, nn.MultiheadAttention)
        and len(parts) == 2
        and parts[0] in (2, 3)
        and parts[1] == module.embed_dim
    )


def note_grid(call: Call, ids: IntArray, axes: Sequence[int]) -> None:
    """Record `axes` of an id array, the last of which runs along each row, as a grid that stays rectangular."""
    last = max((k for k in axes if ids.shape[k] > 1), default=-1)
    if last < 0:
        return
    rows = [k for k in axes if k < last]
    rest = [k for k in range(ids.ndim) if k not in rows and k != last]
    grids = ids.transpose(*rest, *rows, last).reshape(-1, int(np.prod([ids.shape[k] for k in rows])), ids.shape[last])
    if grids.shape[1] == 1 and len(grids) > 1:  # one row for every channel of each head: other grids tell their number
        return
    if len(grids) > _MANY:
        call.pin(ids, "splits channels that lie in many orders")
        return
    findings, where = call.tracer.findings, call.tracer.where()
    for grid in _distinct(grids):
        if bool((grid == 0).any()):
            findings.pin(grid, call.reason("splits channels together with values that are none"))
            continue
        distinct = _distinct(grid)
        known = (f"{call.tracer.module_name}:{len(distinct)}", distinct.tobytes())
        if known not in findings.grid_keys:
            findings.grid_keys.add(known)
            findings.grids.append(Grid(call.tracer.module_name, distinct, where))


def _distinct(items: IntArray) -> IntArray:
    """Return the items along the first axis without repetitions, in the order in which they come."""
    first: dict[bytes, int] = {}
    for i, item in enumerate(items):
        first.setdefault(item.tobytes(), i)
    return items if len(first) == len(items) else items[list(first.values())]


def note_parts(call: Call, ids: IntArray, dim: int, count: int) -> None:
    """Record that an axis is cut into `count` parts of equal size."""
    if dim in varying(ids) and count > 1 and ids.shape[dim] % count == 0:
        moved = np.moveaxis(ids, dim, -1)
        wide = moved.reshape(*moved.shape[:-1], count, -1)
        note_grid(call, wide, (wide.ndim - 2, wide.ndim - 1))


def settle(findings: Findings) -> tuple[Classes, dict[int, IntArray]]:
    """Classify channels so that every grid stays rectangular.

    Returns: the classes, and by group number (see `numbered`) the classes of its rows, (rows, columns), where an event
    has to keep equally many of each row.
    """
    while True:
        classes = classify(findings)
        group, _ = numbered(findings, classes)
        sizes = np.bincount(group[group >= 0]) if bool((group >= 0).any()) else np.zeros(0, dtype=np.int64)
        rows: dict[int, IntArray] = {}
        hard = hard_pins(findings, classes)
        verdicts = [_rectangular(findings, grid, classes, (group, sizes, hard), rows) for grid in findings.grids]
        if all(verdicts):
            return classes, rows


def _rectangular(
    findings: Findings,
    grid: Grid,
    classes: Classes,
    known_of: tuple[IntArray, IntArray, npt.NDArray[np.bool_]],
    rows: dict[int, IntArray],
) -> bool:
    """Whether the grid stays rectangular as things are; else a tie or a pin is added that makes it so.

    known_of: the group of every class, the size of every group, and which classes are pinned for whole heads, too.
    """
    group, sizes, hard = known_of
    labels = classes.labels[grid.slots]
    pinned = classes.first_pin[labels] >= 0
    if bool(pinned.all()):
        return True
    labels = labels[np.sort(np.unique(labels, axis=0, return_index=True)[1])]
    if len(labels) == 1 or bool((labels == labels[:, :1]).all()):  # one row; rows that go as a whole
        return True
    if bool(pinned.any()):  # rows that may go as a whole leave the others their width
        whole = not bool(hard[classes.labels[grid.slots[pinned]]].any())
        findings.pin(grid.slots[~pinned], Reason(_TOGETHER, grid.where), inner=whole)
        return False
    number = int(group[labels[0, 0]])
    alone = number >= 0 and bool((group[labels] == number).all()) and labels.size == sizes[number]
    if alone and np.unique(labels).size == labels.size:
        known = rows.setdefault(number, labels)
        if known.shape == labels.shape and np.array_equal(np.sort(known, 1), np.sort(labels, 1)):
            return True
        if len(known) % len(labels) == 0 and _coarser(known, labels):
            return True  # equally many of every finer row is equally many of every coarser one
    findings.ties.append(
        (grid.slots[1:].reshape(-1), np.broadcast_to(grid.slots[:1], grid.slots[1:].shape).reshape(-1))
    )
    return False


def _coarser(fine: IntArray, coarse: IntArray) -> bool:
    """Whether every row of `fine` lies within one row of `coarse`."""
    row_of = {int(label): index for index, row in enumerate(coarse) for label in row}
    return all(len({row_of.get(int(label), -1) for label in row}) == 1 for row in fine)


def splits(findings: Findings, classes: Classes, *, rigid: bool = False) -> tuple[Split, ...]:
    """Return every split with the classes at its places that may change; rigid: those that never change instead."""
    out = []
    for grid in findings.grids:
        labels = classes.labels[grid.slots]
        if bool((classes.first_pin[labels] >= 0).all()) == rigid:
            out.append(Split(module=grid.module, classes=labels, where=grid.where))
    return tuple(out)
