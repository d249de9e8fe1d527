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


_BLOCK = 32  # steps after which the price is asked, as long as the goal is far
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
    walk = _Walk(tasks, price, goal, limit)
    walk.along_hulls()
    while walk.share > goal and walk.fill():
        pass
    return Choice(widths=walk.widths, share=walk.share, cost=sum(point.cost for point in walk.taken.values()))


class _Walk:
    """Points that are taken, one for a task, and what the network takes with them.

    taken: by the place of a task. widths: of all groups that change. share: what is left. cost: what is predicted.
    """

    def __init__(self, tasks: Sequence[Sequence[Point]], price: Price, goal: float, limit: float) -> None:
        self._tasks, self._price, self._goal, self._limit = tasks, price, goal, limit
        self.taken: dict[int, Point] = {}
        self.widths: dict[str, int] = {}
        self.share, self.cost = price({}), 0.0
        self._too_far: dict[int, list[Point]] = {}  # that went below the goal, and would again, as widths only fall

    def along_hulls(self) -> None:
        """Go along the hulls of all tasks, in the order of cost per saving.

        Where a step goes below the goal, the largest smaller one of that task is taken instead, and its last. Asking
        the price takes as long as all else together, so that it is asked after every few steps as long as these stay
        above the goal.
        """
        steps = [(place, point) for place, _, point in _steps([hull(points) for points in self._tasks])]
        start = self._many_at_once(steps)
        passed: set[int] = set()  # tasks whose next step would go below the goal
        for place, point in steps[start:]:
            if self._cost_with(place, point) > self._limit or self.share <= self._goal:
                break
            if place not in passed and not self._take(place, point):
                passed.add(place)
                self._take_smaller(place, point)

    def _many_at_once(self, steps: Sequence[tuple[int, Point]]) -> int:
        """Take whole blocks of steps while these stay above the goal and within the limit; return how many steps."""
        done = 0
        while done < len(steps):
            taken, widths, cost = dict(self.taken), dict(self.widths), self.cost
            for place, point in steps[done : done + _BLOCK]:
                self._put(place, point)
            share = self._price(self.widths)
            if share <= self._goal or self.cost > self._limit:
                self.taken, self.widths, self.cost = taken, widths, cost
                return done
            self.share, done = share, done + _BLOCK
        return len(steps)

    def fill(self) -> bool:
        """Take the further point, on a hull or not, that costs least for what it saves and does not go below the goal.

        Returns: whether there was one.
        """
        further: list[tuple[float, int, Point]] = []
        for place, points in enumerate(self._tasks):
            before = self.taken.get(place, _NONE)
            for point in points:
                if point.saved > before.saved and self._cost_with(place, point) <= self._limit:
                    further.append((_slope(before, point), place, point))
        further.sort(key=lambda one: (one[0], one[1], one[2].saved))
        return any(self._take(place, point, less=True) for _, place, point in further)

    def _take_smaller(self, place: int, beyond: Point) -> None:
        """Take the point of a task that saves most before the one that goes below the goal, where one fits."""
        before = self.taken.get(place, _NONE)
        for point in sorted(self._tasks[place], key=lambda p: (-p.saved, p.cost)):
            inside = before.saved < point.saved < beyond.saved and self._cost_with(place, point) <= self._limit
            if inside and self._take(place, point):
                return

    def _take(self, place: int, point: Point, *, less: bool = False) -> bool:
        """Take a point unless the network would go below the goal; less: unless it would take no less than now."""
        if any(_is_within(point.widths, other.widths) for other in self._too_far.get(place, ())):
            return False
        before, cost = self.taken.get(place), self.cost
        self._put(place, point)
        share = self._price(self.widths)
        if share >= self._goal and not (less and share >= self.share):
            self.share = share
            return True
        self._put(place, before or _NONE)
        self.cost = cost
        if before is None:
            del self.taken[place]
        if share < self._goal:
            self._too_far.setdefault(place, []).append(point)
        return False

    def _put(self, place: int, point: Point) -> None:
        self.cost = self._cost_with(place, point)
        for name in self.taken.get(place, _NONE).widths:
            self.widths.pop(name, None)
        self.taken[place] = point
        self.widths.update(point.widths)

    def _cost_with(self, place: int, point: Point) -> float:
        return self.cost + point.cost - self.taken.get(place, _NONE).cost


def _is_within(widths: Mapping[str, int], others: Mapping[str, int]) -> bool:
    """Whether every group that others narrow is as narrow or narrower."""
    return all(name in widths and widths[name] <= width for name, width in others.items())
