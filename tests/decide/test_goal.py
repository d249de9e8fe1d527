"""Reading target=, and what is said of a goal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apoptosis.decide.goal import FullSize, Goal, check_goal, least_widths, read_goal, share_of
from apoptosis.decide.policy import goal_steps, part_of_way
from apoptosis.errors import ArgumentError
from apoptosis.graph import analyse
from apoptosis.planner import Costs


@pytest.mark.parametrize(
    ("target", "goal"),
    [
        ("2x", Goal(measure="macs", share=0.5)),
        (" 4.0X ", Goal(measure="macs", share=0.25)),
        ("parameters=0.25", Goal(measure="parameters", share=0.25)),
        ({"macs": 0.3}, Goal(measure="macs", share=0.3)),
        ({"parameters": 0.25}, Goal(measure="parameters", share=0.25)),
        ({"seconds": 0.5}, Goal(measure="seconds", share=0.5)),
    ],
)
def test_forms(target, goal):
    assert read_goal(target) == goal


@pytest.mark.parametrize(
    "target",
    ["2", "x", "macs=", "flops=0.5", "macs=2", "0.5x", "1x", "infx", "nanx", 2, 0.5, {}, {"flops": 0.5},
     {"macs": 0.5, "parameters": 0.5}, {"macs": 0.0}, {"macs": 1.0}, {"macs": "half"}, {"macs": True},
     {"macs": float("nan")}],
)  # fmt: skip
def test_other_forms_are_refused_by_value(target):
    with pytest.raises(ArgumentError) as error:
        read_goal(target)
    assert (target.partition("=")[0] if isinstance(target, str) else repr(target)) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_goal_needs_the_length_of_the_run():
    with pytest.raises(ArgumentError, match="total_steps="):
        read_goal("2x", None)
    assert read_goal(None, None) is None


def test_the_way_is_gone_in_equal_ratios_and_never_back():
    goal = Goal(measure="macs", share=0.25)
    assert goal.towards(1.0, 0.5) == pytest.approx(0.5)
    assert goal.towards(0.5, 1.0) == pytest.approx(0.25)
    assert goal.towards(0.2, 1.0) == 0.2


def _net():
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))


def test_a_goal_out_of_reach_is_refused_with_what_is_pinned():
    structure = analyse(_net(), (torch.zeros(2, 4),), {})
    full = FullSize(parameters=99, macs=structure.macs / 2)
    check_goal(Goal(measure="macs", share=0.1), structure, full, 2, lambda group: 1)
    with pytest.raises(ArgumentError, match=r"0\.333 remain") as error:
        check_goal(Goal(measure="macs", share=0.1), structure, full, 2, lambda group: 4)
    assert "'2' (3 channels)" in str(error.value)


def test_shares_count_what_they_say():
    costs = Costs(analyse(_net(), (torch.zeros(2, 4),), {}))
    half = costs.of({"0": 6})
    assert share_of(Goal(measure="macs", share=0.5), half, FullSize(parameters=99, macs=84.0), 2) == pytest.approx(0.5)
    assert share_of(
        Goal(measure="parameters", share=0.5), half, FullSize(parameters=99, macs=84.0), 2
    ) == pytest.approx(51 / 99)


def test_least_widths_are_of_the_full_width():
    group = next(g for g in analyse(_net(), (torch.zeros(2, 4),), {}).groups if g.name == "0")
    assert least_widths(0.5, [group], {"0": 40}) == {"0": 20}
    assert least_widths(64, [group], {}) == {"0": 12}
    assert least_widths(0.0, [group], {}) == {}


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("total", [7, 30, 200, 648, 5000, 100_000])
def test_steps_towards_a_goal_come_early_and_all_parts_are_gone(total, pretrained):
    steps = goal_steps(total, after=0, pretrained=pretrained)
    assert steps
    assert all(1 <= step <= max(2, 0.7 * total) for step in steps)
    assert list(steps) == sorted(set(steps))
    parts = [part_of_way(total, step, pretrained=pretrained) for step in steps[:4]]
    assert parts == [1 / 3, 1 / 2, 1.0, 1.0][: len(parts)]
    if total >= 200:
        assert steps[2] <= (0.08 if pretrained else 0.2) * total + 1
