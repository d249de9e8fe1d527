"""target=: a size is reached early in the run, never exceeded, and what cannot be reached is refused by name."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from apoptosis import Apoptosis, shrink_
from apoptosis.decide.goal import NEAR
from apoptosis.decide.timing import measure_timings
from apoptosis.errors import ArgumentError
from apoptosis.graph import analyse
from apoptosis.model.pretrained import looks_pretrained
from apoptosis.planner import Costs

STEPS = 120


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 4))


def convs(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 4),
    )  # fmt: skip


def batch(step, shape):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(96, *shape, generator=generator)
    return x, (x.flatten(1)[:, :4] * torch.tensor([1.0, -1.0, 2.0, 0.5])).argmax(1)


def start(net, shape, rows=2, **options):
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    defaults = {"total_steps": STEPS, "align": 1, "calibration": 1.0}
    return optimizer, Apoptosis(net, optimizer, torch.zeros(rows, *shape), **{**defaults, **options})


def train(net, optimizer, apo, shape, steps=range(STEPS)):
    events = []
    for step in steps:
        x, y = batch(step, shape)
        loss = nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if event := apo.step():
            events.append(event)
    return events


@pytest.mark.parametrize(("make", "shape"), [(mlp, (12,)), (convs, (3, 8, 8))])
@pytest.mark.parametrize(
    ("target", "measure", "share"), [("2x", "macs", 0.5), ({"parameters": 0.4}, "parameters", 0.4)]
)
def test_a_target_is_reached_early_and_never_exceeded(make, shape, target, measure, share):
    net = make()
    optimizer, apo = start(net, shape, target=target)
    events = train(net, optimizer, apo, shape)
    assert events
    full = getattr(events[0], measure)[0]
    reached = [getattr(event, measure)[1] / full for event in events]
    assert all(now >= share - 1e-9 for now in reached)
    assert reached[-1] <= share * (1 + NEAR)
    assert events[-1].step <= 0.4 * STEPS
    assert "reached" in str(apo.ledger())
    json.dumps([apo.ledger().as_dict(), apo.state_dict()["memory"], *(e.as_dict() for e in events)], allow_nan=False)
    assert apo.decision.at_step is None
    assert "goal is reached" in apo.decision.reason
    assert sum(p.numel() for p in net.parameters()) == events[-1].parameters[1]


def test_more_asked_is_more_removed():
    left = []
    for target in ("1.3x", "2x", "3x"):
        net = mlp()
        optimizer, apo = start(net, (12,), target=target)
        left.append(train(net, optimizer, apo, (12,))[-1].macs[1])
    assert left == sorted(left, reverse=True)
    assert len(set(left)) == 3


def test_bounds_on_widths_hold_and_the_goal_is_reached_in_more_events():
    net = mlp()
    optimizer, apo = start(net, (12,), target="1.9x", min_width=0.4, max_removed=0.2)
    events = train(net, optimizer, apo, (12,))
    assert net[0].out_features >= 0.4 * 64
    assert net[2].out_features >= 0.4 * 96
    assert len(events) >= 3
    assert all(after >= 0.8 * before - 1 for event in events for before, after in event.groups.values())
    assert events[-1].macs[1] / events[0].macs[0] <= (1 + NEAR) / 1.9
    with pytest.raises(ArgumentError, match=r"min_width=1\.5"):
        start(mlp(), (12,), min_width=1.5)
    with pytest.raises(ArgumentError, match="max_removed=0"):
        start(mlp(), (12,), max_removed=0)


def test_what_is_out_of_reach_is_refused_at_construction_and_nothing_has_changed():
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ArgumentError, match="What is pinned: '4' \\(4 channels\\)"):
        start(net, (12,), target="50x", min_width=0.5)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    with pytest.raises(ArgumentError, match="total_steps="):
        start(net, (12,), target="2x", total_steps=None)


def test_a_resumed_run_takes_the_same_widths():
    whole, parts = mlp(), mlp()
    optimizer, apo = start(whole, (12,), target="3x")
    train(whole, optimizer, apo, (12,))
    other, first = start(parts, (12,), target="3x")
    middle = 12
    train(parts, other, first, (12,), range(middle))
    state = copy.deepcopy((first.state_dict(), parts.state_dict(), other.state_dict()))
    assert first.ledger().events < apo.ledger().events
    fresh = mlp(1)
    again, second = start(fresh, (12,), target="3x")
    if first.ledger().events:
        fresh = copy.deepcopy(parts)
        again, second = start(fresh, (12,), target="3x")
    fresh.load_state_dict(state[1])
    again.load_state_dict(state[2])
    second.load_state_dict(state[0])
    train(fresh, again, second, (12,), range(middle, STEPS))
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), whole.parameters(), strict=True))


def test_shrink_reaches_a_target_at_once():
    net = mlp()
    optimizer, apo = start(net, (12,), tolerance=0.0)
    train(net, optimizer, apo, (12,), range(60))
    batches = [batch(step, (12,))[0] for step in range(8)]
    share = {}
    for target in ("1.5x", "3x", {"parameters": 0.3}):
        small = copy.deepcopy(net)
        event = shrink_(small, torch.zeros(2, 12), batches, target=target)
        share[str(target)] = event.macs[1] / event.macs[0]
        assert "reached" in " ".join(event.notes)
        assert small(batches[0]).shape == (96, 4)
    assert 1 / 1.5 <= share["1.5x"] <= (1 + NEAR) / 1.5
    assert 1 / 3 <= share["3x"] <= (1 + NEAR) / 3
    with pytest.raises(ArgumentError, match="one of the two"):
        shrink_(net, torch.zeros(2, 12), batches)
    with pytest.raises(ArgumentError, match="one of the two"):
        shrink_(net, torch.zeros(2, 12), batches, tolerance=0.1, target="2x")


def test_groups_whose_loss_the_outputs_show_are_left_alone():
    """Of two layers alike in size, the one whose channels the output depends on keeps more of them."""
    torch.manual_seed(3)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(12, 48), nn.Linear(12, 48)
            self.out, self.weak = nn.Linear(48, 4), nn.Linear(48, 4)

        def forward(self, x):
            return self.out(self.used(x).relu()) + 1e-3 * self.weak(self.unused(x).relu())

    net = Two()
    batches = [batch(step, (12,))[0] for step in range(8)]
    event = shrink_(net, torch.zeros(2, 12), batches, target="1.6x")
    assert net.unused.out_features < 0.4 * net.used.out_features
    assert event.measured["output_rms"] < 0.02


def trained_convs():
    """Trained a little, with a norm whose weights are as far from ones as those of published networks."""
    net = convs()
    fresh = start(net, (3, 8, 8), tolerance=0.0)
    train(net, *fresh, (3, 8, 8), range(60))
    with torch.no_grad():
        net[1].weight.uniform_(0.4, 0.9, generator=torch.Generator().manual_seed(0))
    return net


def test_a_pretrained_network_is_recognised_by_its_norms():
    _, apo = start(convs(), (3, 8, 8), target="2x")
    assert apo.decision.at_step > 0.03 * STEPS
    trained = trained_convs()
    assert start(trained, (3, 8, 8), target="2x")[1].decision.at_step <= 0.03 * STEPS
    assert start(trained, (3, 8, 8), target="2x", pretrained=False)[1].decision.at_step > 0.03 * STEPS
    assert start(mlp(), (12,), target="2x", pretrained=True)[1].decision.at_step <= 0.03 * STEPS
    with pytest.raises(ArgumentError, match="pretrained='no'"):
        start(mlp(), (12,), pretrained="no")


@pytest.mark.parametrize("how", ["a pass", "a noisy start", "zeros", "another layer of that name"])
def test_networks_that_were_not_trained_are_not_taken_for_pretrained(how):
    class NormedLinear(nn.Linear):
        pass

    net = convs()
    with torch.no_grad():
        if how == "a pass":
            net(torch.ones(64, 3, 8, 8))
        elif how == "a noisy start":
            net[1].weight.normal_(1.0, 0.02)
        elif how == "zeros":
            net[1].weight.zero_()
        else:
            net = nn.Sequential(NormedLinear(12, 32), nn.ReLU(), nn.Linear(32, 4))
    assert not looks_pretrained(net)


def test_from_a_pretrained_network_goes_early_what_hardly_shifts_its_outputs():
    runs = {}
    for pretrained in (None, False):
        net = trained_convs()
        optimizer, apo = start(net, (3, 8, 8), pretrained=pretrained, total_steps=400)
        runs[pretrained] = train(net, optimizer, apo, (3, 8, 8), range(60)), apo
    events, apo = runs[None]
    assert events
    assert events[-1].step < 0.15 * 400
    assert sum(event.measured["output_rms"] for event in events) < 0.6  # 0.25 by trials of single groups
    assert apo.decision.at_step is None
    assert not runs[False][0]


def test_what_is_lost_for_nothing_goes_first():
    """Half of the channels never say anything: the other layer keeps what it would otherwise have to give."""
    net = mlp()
    with torch.no_grad():
        net[0].weight[32:].zero_()
        net[0].bias[32:].fill_(-1.0)
    batches = [batch(step, (12,))[0] for step in range(8)]
    event = shrink_(net, torch.zeros(2, 12), batches, target="1.9x")
    assert net[0].out_features <= 34
    assert event.measured["output_rms"] < 0.05


def test_outputs_that_are_not_finite_leave_no_trace_in_what_trials_found():
    net = mlp()
    optimizer, apo = start(net, (12,), target="2x")
    train(net, optimizer, apo, (12,), range(9))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(9, 30):
            if apo.watching:
                net[4].bias.data.fill_(float("nan"))
            x, y = batch(step, (12,))
            nn.functional.cross_entropy(net(x), y).backward()
            apo.step()
    assert "skipped an event" in str(caught[0].message)
    assert not apo.state_dict()["memory"]["shifts"]


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 4))


def table():
    """What contractions take, and nothing else: a busy machine may find that all else takes more."""
    net = wide()
    structure = analyse(net, (torch.zeros(96, 12),), {})
    found = replace(measure_timings(net, ((torch.zeros(96, 12),), {}), structure), fixed=0.0)
    return replace(found, step=Costs(structure, found).of({}).seconds)


def test_a_target_in_seconds_follows_a_table_that_is_given():
    given, nets = table(), []
    for _ in range(2):
        nets.append(wide())
        optimizer, apo = start(
            nets[-1], (12,), target={"seconds": 0.6}, timings=given, align=8, total_steps=300, rows=96
        )
        assert apo.timings == given
        train(nets[-1], optimizer, apo, (12,), range(90))
    assert [p.shape for p in nets[0].parameters()] == [p.shape for p in nets[1].parameters()]
    left = Costs(apo.structure, given).of({}).seconds / given.step
    assert 0.6 <= left <= 0.6 * (1 + NEAR)
    assert "time of a training step: reached" in str(apo.ledger())
    with pytest.raises(ArgumentError, match="timings="):
        start(wide(), (12,), target={"seconds": 0.5}, timings={"step": 1.0})
    with pytest.raises(ArgumentError, match="96 examples, the example input has 2"):
        start(wide(), (12,), target={"seconds": 0.5}, timings=given)


def test_a_target_in_seconds_measures_its_table_and_saves_it():
    _, apo = start(wide(), (12,), target={"seconds": 0.999}, rows=96)
    assert apo.timings.step > 0
    state = apo.state_dict()
    _, other = start(wide(), (12,), target={"seconds": 0.999}, timings=table(), rows=96)
    assert other.timings != apo.timings
    other.load_state_dict(state)
    assert other.timings == apo.timings
    assert start(wide(), (12,), target="2x")[1].timings is None


def test_branches_that_add_nothing_go_first():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner, self.outer = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

        def forward(self, x):
            return x + self.outer(nn.functional.gelu(self.inner(self.norm(x))))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), *(Block() for _ in range(3)), nn.Linear(16, 4))
    with torch.no_grad():
        net[2].outer.weight.mul_(1e-3)
    x = torch.randn(256, 12)
    before = net(x)
    event = shrink_(net, torch.zeros(2, 12), [x], target="1.5x")
    assert event.groups["2.inner"] == (64, 0)
    assert not [name for name, p in net.named_parameters() if name.startswith("2.") and p.dim() > 1]
    assert (net(x) - before).norm() < 0.02 * before.norm()
    kept = shrink_(net, torch.zeros(2, 12), [x], target="1.2x", min_width=8)
    assert all(width >= 8 for _, width in kept.groups.values())


def test_a_trial_that_the_network_does_not_run_in_is_told_of():
    class Wide(nn.Linear):
        def forward(self, x):
            if self.out_features < 40 and len(x) > 2:  # the example input has two rows
                raise RuntimeError("narrower than 40")
            return super().forward(x)

    torch.manual_seed(0)
    net = nn.Sequential(Wide(12, 64), nn.ReLU(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 4))
    before = copy.deepcopy(net.state_dict())
    event = shrink_(net, torch.zeros(2, 12), [batch(step, (12,))[0] for step in range(8)], target="1.5x")
    assert list(event.groups) == ["2"]
    assert any(note.startswith("0: in a trial") and "narrower than 40" in note for note in event.notes)
    assert torch.equal(net[0].weight, before["0.weight"])
