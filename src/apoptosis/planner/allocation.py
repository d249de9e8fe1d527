"""Which widths reach a goal with the least loss: one choice over all groups, by loss per multiply-add saved.

Holds: the frontier of every task, and the walk along all of them together. Elsewhere: what a width costs
(engine.sensitivity), which widths there are (offers.py), what they save (costs.py).

Every task offers points (what is saved, what it costs, widths), of which one is taken: a knapsack with several choices.
Only points on the lower convex hull are taken, in the order of what the next one costs for what it saves beyond the
one before. So a smaller goal takes a prefix of what a larger one takes, and more asked is more removed.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

Price = Callable[[Mapping[str, int]], float]
"""Widths (group -> channels; others as they are) -> what the network then takes, as a share of what it took at full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Widths of the groups of one task. saved: share that they save by themselves; cost: the loss that is predicted."""

    saved: float
    cost: float
    widths: Mapping[str, int]


_NONE = Point(saved=0.0, cost=0.0, widths={})


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Widths of all groups that change. share: what the network then takes; cost: the sum of what was predicted."""

    widths: Mapping[str, int]
    share: float
    cost: float


def hull(points: Iterable[Point]) -> list[Point]:
    """Return the points of the lower convex hull from (0, 0), by what they save: each costs more per saving.

    Example:
        >>> made = [Point(saved=s, cost=c, widths={}) for s, c in ((0.1, 0.2), (0.2, 0.2), (0.3, 0.6))]
        >>> [point.saved for point in hull(made)]
        [0.2, 0.3]
    """
    found = [_NONE]
    for point in sorted(points, key=lambda p: (p.saved, p.cost)):
        if point.saved <= found[-1].saved:
            continue
        while len(found) > 1 and _slope(found[-2], found[-1]) >= _slope(found[-2], point):
            found.pop()
        found.append(point)
    return found[1:]


def _slope(one: Point, other: Point) -> float:
    return (other.cost - one.cost) / (other.saved - one.saved)


def together(units: Sequence[Sequence[Point]]) -> list[Point]:
    """Return the frontier of several units that change independently of one another: the cheapest step each time."""
    found, widths, saved, cost = [], dict[str, int](), 0.0, 0.0
    for _, before, point in _steps([hull(points) for points in units]):
        saved, cost = saved + point.saved - before.saved, cost + point.cost - before.cost
        widths = widths | dict(point.widths)
        found.append(Point(saved=saved, cost=cost, widths=widths))
    return found


def _steps(frontiers: Sequence[Sequence[Point]]) -> Iterable[tuple[int, Point, Point]]:
    """Yield (place, point before, point) along all frontiers, in the order of cost per saving."""
    heap = [(_slope(_NONE, points[0]), place, 0) for place, points in enumerate(frontiers) if points]
    heapq.heapify(heap)
    while heap:
        _, place, number = heapq.heappop(heap)
        points = frontiers[place]
        yield place, points[number - 1] if number else _NONE, points[number]
        if number + 1 < len(points):
            heapq.heappush(heap, (_slope(points[number], points[number + 1]), place, number + 1))


def choose_widths(
    tasks: Sequence[Sequence[Point]], price: Price, goal: float, *, limit: float = float("inf")
) -> Choice:
    """Choose widths that take the goal's share of what there was, at the least predicted loss, and never less.

    Args:
        tasks: the points of every task, of which one at most is taken.
        price: what the network takes at some widths.
        goal: share to reach. Steps that would go below it are passed over, and smaller ones taken.
        limit: most that all widths together may cost; the walk ends there.
    """
    taken: dict[int, Point] = {}
    passed: set[int] = set()  # tasks whose next step would go below the goal
    share = price({})
    for place, _, point in _steps([hull(points) for points in tasks]):
        if _cost(taken, place, point) > limit or share <= goal:
            break
        if place in passed:
            continue
        after = price(_widths(taken, place, point))
        if after < goal:
            passed.add(place)
            point, after = _largest_fitting(taken, place, tasks[place], point, price, goal, limit)
        if after >= goal and point is not taken.get(place, _NONE):
            taken[place], share = point, after
    while share > goal:
        found = _filling(taken, tasks, price, share, goal, limit)
        if found is None:
            break
        place, point, share = found
        taken[place] = point
    return Choice(widths=_widths(taken), share=share, cost=sum(point.cost for point in taken.values()))


def _largest_fitting(
    taken: Mapping[int, Point],
    place: int,
    points: Sequence[Point],
    beyond: Point,
    price: Price,
    goal: float,
    limit: float,
) -> tuple[Point, float]:
    """Return the point of a task that saves most before the one that goes below the goal, and the share it leaves.

    The point that is taken, with a share of 0, where none fits.
    """
    before = taken.get(place, _NONE)
    for point in sorted(points, key=lambda p: (-p.saved, p.cost)):
        if not before.saved < point.saved < beyond.saved or _cost(taken, place, point) > limit:
            continue
        after = price(_widths(taken, place, point))
        if after >= goal:
            return point, after
    return before, 0.0


def _filling(
    taken: Mapping[int, Point], tasks: Sequence[Sequence[Point]], price: Price, share: float, goal: float, limit: float
) -> tuple[int, Point, float] | None:
    """Return the further point, on a hull or not, that costs least for what it saves and does not go below the goal."""
    further: list[tuple[float, int, Point]] = []
    for place, points in enumerate(tasks):
        before = taken.get(place, _NONE)
        for point in points:
            if point.saved > before.saved and _cost(taken, place, point) <= limit:
                further.append((_slope(before, point), place, point))
    for _, place, point in sorted(further, key=lambda one: (one[0], one[1], one[2].saved)):
        after = price(_widths(taken, place, point))
        if goal <= after < share:
            return place, point, after
    return None


def _widths(taken: Mapping[int, Point], place: int = -1, point: Point | None = None) -> dict[str, int]:
    chosen = taken if point is None else {**taken, place: point}
    return {name: width for one in chosen.values() for name, width in one.widths.items()}


def _cost(taken: Mapping[int, Point], place: int, point: Point) -> float:
    return point.cost + sum(one.cost for other, one in taken.items() if other != place)
