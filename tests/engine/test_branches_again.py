"""What the end of a residual branch shifts is measured again once the branch is another one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apoptosis.criteria import get_criterion
from apoptosis.decide.goal import FullSize, Goal
from apoptosis.engine.sensitivity import Way, towards
from apoptosis.planner import Request, groups_to_observe
from apoptosis.planner.sampling import sample
from apoptosis.surgery.rehearsal import rehearse
from apoptosis.surgery.target import Target

CALL = ((torch.randn(256, 8, generator=torch.Generator().manual_seed(1)),), {})
BRANCHES = ("branch 1.outer", "branch 2.outer")


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x):
        return x + self.outer(torch.tanh(self.inner(x)))


def choose(width, known, part):
    """Choose widths of a network whose first branch has so many channels and says next to nothing if they are few."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), Block(width), Block(32), nn.Linear(8, 4))
    if width < 32:
        with torch.no_grad():
            net[1].outer.weight.mul_(1e-4)
    target = Target(model=net, optimizers=(), call=CALL)
    structure = rehearse(target, target.capture(), {})
    _, seen = sample(net, groups_to_observe(structure), [CALL], tolerance=0.1, modes=1, seed=0)
    request = Request(
        criterion=get_criterion("interpolative"), tolerance=0.1, align=1, max_drop=0.9, seed=0, empty=True
    )
    full = FullSize(parameters=sum(p.numel() for p in net.parameters()), macs=structure.macs / 256)
    way = Way(goal=Goal(measure="macs", share=part), full=full, known=known, full_widths={"1.inner": 32, "2.inner": 32})
    return towards(way, target, structure, seen, request, {}, CALL)[0]


def test_a_branch_that_lost_most_of_its_channels_is_tried_again_and_goes():
    known = {}
    assert choose(32, known, 0.9).empty == frozenset()
    first = {name: known[name] for name in BRANCHES}
    assert [share for ((share, _),) in first.values()] == [1.0, 1.0]
    choose(20, known, 0.9)  # still more than half of it: nothing new is tried
    assert {name: known[name] for name in BRANCHES} == first
    assert choose(4, known, 0.9).empty == {"1.outer"}
    ((share, shift),) = known["branch 1.outer"]
    assert share == pytest.approx(4 / 32)
    assert shift < 1e-3 * first["branch 1.outer"][0][1]
    assert known["branch 2.outer"] == first["branch 2.outer"]
    choose(3, known, 0.9)  # not half of what it was then
    assert known["branch 1.outer"] == [(share, shift)]
