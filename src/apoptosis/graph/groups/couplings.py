"""Groups that depend on one another: those that keep the same share of their channels, and those that overlap.

Holds: the solver (`coupled`), which group owns a channel, which groups overlap. Elsewhere: what couples groups
(shared_widths.py, counts.py), how an event keeps to it (planner/couplings.py).

A coupling is a set of groups whose widths are one number of the model. Pins spread inside of couplings until nothing
changes; the connected components of what is left open are `Group.tied_groups`.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from apoptosis.graph.explain import Code
from apoptosis.records import Group, IntArray

Labels = Mapping[str, tuple[IntArray, ...]]
"""For every parameter and buffer, per dim, the channel class at each position (Structure.classes)."""


@dataclass(frozen=True, slots=True, eq=False)
class Coupling:
    """Groups whose widths are one number.

    code, fields: why the others cannot be pruned once one is pinned, the name and cause of that one left out; None
        where a pinned one does not pin the others. ties: whether an event keeps the same share of all of them.
    """

    names: frozenset[str]
    code: Code | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    ties: bool = True


def components(sets: Iterable[Collection[Hashable]]) -> list[list[int]]:
    """Put sets together that have an element in common, directly or through others; in order of the first of each.

    Returns: the places of the sets.

    Example:
        >>> components([{"a"}, {"b"}, {"a", "c"}, {"c"}])
        [[0, 2, 3], [1]]
    """
    listed, numbers = list(sets), dict[Hashable, int]()
    pairs = [(place, numbers.setdefault(item, len(numbers))) for place, own in enumerate(listed) for item in own]
    rows, columns = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    size = len(listed) + len(numbers)
    graph = coo_matrix((np.ones(len(pairs), dtype=np.int8), (rows, columns + len(listed))), shape=(size, size))
    found: dict[int, list[int]] = {}
    for place, label in enumerate(connected_components(graph, directed=False)[1][: len(listed)].tolist()):
        found.setdefault(label, []).append(place)
    return list(found.values())


def coupled(groups: Sequence[Group], couplings: Iterable[Coupling]) -> tuple[Group, ...]:
    """Return the groups with what couplings make of them: pins, and the names of those that keep the same share.

    What the groups say already stays. The reason of a pin that spreads is that of the group it began at.
    """
    couplings = list(couplings)
    pins = {group.name: group.pin for group in groups if group.pin is not None}
    causes = {name: pin.reason for name, pin in pins.items()}
    widths = {group.name: group.num_channels for group in groups}
    spreading = [coupling for coupling in couplings if coupling.code is not None]
    while ready := next((c for c in spreading if c.names & pins.keys() and c.names - pins.keys()), None):
        assert ready.code is not None
        first = min(ready.names & pins.keys())
        reason = ready.code(other=first, cause=causes[first], **ready.fields)
        reason = replace(reason, where=pins[first].where, remedy=pins[first].remedy)
        for name in ready.names - pins.keys():
            spread = replace(reason.pin(name, widths[name]), cause=pins[first].cause or pins[first].code)
            pins[name], causes[name] = spread, causes[first]
    sets = [{group.name, *group.tied_groups} for group in groups] + [c.names for c in couplings if c.ties]
    tied: dict[str, set[str]] = {}
    for places in components(sets):
        united = set[str]().union(*(sets[place] for place in places))
        tied.update(dict.fromkeys(united, united))
    return tuple(replace(g, pin=pins.get(g.name), tied_groups=tuple(sorted(tied[g.name] - {g.name}))) for g in groups)


def tensors(groups: Sequence[Group], labels: Labels) -> tuple[dict[int, str], dict[int, str]]:
    """Return the group of every channel class: of single channels, and of whole heads, which own those of others."""
    single: dict[int, str] = {}
    heads: dict[int, str] = {}
    for group in groups:
        for member in group.members:
            found = labels[member.tensor][member.dim][member.positions]
            whole = bool((found != found[:, :1]).any())
            (heads if whole else single).update(dict.fromkeys(found.reshape(-1).tolist(), group.name))
    return single, heads


def with_conflicts(groups: Sequence[Group], heads: Sequence[Group]) -> tuple[Group, ...]:
    """Return all groups, those of whole heads last, with the names of the groups that they share channels with."""
    found: dict[str, list[str]] = {}
    fine = [(group, _positions(group)) for group in groups if group.pin is None] if heads else []
    for head in heads:
        taken = _positions(head)
        for group, positions in fine:
            if any(axis in taken and not taken[axis].isdisjoint(own) for axis, own in positions.items()):
                found.setdefault(head.name, []).append(group.name)
                found.setdefault(group.name, []).append(head.name)
    every = (*groups, *heads)
    return tuple(replace(g, conflicts_with=tuple(found[g.name])) if g.name in found else g for g in every)


def _positions(group: Group) -> dict[tuple[str, int], set[int]]:
    found = {(m.tensor, m.dim): set(m.positions.reshape(-1).tolist()) for m in group.members}
    for site in group.sites:
        found.setdefault((site.weight, site.dim), set()).update(site.columns.reshape(-1).tolist())
    return found
