"""Numbers of places along axes of channels that operators are given, and plain numbers of modules that hold them.

Holds: noticing such numbers (sizes of views, ends of slices, sizes of parts), and which groups one number of a module
is the width of. Elsewhere: which numbers of a module follow (surgery/rehearsal), writing them (surgery).

An operator is given an int, which may come from a shape, from an attribute or from a literal; a pass does not show
which. A number that comes from a shape follows by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from apoptosis.graph.explain import Code
from apoptosis.graph.groups.classes import Classes
from apoptosis.graph.groups.couplings import Coupling, coupled, tensors
from apoptosis.graph.trace.result import TraceResult
from apoptosis.records import Count, Follow, Structure


def counts(trace: TraceResult, classes: Classes) -> tuple[Count, ...]:
    """Return the numbers that were noted, with the classes at the places that they count."""
    return tuple(
        Count(modules=modules, number=number, classes=classes.labels[ids], where=where)
        for (modules, where, number, _), ids in trace.counts.items()
    )


def with_follows(structure: Structure, follows: Iterable[Follow], values: Mapping[Follow, int]) -> Structure:
    """Return the structure with numbers that follow; groups whose widths are one number shrink alike, or not at all.

    values: what each of the numbers is now.
    """
    follows = tuple(follows)
    if not follows:
        return structure
    names, known = _names(structure), {group.name for group in structure.groups}
    couplings = []
    for follow in follows:
        held = {_held(count, names) for count in structure.counts if count.is_of(follow, values[follow])}
        held |= {frozenset((name,)) for name in follow.groups if name in known}
        if len(held) > 1:
            holder = f"'{follow.module}'" if follow.module else "the model"
            fields = {"attribute": follow.attribute, "holder": holder}
            couplings.append(Coupling(frozenset().union(*held), Code.SHARED_NUMBER, fields))
    return replace(structure, groups=coupled(structure.groups, couplings), follows=follows)


def groups_of(structure: Structure, count: Count) -> frozenset[str]:
    """Return the names of the groups whose channels a number counts."""
    return _held(count, _names(structure))


def _held(count: Count, names: Mapping[int, str]) -> frozenset[str]:
    return frozenset(names[label] for label in np.unique(count.classes).tolist() if label in names)


def _names(structure: Structure) -> dict[int, str]:
    return tensors(structure.groups, structure.classes)[0]
