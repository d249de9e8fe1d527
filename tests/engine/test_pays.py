"""Whether to act at all: features that still form, losses that outweigh what is saved, steps that went too far."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from apoptosis import Apoptosis
from apoptosis.decide import exchange, policy, state
from apoptosis.decide.policy import FORMING, first_look, still_forming
from apoptosis.engine import beginning, looks
from apoptosis.errors import ArgumentError
from apoptosis.observe import Look, growth
from apoptosis.observe.accumulators import Sample
from apoptosis.observe.spread import participation

TOTAL = 480  # steps of a run that is long enough for looks


def autoencoder():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 12), nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 24)
    )


def inputs(step, rank):
    """Inputs that spread over `rank` directions."""
    generator = torch.Generator().manual_seed(step)
    axes = torch.randn(24, 24, generator=torch.Generator().manual_seed(1))[:rank]
    return torch.randn(96, rank, generator=generator) @ axes


def train(net, optimizer, apo, steps, rank=lambda step: 12):
    events = []
    for step in steps:
        x = inputs(step, rank(step))
        loss = nn.functional.mse_loss(net(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if event := apo.step():
            events.append(event)
    return events


def start(net, **options):
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    defaults = {"total_steps": TOTAL, "align": 1, "calibration": 1.0}
    return optimizer, Apoptosis(net, optimizer, torch.zeros(2, 24), **{**defaults, **options})


# -------------------------------------------------------------------------------------- how activations spread


@given(st.integers(1, 6), st.integers(8, 40), st.floats(0.1, 10.0), st.integers(0, 10**6))
def test_the_ratio_lies_between_one_and_the_rank_and_no_rotation_or_scale_changes_it(rank, rows, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, 9, generator=generator)
    turned = torch.linalg.qr(torch.randn(9, 9, generator=generator))[0]
    ratio = float(participation(x))
    assert 1 - 1e-4 <= ratio <= rank + 1e-3
    assert float(participation(scale * x @ turned + 3.0)) == pytest.approx(ratio, rel=1e-3)


def test_the_ratio_of_what_does_not_vary_is_no_growth():
    assert float(participation(torch.ones(5, 3))) == 0.0
    assert growth({"a": 0.0}, {"a": 3.0}, doublings=1.0) == 1.0
    assert growth({"a": 2.0}, {"b": 3.0}, doublings=1.0) == 1.0
    assert growth({"a": 2.0}, {"a": 4.0}, doublings=2.0) == pytest.approx(2**0.5)
    assert still_forming(FORMING) == ""
    assert "features still form" in still_forming(1.01 * FORMING)


def test_a_look_takes_the_first_training_pass_alone_and_leaves_no_hook():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    look = Look(net, ["0", "3", "3", "nowhere"])
    x = torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        net(x)
    net.eval()(x)
    net.train()(x)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    net(torch.randn(16, 3, 8, 8))
    found = look.close()
    assert set(found) == {"0|256", "3|16"}
    assert float(found["0|256"]) == float(participation(x.movedim(1, -1).reshape(-1, 3)))
    copied(torch.randn(16, 3, 8, 8))
    assert len(found) == 2
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_look_takes_what_cannot_be_compared_for_nothing_and_never_fails():
    net = nn.Linear(4, 4)
    for x in (torch.full((32, 4), torch.nan), torch.full((32, 4), 1e30), torch.randn(32, 4) * 1e30, torch.empty(0, 4)):
        look = Look(net, [""])
        net(x)
        assert all(0 <= float(value) < 6 for value in look.close().values())
    half = nn.Linear(4, 4).to(torch.bfloat16)
    look = Look(half, [""])
    half(input=torch.randn(300, 4, dtype=torch.bfloat16))
    assert 2 < float(look.close()["|256"]) <= 4
    look = Look(net, [""])
    weights = {name: p.detach() for name, p in net.named_parameters()}

    def loss(w, x):
        return torch.func.functional_call(net, w, (x,)).sum()

    torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, torch.randn(32, 1, 4))
    assert look.close() == {}
    assert growth({"a": float("inf"), "b": 2.0}, {"a": 2.0, "b": float("nan")}, doublings=1.0) == 1.0


def test_looks_too_close_to_tell_are_not_compared():
    found = looks._last_two({60: {"a": 1.0}, 120: {"a": 2.0}, 122: {"a": 9.0}})
    assert list(found) == [60, 120]
    assert list(looks._last_two({60: {}, 120: {}, 240: {}})) == [120, 240]


def test_a_tolerance_overrules_what_was_too_dear_when_a_run_is_resumed(monkeypatch):
    monkeypatch.setattr(exchange, "RATE", 0.0)
    monkeypatch.setattr(exchange, "SURE_SHARE", 1.0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 5))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    ask = {"total_steps": 120, "align": 1, "calibration": 1.0}
    apo = Apoptosis(net, optimizer, torch.zeros(2, 3, 6), **ask)
    for step in range(60):
        x = torch.randn(64, 3, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (net(x) - x[..., :5].relu()).square().mean().backward()
        optimizer.step()
        apo.step()
    assert apo.decision.at_step is None
    state = apo.state_dict()
    for options in ({}, {"tolerance": 0.01}, {"total_steps": 240}):
        again = Apoptosis(net, optimizer, torch.zeros(2, 3, 6), **{**ask, **options})
        again.load_state_dict(state)
        assert (again.decision.at_step is None) == (not options)


def rising(step):
    """Directions that the inputs spread over."""
    return 1 if step < 80 else 12


def test_nothing_goes_while_features_form():
    """The inputs spread over more and more directions: nothing is removed, and it says why; a tolerance overrules."""
    net = autoencoder()
    optimizer, apo = start(net)
    train(net, optimizer, apo, range(170), rising)
    assert first_look(TOTAL) < 80 < policy.warmup_steps(TOTAL)
    assert [one.cause for one in apo.ledger().history] == ["forming"]
    assert "features still form" in str(apo.ledger())
    assert apo.decision.at_step in policy.event_steps(TOTAL, after=apo.ledger().history[0].step)
    assert not any(module._forward_pre_hooks for module in net.modules())

    net = autoencoder()
    optimizer, apo = start(net, tolerance=0.01)
    assert train(net, optimizer, apo, range(170), rising)


def test_a_run_resumed_within_a_look_goes_on_as_it_would_have():
    stop = first_look(TOTAL)
    found = []
    for resumed in (False, True):
        net = autoencoder()
        optimizer, apo = start(net)
        train(net, optimizer, apo, range(stop))
        if resumed:
            parts = copy.deepcopy((net.state_dict(), optimizer.state_dict(), apo.state_dict()))
            apo.close()
            assert not any(module._forward_pre_hooks for module in net.modules())
            net = autoencoder()
            optimizer, apo = start(net)
            net.load_state_dict(parts[0])
            optimizer.load_state_dict(parts[1])
            apo.load_state_dict(parts[2])
        train(net, optimizer, apo, range(stop, 170))
        found.append((apo.state_dict()["memory"]["spreads"], [p.detach() for p in net.parameters()]))
    assert found[0][0] == found[1][0]
    assert len(found[0][0]) == 2
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


# -------------------------------------------------------------------------------------- what it costs in the long run


def test_what_costs_more_than_it_saves_is_left_where_the_loss_is_what_counts(monkeypatch):
    """Of a network without classes; the schedule ends then, and a tolerance overrules."""
    monkeypatch.setattr(exchange, "RATE", 0.0)
    monkeypatch.setattr(exchange, "SURE_SHARE", 1.0)

    def sequences():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 5))

    def run(**options):
        net = sequences()
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        apo = Apoptosis(net, optimizer, torch.zeros(2, 3, 6), total_steps=120, align=1, calibration=1.0, **options)
        for step in range(60):
            x = torch.randn(64, 3, 6, generator=torch.Generator().manual_seed(step))
            loss = (net(x) - x[..., :5].relu()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            apo.step()
        return net, apo

    net, apo = run()
    assert net[0].out_features == 64
    assert [one.cause for one in apo.ledger().history] == ["exchange"]
    assert apo.decision.at_step is None
    assert "expected to cost" in apo.decision.reason
    assert "tolerance= or target=" in str(apo.ledger())
    net, apo = run(tolerance=0.01)
    assert net[0].out_features < 64


# -------------------------------------------------------------------------------------- towards a goal


def test_a_step_that_went_too_far_is_tried_again_half_as_large(monkeypatch):
    limits = []

    def run(limit):
        monkeypatch.setattr(beginning, "PRETRAINED_RMS", limit)
        net = autoencoder()
        optimizer, apo = start(net, pretrained=True)
        events = train(net, optimizer, apo, range(40))
        return events, apo

    events, apo = run(1e9)
    assert events
    limits.append(events[0].measured["output_rms"])
    events, apo = run(0.8 * limits[0])
    first = [one for one in apo.ledger().history if one.step == apo.ledger().history[0].step]
    assert [one.outcome for one in first[:1]] == ["rolled back"]
    assert 2 <= len(first) <= 1 + state.RETRIES
    assert first[-1].outcome == "event"
    assert events[0].measured["output_rms"] <= 0.8 * limits[0]


def test_inputs_of_all_sizes_count_and_the_most_frequent_one_is_measured():
    sample = Sample(exact=False, most=8)
    sample.take(torch.zeros(2, 5, 3))
    sample.take(torch.ones(4, 7, 3))
    assert not sample.enough()
    sample.take(torch.ones(4, 6, 3))
    assert sample.enough()
    assert sample.joined().shape == (4, 7, 3)
    sample.take(torch.ones(4, 6, 3))
    assert sum(len(x) for x in sample.kept) == 8


def test_a_window_towards_a_goal_ends_when_the_next_one_would_open():
    """One group sees few rows in a step and would be waited for; the others go at the next step towards the goal."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 48), nn.Linear(48, 8)
            self.pool, self.head = nn.Linear(8, 300), nn.Linear(300, 3)

        def forward(self, x):
            return self.head(self.pool(self.down(self.up(x).relu()).mean(1)).relu())

    torch.manual_seed(0)
    net = Pooled()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    apo = Apoptosis(
        net, optimizer, torch.zeros(2, 6, 8), total_steps=400, align=1, pretrained=True, target={"macs": 0.7}
    )
    steps, events = policy.goal_steps(400, after=0, pretrained=True), []
    for step in range(120):
        x = torch.randn(16, 40, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        if event := apo.step():
            events.append(event.step)
    assert steps[0] == 8
    assert events[0] <= max(steps[1], steps[0] + policy.PATIENCE_STEPS) + 1
    assert looks.first_of(apo._memory, apo._settings) == 0


def test_a_goal_that_only_the_end_of_a_branch_reaches_is_not_refused():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            return self.head(x + self.block(x))

    torch.manual_seed(0)
    net = Residual()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    ask = {"total_steps": 120, "align": 32, "calibration": 1.0}
    with pytest.raises(ArgumentError, match="remain with every group"):
        Apoptosis(net, optimizer, torch.zeros(2, 8), target={"macs": 32 / 544}, min_width=0.5, **ask)
    with pytest.raises(ArgumentError, match=r"0\.0588 remain"):
        Apoptosis(net, optimizer, torch.zeros(2, 8), target={"macs": 0.05}, **ask)
    apo = Apoptosis(net, optimizer, torch.zeros(2, 8), target={"macs": 32 / 544}, **ask)
    for step in range(60):
        x = torch.randn(96, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (net(x)[:, 0] - x[:, 0]).square().mean().backward()
        optimizer.step()
        apo.step()
    assert sum(p.numel() for p in net.parameters()) == 8 + 8 * 4 + 4
    assert "reached" in apo.ledger().goal
