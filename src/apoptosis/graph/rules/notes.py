"""What operators show about the layout of channels: counts of places, and axes that are split into rows or parts.

Holds: taking such numbers and grids down while a pass runs. Elsewhere: what follows from them once
channels are known (groups.counts, groups.grids).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from apoptosis.graph.explain import Code
from apoptosis.graph.trace.result import Grid
from apoptosis.graph.trace.tracer import Call
from apoptosis.graph.trace.values import blocks, varying
from apoptosis.records import IntArray

_LARGE = 1 << 18  # ids of more elements are not kept


def note_count(call: Call, ids: IntArray, dim: int, number: int) -> None:
    """Note that an operator was given `number` as the number of the first places along `dim`."""
    tracer = call.tracer
    if tracer.watched or dim not in varying(ids) or not 0 < number <= ids.shape[dim] or ids.size > _LARGE:
        return
    channel_ids = np.moveaxis(ids, dim, 0)[:number].reshape(number, -1)
    if tracer.trace.channel_ids.is_fresh(channel_ids):
        return
    tracer.trace.counts.setdefault((tracer.running, tracer.where(), number, channel_ids.tobytes()), channel_ids)


def note_axes(call: Call, ids: IntArray, sizes: Sequence[int]) -> None:
    """Note the sizes that a view was given for its axes with channels; what torch works out itself (-1) is none."""
    for dim, size in enumerate(sizes if len(sizes) == ids.ndim else ()):
        if isinstance(size, int) and size == ids.shape[dim]:
            note_count(call, ids, dim, size)


_MANY = 256  # grids beyond this number at one operator are not distinguished


def note_split(call: Call, old_ids: IntArray, old: Sequence[int], ids: IntArray, new: Sequence[int]) -> None:
    """Record the grids that a reshape from shape `old` to shape `new` makes of axes with channels."""
    for before, after in blocks(old, new) if 0 not in old else ():
        parts = [new[k] for k in after]
        if sum(old_ids.shape[k] > 1 for k in before) == 1 and len(parts) > 1 and not _packed(call, parts):
            note_grid(call, ids, after)


def _packed(call: Call, parts: Sequence[int]) -> bool:
    """Whether nn.MultiheadAttention splits its packed projection here: with narrower heads it does not any more."""
    module = call.tracer.module
    return isinstance(module, nn.MultiheadAttention) and list(parts) in ([2, module.embed_dim], [3, module.embed_dim])


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
        call.pin(ids, Code.SPLIT_IN_MANY_ORDERS)
        return
    trace, where = call.trace, call.tracer.where()
    for grid in _distinct(grids):
        if bool((grid == 0).any()):
            call.pin(grid, Code.SPLIT_WITH_NONE)
            continue
        distinct = _distinct(grid)
        known = (f"{call.tracer.module_name}:{len(distinct)}", distinct.tobytes())
        if known not in trace.grid_keys:
            trace.grid_keys.add(known)
            trace.grids.append(Grid(call.tracer.module_name, distinct, where))


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
