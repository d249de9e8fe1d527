"""Which output pins channels that are not themselves put out, and what ties them to it.

Holds: the way from a network's output through sums and other meetings of channels, or through a weight that serves
twice, to the layer that a group is named after. Elsewhere: noticing the meetings (rules/broadcast.py), what is
pinned.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import replace

import numpy as np

from apoptosis.graph.explain import Code, Reason
from apoptosis.graph.trace.findings import TraceResult
from apoptosis.graph.trace.values import Axis
from apoptosis.records import IntArray


def through(findings: TraceResult, pin: int, axes: Iterable[Axis]) -> Reason:
    """Return the reason of a pin, with what ties channels to the output that pins them.

    Args:
        findings: of all captures.
        pin: its place in `findings.pins`.
        axes: on which the channels lie.
    """
    slots, reason = findings.pins[pin]
    own = set(axes)
    base = next((axis for axis in findings.producers if axis in own), None)
    if base is None or reason.code not in (Code.OUTPUT, Code.RETURNED_PARAMETER):
        return reason
    begin, made = _axes(findings, slots) & own, findings.made.get(pin, frozenset())
    if base in begin and len(made & own) < 2:
        return replace(reason, text=reason.text + _twice(findings, base))
    way = _last(findings, made & own, base) if base in begin else _way(findings, begin, base)
    if not way:
        return reason
    text, where = findings.joins[way[0]][2:]
    place = f" ({where})" if where and len(way) > 1 else ""
    more = f", and by {len(way) - 1} more like it" if len(way) > 1 else ""
    return replace(reason, text=f"{reason.text}, tied to it by {text}{place}{more}", where=reason.where or where)


def _axes(findings: TraceResult, slots: IntArray) -> set[Axis]:
    return {(name, dim) for name, dim, _ in findings.slots.axes_of(np.unique(slots))}


def _twice(findings: TraceResult, axis: Axis) -> str:
    """Say which weight an output is made with that another layer reads too."""
    readers = sorted({reader.lstrip("@") for reader in findings.reads[axis[0]]} - {"operator"})
    if len(readers) < 2:
        return ""
    return f", made with '{axis[0]}', which serves " + " and ".join(
        f"'{reader}'" if reader else "the model itself" for reader in readers
    )


def _last(findings: TraceResult, made: Set[Axis], axis: Axis) -> list[int]:
    """Return the last meeting of an axis with another one that an output is made of, in a list."""
    found = [
        number
        for number, (a, b, *_) in enumerate(findings.joins)
        if axis in (both := _axes(findings, np.concatenate([a, b]))) and len(both) > 1 and both <= made
    ]
    return found[-1:]


def _way(findings: TraceResult, begin: set[Axis], end: Axis) -> list[int]:
    """Return the meetings that lead from some axes to one, the first of them first; [] where none do."""
    sides = [(_axes(findings, a), _axes(findings, b)) for a, b, *_ in findings.joins]
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
