"""Fine-tuning that is resumed in a process that builds the network anew: residual branches go as they would have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apoptosis import Apoptosis, load, save
from apoptosis.model.pretrained import looks_pretrained
from apoptosis.planner import branches_of

TOTAL = 400
FIRST, SECOND = "1.inner", "2.inner.down"  # branches by name, the second of which cannot be emptied


class Inner(nn.Module):
    def __init__(self, *, leaves):
        super().__init__()
        self.up, self.down, self.leaves = nn.Linear(8, 24), nn.Linear(24, 8), leaves

    def forward(self, x):
        if self.leaves:
            self.seen = x.mean()
        return self.down(torch.relu(self.up(x)))


class Block(nn.Module):
    """A residual block; a module that leaves a tensor behind is not replaced by a constant."""

    def __init__(self, *, leaves):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(8), Inner(leaves=leaves)

    def forward(self, x):
        return x + self.inner(self.norm(x))


def built(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), *(Block(leaves=leaves) for leaves in (False, True, False)), nn.Linear(8, 4))


def pretrained():
    """Norms as far from where they start as those of published networks; two blocks add next to nothing."""
    net = built(0)
    with torch.no_grad():
        for i in (1, 2, 3):
            net[i].norm.weight.uniform_(0.4, 0.9)
        net[1].inner.down.weight.mul_(1e-3)
        net[2].inner.down.weight.mul_(1e-3)
    return net


def start(net, **options):
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    return optimizer, Apoptosis(
        net, optimizer, torch.zeros(2, 6), total_steps=TOTAL, align=1, calibration=1.0, **options
    )


def train(net, optimizer, apo, steps):
    events = []
    for step in steps:
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), x[:, :4].argmax(1)).backward()
        optimizer.step()
        events += [event] if (event := apo.step()) else []
    return events


def told(apo):
    state = apo.state_dict()
    for name in ("own_seconds", "hook_seconds"):
        del state["memory"][name]
    return state


@pytest.mark.parametrize("stop", [2, 10, 20])
def test_a_resumed_run_empties_the_branches_that_it_would_have(stop, runs, tmp_path):
    net = pretrained()
    assert looks_pretrained(net)
    optimizer, apo = start(net)
    first = train(net, optimizer, apo, range(stop))
    save(tmp_path / "a", net, optimizer, apo)
    events = first + train(net, optimizer, apo, range(stop, 50))
    emptied = [name for event in events for name, (_, width) in event.groups.items() if width == 0]
    assert emptied == ["1.inner.up"]
    fresh = built()
    assert not looks_pretrained(fresh)
    other, again = start(fresh)
    load(tmp_path / "a", fresh, other, again)
    assert set(again.structure.refused) == set(apo.structure.refused) == {SECOND}
    more = first + train(fresh, other, again, range(stop, 50))
    assert [(e.step, e.groups, e.measured) for e in more] == [(e.step, e.groups, e.measured) for e in events]
    assert runs.same(runs.everything(fresh)["tensors"], runs.everything(net)["tensors"])
    assert runs.same(told(again), told(apo))


def test_a_branch_that_an_event_could_not_empty_is_left_alone_after_a_resume():
    """Also where the state is of an earlier version, which does not say which branches were tried."""
    net = pretrained()
    optimizer, apo = start(net)
    train(net, optimizer, apo, range(2))
    state = apo.state_dict()
    state["refused"][FIRST] = "it failed in an event"
    older = {name: value for name, value in state.items() if name != "refused"}
    for entry, left in ((state, {FIRST, SECOND}), (older, {SECOND})):
        fresh = built()
        fresh.load_state_dict(net.state_dict())
        for options in ({}, {"pretrained": False}):
            again = start(fresh, **options)[1]
            again.load_state_dict(entry)
            assert set(again.structure.refused) == left
            assert {branch.name for branch in branches_of(again.structure)} == {FIRST, SECOND, "3.inner"} - left
