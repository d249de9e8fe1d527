"""The choice of widths against its plain version, step by step, and how often it asks what the network takes."""

from __future__ import annotations

import itertools
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from apoptosis.planner import allocation
from apoptosis.planner.allocation import Point, choose_widths, hull

_POINT = st.tuples(st.integers(1, 40), st.floats(0.0, 1.0, allow_subnormal=False))
_TASKS = st.lists(st.lists(_POINT, max_size=6, unique_by=lambda point: point[0]), min_size=1, max_size=6)


def _tasks(found):
    return [
        [Point(saved=saved / 200, cost=cost, widths={str(number): 100 - saved}) for saved, cost in own]
        for number, own in enumerate(found)
    ]


def _price(widths):
    """Every task holds a part of its own, and half of a product with the next one, as layers in a row do."""
    kept = [widths.get(str(number), 100) / 100 for number in range(7)]
    return sum(0.5 * a + 0.5 * a * b for a, b in itertools.pairwise(kept)) / 6


def _plain(tasks, goal, limit):
    """Take one step after the other and price each."""
    taken, passed = {}, set()

    def priced(place, point):
        chosen = {**taken, place: point}
        return _price({name: width for one in chosen.values() for name, width in one.widths.items()})

    def cost(place, point):
        return point.cost + sum(one.cost for other, one in taken.items() if other != place)

    none, share = Point(saved=0.0, cost=0.0, widths={}), _price({})
    for place, _, point in allocation._steps([hull(points) for points in tasks]):
        if cost(place, point) > limit or share <= goal:
            break
        if place in passed:
            continue
        steps = [point]
        if priced(place, point) < goal:
            passed.add(place)
            before = taken.get(place, none).saved
            steps = [
                p for p in sorted(tasks[place], key=lambda p: (-p.saved, p.cost)) if before < p.saved < point.saved
            ]
        fits = [p for p in steps if cost(place, p) <= limit and priced(place, p) >= goal]
        if fits:
            taken[place], share = fits[0], priced(place, fits[0])
    while share > goal:
        further = [
            (allocation._slope(taken.get(place, none), point), place, point.saved, point)
            for place, points in enumerate(tasks)
            for point in points
            if point.saved > taken.get(place, none).saved and cost(place, point) <= limit
        ]
        fits = [one for one in sorted(further, key=lambda o: o[:3]) if goal <= priced(one[1], one[3]) < share]
        if not fits:
            break
        _, place, _, point = fits[0]
        share, taken[place] = priced(place, point), point
    return {name: width for one in taken.values() for name, width in one.widths.items()}


@given(_TASKS, st.floats(0.2, 0.99), st.sampled_from([float("inf"), 1.5, 0.4]), st.sampled_from([1, 2, 5, 32]))
@settings(max_examples=400, deadline=None)
def test_the_choice_is_that_of_single_steps(found, goal, limit, block):
    tasks = _tasks(found)
    with patch.object(allocation, "_BLOCK", block):
        choice = choose_widths(tasks, _price, goal, limit=limit)
    assert choice.widths == _plain(tasks, goal, limit)
    assert choice.share == _price(choice.widths) or not choice.widths


def test_the_price_is_asked_a_few_times_for_every_task():
    asked = []

    def price(widths):
        asked.append(len(widths))
        return 1.0 - sum(100 - width for width in widths.values()) / 100 / 300

    tasks = [
        [Point(saved=n / 100 / 300, cost=(n / 100) ** (1 + t % 7), widths={f"{t}": 100 - n}) for n in range(1, 96)]
        for t in range(300)
    ]
    choice = choose_widths(tasks, price, 0.5)
    assert 0.5 <= choice.share < 0.5 + 1 / 30_000
    assert len(asked) < 10 * len(tasks)
