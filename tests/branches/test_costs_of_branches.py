"""What is foretold of a network without its residual branches is what there is without them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from apoptosis import Apoptosis
from apoptosis.criteria import get_criterion
from apoptosis.decide.acceptance import AcceptanceResult
from apoptosis.engine.applying import apply_reductions
from apoptosis.errors import ArgumentError
from apoptosis.model.evaluate import as_probe
from apoptosis.planner import Costs, Request, branches_of, groups_to_observe, make_plan
from apoptosis.planner.sampling import sample
from apoptosis.surgery.rehearsal import rehearse
from apoptosis.surgery.target import Target
from branches.networks import NETWORKS


def _sizes(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("kind", NETWORKS)
def test_costs_and_plans_count_all_that_goes_with_a_branch(kind: str) -> None:
    make, call, _ = NETWORKS[kind]
    torch.manual_seed(0)
    net = make()
    target = Target(model=net, optimizers=(), call=call)
    structure = rehearse(target, target.capture(), {})
    _, seen = sample(net, groups_to_observe(structure), [call], tolerance=0.1, modes=1, seed=0)
    names = frozenset(branch.name for branch in branches_of(structure)[::2])
    request = Request(criterion=get_criterion("interpolative"), tolerance=0.1, align=1, max_drop=0.5, seed=0)
    plan = make_plan(net, structure, seen, replace(request, empty=names, widths={}))
    gone = {name: 0 for branch in branches_of(structure) if branch.name in names for name in branch.groups}
    cost = Costs(structure).of(gone)
    outcome = apply_reductions(
        target, structure, plan.reductions, {}, as_probe(call), lambda c: AcceptanceResult(change=c, refused="")
    )
    assert outcome.committed, outcome.refused
    assert (cost.macs, cost.parameters) == (outcome.structure.macs, _sizes(net))
    assert plan.macs_after == outcome.structure.macs


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(torch.relu(self.inner(self.norm(x))))


def test_a_goal_that_is_reached_only_because_norms_go_with_their_branch_is_not_refused() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), Block(), nn.Linear(8, 4))
    full, left = _sizes(net), 8 * 9 + 8 + 4 * 9  # the stream, the constant that the branch leaves, the head
    ask = {"total_steps": 120, "align": 32, "calibration": 1.0, "exclude": ["0"]}
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    with pytest.raises(ArgumentError, match=rf"{left / full:.3g} remain"):
        Apoptosis(net, optimizer, torch.zeros(2, 8), target={"parameters": 0.99 * left / full}, **ask)
    apo = Apoptosis(net, optimizer, torch.zeros(2, 8), target={"parameters": left / full}, **ask)
    for step in range(60):
        x = torch.randn(96, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        apo.step()
    assert _sizes(net) == left
    assert "reached" in apo.ledger().goal
