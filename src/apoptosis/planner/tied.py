"""Groups of which an event keeps the same share: one number of the model is the width of a row of all of them.

Holds: which groups these are, and the numbers kept that suit all of them. Elsewhere: how many go
(plan.py), who finds out that groups are of one width (graph).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import gcd, lcm

from apoptosis.criteria import GroupView
from apoptosis.criteria.constraints import step_between
from apoptosis.records import Group


def alike(groups: Sequence[Group]) -> list[list[Group]]:
    """Put groups together of which an event keeps the same share; most are alone."""
    left, found = list(groups), []
    while left:
        names, size = {left[0].name}, 0
        while len(names) > size:
            size = len(names)
            for group in left:
                if group.name in names or names & set(group.tied_groups):
                    names |= {group.name, *group.tied_groups}
        found.append([group for group in left if group.name in names])
        left = [group for group in left if group.name not in names]
    return found


def with_equals(names: Iterable[str], groups: Sequence[Group]) -> set[str]:
    """Return names with those of all groups that an event cannot change without one of them."""
    found, size = set(names), -1
    while len(found) > size:
        size = len(found)
        found |= {group.name for group in groups if found & set(group.tied_groups)}
        found |= {name for group in groups if group.name in found for name in group.tied_groups}
    return found


def missing(groups: Sequence[Group]) -> list[str]:
    """Return the names that these groups have to go along with but that are not among them."""
    names = {group.name for group in groups}
    return sorted({name for group in groups for name in group.tied_groups} - names)


def share_of_row(group: Group, kept: int) -> float:
    """Return the share of a row that stays: the channels kept, and those of others that stand beside them."""
    return (kept + group.num_static) / (group.num_channels + group.num_static)


def own_share(group: Group, share: float) -> float:
    """Return the share of a group's own channels that has to stay for this share of its rows."""
    return max(0.0, share * (group.num_channels + group.num_static) - group.num_static) / group.num_channels


def positions_per_channel(group: Group) -> int:
    """Return the number of positions that every channel owns at least along each axis: a head's are many."""
    counts = [m.positions.shape[1] for m in group.members if m.role == "producer"]
    counts += [site.columns.shape[1] for site in group.sites if site.kind != "product"]
    return gcd(*counts) if counts else 1


def steps(groups: Sequence[Group], views: Sequence[GroupView | Group], align: int) -> list[int]:
    """Return for every group the step between numbers kept, so that the same share of all of them can be kept.

    Widths are multiples of `align` in positions of the tensors, of the rows, and of what the other groups need; where
    that leaves no step below all channels, align gives way to its largest divisor that does.
    """
    channels = [group.num_channels + group.num_static for group in groups]
    parts = gcd(*channels)  # a share of all of them is a number of parts
    found = parts
    for divisor in (d for d in range(align, 0, -1) if align % d == 0):
        own = [
            step_between(view, divisor // gcd(divisor, positions_per_channel(group)))
            for group, view in zip(groups, views, strict=True)
        ]
        found = lcm(*(step // gcd(step, num // parts) for step, num in zip(own, channels, strict=True)))
        if found < parts or len(groups) == 1:
            break
    return [found * num // parts for num in channels]
