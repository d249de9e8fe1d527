"""Numbers of places along axes of channels that operators are given, and plain numbers of modules that hold them.

Holds: noticing such numbers (sizes of views, ends of slices, sizes of parts), what they become when channels go,
and which groups one number of a module is the width of. Elsewhere: which numbers of a module follow
(rehearsal), writing them (surgery).

An operator is handed an int, which may come from a shape, from an attribute or from a literal; a pass does not show
which. A number that comes from a shape follows by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from apoptosis.graph.explain import Code
from apoptosis.graph.groups.classes import Classes
from apoptosis.graph.trace.findings import TraceResult
from apoptosis.records import Count, Follow, Group, Pin, Structure


def counts(findings: TraceResult, classes: Classes) -> tuple[Count, ...]:
    """Return the numbers that were noted, with the classes at the places that they count."""
    return tuple(
        Count(modules=modules, number=number, classes=classes.labels[slots], where=where)
        for (modules, where, number, _), slots in findings.counts.items()
    )


def with_follows(structure: Structure, follows: Iterable[Follow], values: Mapping[Follow, int]) -> Structure:
    """Return the structure with numbers that follow; groups whose widths are one number shrink alike, or not at all.

    values: what each of the numbers is now.
    """
    follows = tuple(follows)
    if not follows:
        return structure
    names = _names(structure)
    together: dict[str, set[str]] = {g.name: {g.name, *g.tied_groups} for g in structure.groups}
    pins = {g.name: g.pin for g in structure.groups if g.pin is not None}
    for follow in follows:
        held = [_held(count, names) for count in structure.counts if count.is_of(follow, values[follow])]
        held += [frozenset((name,)) for name in follow.groups if name in together]
        if len(set(held)) < 2:
            continue
        every = frozenset[str]().union(*held)
        _pin_all(every, follow, pins, together)
        united = set[str]().union(*(together[name] for name in every))
        together.update(dict.fromkeys(united, united))
    groups = tuple(
        replace(g, pin=_own(pins.get(g.name), g), tied_groups=tuple(sorted(together[g.name] - {g.name})))
        for g in structure.groups
    )
    return replace(structure, groups=groups, follows=follows)


def _own(pin: Pin | None, group: Group) -> Pin | None:
    return None if pin is None else replace(pin, group=group.name, num_channels=group.num_channels)


def _pin_all(names: frozenset[str], follow: Follow, pins: dict[str, Pin], groups: Iterable[str]) -> None:
    pinned = next((name for name in groups if name in names and name in pins), None)
    if pinned is None:
        return
    why = pins[pinned]
    holder = f"'{follow.module}'" if follow.module else "the model"
    reason = Code.SHARED_NUMBER(attribute=follow.attribute, holder=holder, other=pinned, cause=why.reason)
    for name in names - pins.keys():
        pins[name] = replace(why, reason=reason.text, code=reason.code.code)


def _held(count: Count, names: Mapping[int, str]) -> frozenset[str]:
    return frozenset(names[label] for label in np.unique(count.classes).tolist() if label in names)


def _names(structure: Structure) -> dict[int, str]:
    """Return the group of every channel class; whole heads own channels of others and are left out."""
    found: dict[int, str] = {}
    for group in structure.groups:
        for member in group.members:
            classes = structure.classes[member.tensor][member.dim][member.positions]
            if bool((classes == classes[:, :1]).all()):
                found.update(dict.fromkeys(classes[:, 0].tolist(), group.name))
    return found


def groups_of(structure: Structure, count: Count) -> frozenset[str]:
    """Return the names of the groups whose channels a number counts."""
    return _held(count, _names(structure))
