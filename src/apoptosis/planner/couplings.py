"""Which groups an event decides on together, on which rank, and how many of their channels can stay.

Holds: units, tasks and their assignment to ranks; the numbers kept that suit a unit. Elsewhere: what couples groups
(graph/groups), how many channels go and which set is best (proposals.py).

Three relations bind groups. *Tied* groups keep the same share of their channels, because one number of the model is
the width of all: the components of this relation are *units*. *Conflicting* groups share channels (whole heads, and
the channels inside them), and an event changes one of them: the components of both relations are *tasks*, of which one
compatible set of units is chosen. Groups that one *site* reads share its tolerance: tasks that a site connects are
planned one after the other on one rank. The components are found by `graph.groups.couplings.components` throughout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd, lcm

from apoptosis.criteria import GroupView
from apoptosis.criteria.constraints import step_between
from apoptosis.graph.groups.couplings import components
from apoptosis.records import Group, ProductSite

Unit = tuple[Group, ...]
"""Groups of which an event keeps the same share."""


@dataclass(frozen=True, slots=True)
class Task:
    """Groups that an event decides on together: it changes the units of one of these sets, and of no other.

    sets: those that hold no two conflicting groups, and to which no unit could be added.
    """

    sets: tuple[tuple[Unit, ...], ...]

    @property
    def groups(self) -> Iterator[Group]:
        """All groups, once for every set that they are in."""
        return (group for units in self.sets for unit in units for group in unit)

    @property
    def readers(self) -> Counter[str]:
        """By site key, the most groups of one set that the site reads."""
        most: Counter[str] = Counter()
        for units in self.sets:
            most |= Counter(site.key for unit in units for group in unit for site in group.sites)
        return most


def units_of(groups: Sequence[Group]) -> list[Unit]:
    """Put tied groups together; most are alone. Tied groups that conflict are alone, too: no event can change them."""
    units = [
        tuple(groups[place] for place in places) for places in components({g.name, *g.tied_groups} for g in groups)
    ]
    alone = [unit for unit in units for unit in ([(group,) for group in unit] if _conflict(unit, unit) else [unit])]
    return sorted(alone, key=lambda unit: groups.index(unit[0]))


def _conflict(one: Unit, other: Unit) -> bool:
    return any(b.name in a.conflicts_with or a.name in b.conflicts_with for a in one for b in other)


def tasks_of(groups: Sequence[Group]) -> list[Task]:
    """Return the tasks of some groups, in the order of the first group of each.

    Example:
        >>> make = lambda name, *others: Group(name=name, num_channels=2, members=(), sites=(), conflicts_with=others)
        >>> found = tasks_of([make("qk", "heads"), make("v", "heads"), make("up"), make("heads", "qk", "v")])
        >>> [[[group.name for unit in units for group in unit] for units in task.sets] for task in found]
        [[['qk', 'v'], ['heads']], [['up']]]
    """
    names = {group.name for group in groups}
    parts = components({g.name, *g.tied_groups, *names.intersection(g.conflicts_with)} for g in groups)
    return [Task(_compatible_sets(units_of([groups[place] for place in places]))) for places in parts]


def _compatible_sets(units: Sequence[Unit]) -> tuple[tuple[Unit, ...], ...]:
    """Return the sets that begin with one of the units and take in order what conflicts with none taken before."""
    found: dict[tuple[Unit, ...], None] = {}
    for first in units:
        chosen = [first]
        for unit in units:
            if unit is not first and not any(_conflict(unit, one) for one in chosen):
                chosen.append(unit)
        found[tuple(unit for unit in units if unit in chosen)] = None
    return tuple(found)


def assign_to_ranks(tasks: Sequence[Task], size: int) -> list[int]:
    """Return for every task the rank that plans it: those that a site connects go to one rank, the most costly first.

    size: number of ranks.
    """
    parts = components({site.key for group in task.groups for site in group.sites} for task in tasks)
    costs = [
        sum(float(g.num_channels) ** 3 * len(g.sites) for place in places for g in tasks[place].groups)
        for places in parts
    ]
    load, rank_of = [0.0] * size, [0] * len(tasks)
    for part in sorted(range(len(parts)), key=lambda part: (-costs[part], part)):
        rank = load.index(min(load))
        load[rank] += costs[part]
        for place in parts[part]:
            rank_of[place] = rank
    return rank_of


def with_tied(names: Iterable[str], groups: Sequence[Group]) -> set[str]:
    """Return names with those of all groups that an event cannot change without one of them."""
    found = set(names)
    sets = [{group.name, *group.tied_groups} for group in groups]
    for places in components(sets):
        united = set[str]().union(*(sets[place] for place in places))
        found |= united if found & united else set()
    return found


def absent(unit: Sequence[Group]) -> list[str]:
    """Return the names that these groups are tied to but that are not among them."""
    return sorted({name for group in unit for name in group.tied_groups} - {group.name for group in unit})


def share_of_row(group: Group, kept: int) -> float:
    """Return the share of a row that stays: the channels kept, and those of others that stand beside them."""
    return (kept + group.num_static) / (group.num_channels + group.num_static)


def own_share(group: Group, share: float) -> float:
    """Return the share of a group's own channels that has to stay for this share of its rows."""
    return max(0.0, share * (group.num_channels + group.num_static) - group.num_static) / group.num_channels


def _positions_per_channel(group: Group) -> int:
    """Return the number of positions that every channel owns at least along each axis: a head's are many."""
    counts = [m.positions.shape[1] for m in group.members if m.role == "producer"]
    counts += [site.columns.shape[1] for site in group.sites if not isinstance(site, ProductSite)]
    return gcd(*counts) if counts else 1


def common_steps(unit: Sequence[Group], views: Sequence[GroupView | Group], align: int) -> list[int]:
    """Return for every group the step between numbers kept, so that the same share of all of them can be kept.

    Widths are multiples of `align` in positions of the tensors, of the rows, and of what the other groups need; where
    that leaves no step below all channels, align gives way to its largest divisor that does.
    """
    channels = [group.num_channels + group.num_static for group in unit]
    parts = gcd(*channels)  # a share of all of them is a number of parts
    found = parts
    for divisor in (d for d in range(align, 0, -1) if align % d == 0):
        own = [
            step_between(view, divisor // gcd(divisor, _positions_per_channel(group)))
            for group, view in zip(unit, views, strict=True)
        ]
        found = lcm(*(step // gcd(step, num // parts) for step, num in zip(own, channels, strict=True)))
        if found < parts or len(unit) == 1:
            break
    return [found * num // parts for num in channels]
