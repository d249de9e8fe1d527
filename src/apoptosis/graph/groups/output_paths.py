"""Why an output of the network pins channels that are not returned themselves.

Holds: the path from an output through sums and other operators that tie channels, or through a weight that is used
twice, to the layer that a group is named after. Elsewhere: recording the ties (rules/broadcast.py), pins.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import replace

import numpy as np

from apoptosis.graph.explain import Code, Reason
from apoptosis.graph.trace.result import TraceResult
from apoptosis.graph.trace.values import Axis
from apoptosis.records import IntArray


def through(trace: TraceResult, pin: int, axes: Iterable[Axis]) -> Reason:
    """Return the reason of a pin, with what ties the channels to the output.

    Args:
        trace: of all captures.
        pin: its place in `trace.pins`.
        axes: on which the channels lie.
    """
    ids, reason = trace.pins[pin]
    own = set(axes)
    base = next((axis for axis in trace.producers if axis in own), None)
    if base is None or reason.code not in (Code.OUTPUT, Code.RETURNED_PARAMETER):
        return reason
    begin, made = _axes(trace, ids) & own, trace.output_producers.get(pin, frozenset())
    if base in begin and len(made & own) < 2:
        return replace(reason, text=reason.text + _twice(trace, base))
    way = _last(trace, made & own, base) if base in begin else _way(trace, begin, base)
    if not way:
        return reason
    text, where = trace.joins[way[0]][2:]
    place = f" ({where})" if where and len(way) > 1 else ""
    more = f", and by {len(way) - 1} more like it" if len(way) > 1 else ""
    return replace(reason, text=f"{reason.text}, tied to it by {text}{place}{more}", where=reason.where or where)


def _axes(trace: TraceResult, ids: IntArray) -> set[Axis]:
    return {(name, dim) for name, dim, _ in trace.channel_ids.axes_of(np.unique(ids))}


def _twice(trace: TraceResult, axis: Axis) -> str:
    """Return in words which other layers read the weight that makes an output."""
    readers = sorted({reader.lstrip("@") for reader in trace.reads[axis[0]]} - {"operator"})
    if len(readers) < 2:
        return ""
    return f", made with '{axis[0]}', which serves " + " and ".join(
        f"'{reader}'" if reader else "the model itself" for reader in readers
    )


def _last(trace: TraceResult, made: Set[Axis], axis: Axis) -> list[int]:
    """Return the last tie of an axis with another one of the same output, in a list."""
    found = [
        number
        for number, (a, b, *_) in enumerate(trace.joins)
        if axis in (both := _axes(trace, np.concatenate([a, b]))) and len(both) > 1 and both <= made
    ]
    return found[-1:]


def _way(trace: TraceResult, begin: set[Axis], end: Axis) -> list[int]:
    """Return the ties that lead from some axes to one, in order; [] where none do."""
    sides = [(_axes(trace, a), _axes(trace, b)) for a, b, *_ in trace.joins]
    reached: dict[Axis, list[int]] = {axis: [] for axis in begin}
    todo = list(begin)
    for axis in todo:
        for number, (a, b) in enumerate(sides):
            for one, other in ((a, b), (b, a)):
                for found in other if axis in one else ():
                    if found not in reached:
                        reached[found] = [*reached[axis], number]
                        todo.append(found)
    return reached.get(end, [])
