"""Choosing widths that reach a goal at the least predicted cost: properties over random points."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apoptosis.planner.allocation import Point, choose_widths, hull, together

_POINT = st.tuples(st.integers(1, 40), st.floats(0.0, 1.0, allow_subnormal=False))
_POINTS = st.lists(_POINT, min_size=0, max_size=5, unique_by=lambda point: point[0])


def _task(name, found):
    return [Point(saved=saved / 200, cost=cost, widths={name: 100 - saved}) for saved, cost in found]


def _price(widths):
    return 1.0 - sum(100 - width for width in widths.values()) / 200


@given(st.lists(_POINTS, min_size=1, max_size=4), st.floats(0.2, 0.99))
@settings(max_examples=200, deadline=None)
def test_a_goal_is_never_exceeded_and_costs_are_those_of_the_points_taken(found, goal):
    tasks = [_task(str(number), own) for number, own in enumerate(found)]
    choice = choose_widths(tasks, _price, goal)
    assert choice.share >= goal - 1e-12
    assert choice.share == pytest.approx(_price(choice.widths))
    taken = [next((p for p in own if p.widths.items() <= choice.widths.items()), None) for own in tasks]
    assert choice.cost == pytest.approx(sum(p.cost for p in taken if p is not None))


@given(st.lists(_POINTS, min_size=1, max_size=3), st.floats(0.3, 0.95))
@settings(max_examples=100, deadline=None)
def test_what_is_left_could_not_come_nearer_by_changing_one_task(found, goal):
    tasks = [_task(str(number), own) for number, own in enumerate(found)]
    choice = choose_widths(tasks, _price, goal)
    for own in tasks:
        for point in own:
            ((name, width),) = point.widths.items()
            if width < choice.widths.get(name, 100):
                assert _price({**choice.widths, name: width}) < goal or choice.share <= goal


@given(st.lists(_POINTS, min_size=2, max_size=3))
@settings(max_examples=60, deadline=None)
def test_on_the_hull_no_other_choice_saves_as_much_for_less(found):
    tasks = [hull(_task(str(number), own)) for number, own in enumerate(found)]
    for point in together(tasks):
        for other in product(*([None, *own] for own in tasks)):
            saved = sum(p.saved for p in other if p)
            if saved >= point.saved - 1e-12:
                assert sum(p.cost for p in other if p) >= point.cost - 1e-9


@given(st.lists(_POINTS, min_size=1, max_size=4), st.floats(0.3, 0.9), st.floats(0.3, 0.9))
@settings(max_examples=150, deadline=None)
def test_more_asked_is_no_less_removed(found, one, other):
    tasks = [_task(str(number), own) for number, own in enumerate(found)]
    less, more = choose_widths(tasks, _price, max(one, other)), choose_widths(tasks, _price, min(one, other))
    assert more.share <= less.share + 1e-12


def test_a_limit_on_the_cost_ends_the_walk():
    tasks = [_task("a", [(10, 0.1), (40, 0.9)]), _task("b", [(20, 0.1)])]
    assert choose_widths(tasks, _price, 0.0, limit=0.25).widths == {"a": 90, "b": 80}
    assert choose_widths(tasks, _price, 0.0, limit=0.05).widths == {}
