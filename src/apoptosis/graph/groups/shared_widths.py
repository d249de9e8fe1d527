"""What couples groups: one number of a module as the width of several rows, one tensor, one recurrence.

Holds: finding the couplings, and the groups that fill a part of such rows. Elsewhere: noticing the splits (grids.py)
and the tensors (rules/broadcast.py), what follows from a coupling (couplings.py), numbers found by trying (counts.py).

A module that splits queries, keys and values by one plain number of its own (`head_dim`) can only run when all of them
have as many channels per row; where the width of a row is left to torch (-1), they are independent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
from torch import nn

from apoptosis.graph.explain import Code
from apoptosis.graph.groups.classes import Classes
from apoptosis.graph.groups.couplings import Coupling, Labels, coupled, tensors
from apoptosis.graph.groups.grids import splits
from apoptosis.graph.trace.result import TraceResult
from apoptosis.records import Group, Split

Row = dict[str, Fraction]
"""What share of the places of a row each group fills."""

_SIZES = ("dim", "size", "width", "d_k", "d_v", "d_q", "d_head", "dk", "dv")


def with_shared_widths(
    model: nn.Module, trace: TraceResult, groups: Sequence[Group], classes: Classes, labels: Labels
) -> tuple[Group, ...]:
    """Return the groups with what shared widths make of them: pins, Group.tied_groups and Group.num_static.

    Args:
        model: as captured.
        trace: of all captures.
        groups: as found.
        classes: which channels are one.
        labels: class of every position, by tensor and dim.
    """
    modules, (single, heads) = dict(model.named_modules()), tensors(groups, labels)
    found = splits(trace, classes)
    governed = _governed(found, modules, single)
    every = _governed([*found, *splits(trace, classes, rigid=True)], modules, single)
    num_static, partial = _mixed(governed.values(), {group.name: group.num_channels for group in groups})
    couplings = [
        *_recurrent(groups, modules),
        *_by_size(every, modules),
        *_tensors(trace, classes, single, heads),
        *(
            Coupling(frozenset().union(*rows) - partial)
            for rows in governed.values()
            if any(row != rows[0] for row in rows)
        ),
    ]
    pins = {g.name: Code.PART_OF_WIDTH().pin(g.name, g.num_channels) for g in groups if g.name in partial}
    return tuple(
        replace(g, num_static=num_static.get(g.name, 0), pin=g.pin or pins.get(g.name))
        for g in coupled(groups, couplings)
    )


def _governed(
    found: Iterable[Split], modules: Mapping[str, nn.Module], names: Mapping[int, str]
) -> dict[tuple[str, str, int], list[Row]]:
    """Return what fills the rows of the splits that one number of a module governs, by module and number."""
    rows_of: dict[tuple[str, str, int], list[Row]] = {}
    for split in found:
        module = modules.get(split.module)
        if module is None or isinstance(module, nn.MultiheadAttention):  # whose widths follow each on their own
            continue
        numbers = {value for value in vars(module).values() if type(value) is int}
        rows, columns = split.classes.shape
        for kind, number in (("columns", columns), ("total", rows * columns)):
            if number in numbers and rows > 1:
                counts = Counter(names[label] for label in split.classes.reshape(-1).tolist() if label in names)
                row = {name: Fraction(count, split.classes.size) for name, count in counts.items()}
                if row:
                    rows_of.setdefault((split.module, kind, number), []).append(row)
    return rows_of


def _by_size(
    governed: Mapping[tuple[str, str, int], Sequence[Row]], modules: Mapping[str, nn.Module]
) -> Iterator[Coupling]:
    """Yield the groups whose rows have a module's own size of a head: a pinned one pins the others."""
    for (module, kind, number), rows in governed.items():
        sizes = [name for name, value in vars(modules[module]).items() if type(value) is int and value == number]
        if kind == "columns" and any(_is_size(name) for name in sizes):
            place = f"in the rows of '{module}'" if module else "in rows of the model"
            yield Coupling(frozenset().union(*rows), Code.SHARED_WIDTH, {"place": place}, ties=False)


def _is_size(attribute: str) -> bool:
    """Whether the name of an attribute speaks of a size, not of how many there are (num_heads, n_head).

    Example:
        >>> _is_size("head_dim"), _is_size("attention_head_size"), _is_size("num_heads")
        (True, True, False)
    """
    return not attribute.startswith(("num", "n_")) and any(part in attribute for part in _SIZES)


def _tensors(
    trace: TraceResult, classes: Classes, single: Mapping[int, str], heads: Mapping[int, str]
) -> Iterator[Coupling]:
    """Yield the groups whose channels meet one tensor with a place for each: zeros as wide as the heads of all layers.

    The elements of such a tensor are all the same along the axis: it matters how many there are, but not which.
    """
    inside: dict[int, int] = {}
    for outer, inner, _ in (*trace.parts, *trace.heads):
        inside.update(zip(outer.tolist(), classes.labels[inner].tolist(), strict=True))
    for ids in trace.size_constraints.values():
        channel_ids = np.unique(np.concatenate(ids)).tolist() if len(ids) > 1 else ()
        met = {heads.get(inside[s]) if s in inside else single.get(int(classes.labels[s])) for s in channel_ids}
        names = frozenset(name for name in met if name is not None)
        if len(names) > 1:
            yield Coupling(names, Code.SHARED_WIDTH, {"place": "in one tensor"})


def _recurrent(groups: Sequence[Group], modules: Mapping[str, nn.Module]) -> list[Coupling]:
    """Return the groups of all layers and directions of a recurrence, which share one hidden (and projected) width."""
    found: dict[tuple[str, bool], set[str]] = {}
    for group in groups:
        for member in group.members:
            info, _, leaf = member.tensor.rpartition(".")
            if member.dim == 0 and isinstance(modules.get(info), nn.RNNBase) and leaf.startswith("weight_"):
                found.setdefault((info, leaf.startswith("weight_hr")), set()).add(group.name)
    place = {"place": "in one recurrence"}
    return [Coupling(frozenset(names), Code.SHARED_WIDTH, place) for names in found.values()]


def _mixed(governed: Iterable[Sequence[Row]], widths: Mapping[str, int]) -> tuple[dict[str, int], set[str]]:
    """Handle rows of one width of which some are filled by several groups, and others by other groups.

    The finest of the groups in a row is given the width that is left, and the others are not changed (a partial
    rotation: only the channels that are not rotated are removed).

    Returns: by name, the channels beside a group; the names of the groups that are not changed.
    """
    num_static: dict[str, int] = {}
    fixed: set[str] = set()
    for rows in governed:
        for row in rows if any(other != row for other in rows for row in rows) else ():
            first = max(row, key=lambda name: (widths[name] / row[name], row[name]))
            fill = widths[first] * (sum(row.values()) - row[first]) / row[first]
            if fill.denominator != 1 or num_static.setdefault(first, int(fill)) != fill:
                fixed.add(first)
            fixed |= set(row) - {first}
    return num_static, fixed
