"""Units, tasks and their ranks: what an event decides on together."""

from __future__ import annotations

import numpy as np

from apoptosis.planner.couplings import absent, assign_to_ranks, tasks_of, units_of, with_tied
from apoptosis.records import Group, LinearSite


def site(weight: str, num: int) -> LinearSite:
    columns = np.arange(num)[:, None]
    return LinearSite(
        module=weight, kind="linear", weight=weight, dim=1, columns=columns, input_columns=columns, num_columns=num
    )


def group(name: str, *, num: int = 4, conflicts=(), tied=(), reads=()) -> Group:
    return Group(
        name=name,
        num_channels=num,
        members=(),
        sites=tuple(site(weight, num) for weight in reads),
        conflicts_with=tuple(conflicts),
        tied_groups=tuple(tied),
    )


def names(task) -> list[list[str]]:
    return [[g.name for unit in units for g in unit] for units in task.sets]


def test_tied_groups_are_one_unit_of_every_set() -> None:
    groups = [
        group("q", conflicts=["heads"], tied=["v"]),
        group("v", conflicts=["heads"], tied=["q"]),
        group("heads", conflicts=["q", "v"]),
        group("up"),
    ]
    assert [[g.name for g in unit] for unit in units_of(groups)] == [["q", "v"], ["heads"], ["up"]]
    assert [names(task) for task in tasks_of(groups)] == [[["q", "v"], ["heads"]], [["up"]]]
    assert with_tied(["v"], groups) == {"q", "v"}


def test_tied_groups_that_conflict_are_alone_and_say_what_they_miss() -> None:
    groups = [group("a", conflicts=["b"], tied=["b"]), group("b", conflicts=["a"], tied=["a"])]
    assert [[g.name for g in unit] for unit in units_of(groups)] == [["a"], ["b"]]
    assert [names(task) for task in tasks_of(groups)] == [[["a"], ["b"]]]
    assert absent(groups[:1]) == ["b"]


def test_a_group_that_is_not_planned_connects_nothing() -> None:
    groups = [group("q", conflicts=["heads"]), group("v", conflicts=["heads"])]
    assert [names(task) for task in tasks_of(groups)] == [[["q"]], [["v"]]]


def test_tasks_that_a_site_connects_go_to_one_rank_and_the_load_is_even() -> None:
    groups = [
        group("small", num=4, reads=["x"]),
        group("large", num=32, reads=["y"]),
        group("beside", num=8, reads=["x"]),
        group("other", num=16, reads=["z"]),
    ]
    assert assign_to_ranks(tasks_of(groups), 2) == [1, 0, 1, 1]
    assert assign_to_ranks(tasks_of(groups), 3) == [2, 0, 2, 1]
    assert assign_to_ranks(tasks_of(groups), 1) == [0] * 4


def test_a_site_counts_the_readers_of_the_largest_set() -> None:
    groups = [
        group("q", conflicts=["heads"], reads=["o"]),
        group("v", conflicts=["heads"], reads=["o"]),
        group("heads", conflicts=["q", "v"], reads=["o"]),
    ]
    (task,) = tasks_of(groups)
    assert list(task.readers.values()) == [2]
