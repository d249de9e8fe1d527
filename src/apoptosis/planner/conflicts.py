"""Groups that exclude one another, and the sets of them that one event may change.

Holds: choices between alternatives (whole heads, or the channels inside them), readers of a site.
Elsewhere: which choice is best (plan.py), which groups exclude one another (graph).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from apoptosis.records import Group


def entangled(groups: Sequence[Group]) -> list[list[Group]]:
    """Put groups together that exclude one another or go along, directly or through others; in order of the first."""
    left, found = list(groups), []
    while left:
        parts, size = [left[0]], 0
        while len(parts) > size:
            size = len(parts)
            names = {group.name for group in parts}
            parts = [g for g in left if g.name in names or any(_linked(g, part) for part in parts)]
        found.append(parts)
        left = [group for group in left if group not in parts]
    return found


def _exclude(a: Group, b: Group) -> bool:
    return b.name in a.conflicts_with or a.name in b.conflicts_with


def _linked(a: Group, b: Group) -> bool:
    return _exclude(a, b) or b.name in a.tied_groups or a.name in b.tied_groups


def compatible_sets(groups: Sequence[Group]) -> list[list[Group]]:
    """Return the sets of groups of which none excludes another and to which none could be added.

    Example:
        >>> make = lambda name, *others: Group(name=name, num_channels=2, members=(), sites=(), conflicts_with=others)
        >>> sets = compatible_sets([make("qk", "heads"), make("v", "heads"), make("heads", "qk", "v")])
        >>> [[group.name for group in chosen] for chosen in sets]
        [['qk', 'v'], ['heads']]
    """
    found: list[list[Group]] = []
    for first in groups:
        chosen = [
            first,
            *(g for g in groups if g is not first and g.name in first.tied_groups and not _exclude(first, g)),
        ]
        for other in groups:
            if other not in chosen and not any(_exclude(other, one) for one in chosen):
                chosen.append(other)
        chosen = [group for group in groups if group in chosen]
        if chosen not in found:
            found.append(chosen)
    return found


def most_readers(sets: Sequence[Sequence[Group]]) -> Counter[str]:
    """Return how many groups of one choice read a site at most, by site key."""
    most: Counter[str] = Counter()
    for groups in sets:
        most |= Counter(site.key for group in groups for site in group.sites)
    return most
