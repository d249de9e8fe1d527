"""Budgets in a run: what is refused, what is rolled back, and what the ledger says in the end."""

import json

import pytest
import torch

from apoptosis import Apoptosis
from apoptosis.errors import ArgumentError, BudgetError, CheckpointError


def test_budget_is_refused_where_it_cannot_be_granted(runs):
    net = runs.mlp()
    optimizer, x = runs.adam(net), runs.inputs(4, 0)
    with pytest.raises(BudgetError, match="probe="):
        Apoptosis(net, optimizer, x, budget=0.01)
    with pytest.raises(BudgetError, match=r"N = \d+"):
        Apoptosis(net, optimizer, x, budget=0.002, probe=(runs.inputs(100, 1), runs.labels(runs.inputs(100, 1))))
    single = runs.mlp(classes=1)
    with pytest.raises(BudgetError, match="logits="):
        Apoptosis(single, runs.adam(single), x, budget=0.01, probe=runs.inputs(4000, 1))

    def read(out):
        return torch.cat([out, -out], 1)

    Apoptosis(single, runs.adam(single), x, budget=0.01, probe=runs.inputs(4000, 1), logits=read)


def test_budget_and_probe_give_events_and_a_ledger_that_sums(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    probe = runs.inputs(8000, 777)
    apo = runs.start(net, optimizer, budget=0.2, probe=(probe, runs.labels(probe)))
    events = runs.train(net, optimizer, apo)
    assert events
    limits = [c for event in events for c in event.certificates if c.kind == "accuracy"]
    assert len(limits) == len(events)
    assert all(c.population and c.confidence == 0.95 for c in limits)
    ledger = apo.ledger()
    assert ledger.accuracy_cost == pytest.approx(sum(c.value for c in limits))
    assert ledger.accuracy_cost <= 0.2
    assert ledger.population
    assert "95 % confidence" in str(ledger)
    assert "held-out" in str(events[0])


def test_a_violent_tolerance_beyond_the_budget_is_rolled_back_bitwise(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    x = runs.inputs(4000, 777)
    apo = runs.start(net, optimizer, tolerance=0.9, budget=0.003, probe=(x, runs.labels(x)), criterion="random")
    states = []
    assert runs.train(net, optimizer, apo, after=lambda s: states.append(runs.everything(net, optimizer))) == []
    assert apo.ledger().rolled_back > 0
    assert apo.ledger().accuracy_cost == 0.0
    twin = runs.mlp()
    twin_optimizer = runs.adam(twin)
    runs.train(twin, twin_optimizer, None)
    assert runs.same(states[-1]["tensors"], runs.everything(twin)["tensors"])
    assert runs.same(states[-1]["optimizer"], twin_optimizer.state_dict())


def test_probe_without_budget_still_speaks_of_the_population(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer, probe=runs.inputs(4000, 777))
    assert runs.train(net, optimizer, apo)
    ledger = apo.ledger()
    assert ledger.population
    assert ledger.budget is None
    assert 0 < ledger.accuracy_cost < 1
    assert "95 % confidence" in str(ledger)
    assert "of the predictions (largest output)" in str(ledger)
    assert "accuracy" not in str(ledger)


def test_two_outputs_of_a_regression_are_not_taken_for_classes(runs):
    net = runs.mlp(classes=2)
    with pytest.raises(BudgetError, match="may be no classes"):
        Apoptosis(net, runs.adam(net), runs.inputs(4, 0), budget=0.01, probe=runs.inputs(4000, 1))
    x = runs.inputs(4000, 1)
    with pytest.raises(ArgumentError, match="labels"):  # four labels, two outputs
        Apoptosis(net, runs.adam(net), runs.inputs(4, 0), budget=0.01, probe=(x, runs.labels(x)))


def test_a_run_is_resumed_with_its_own_probe_or_not_at_all(runs):
    net = runs.mlp()
    optimizer, x = runs.adam(net), runs.inputs(8000, 777)
    apo = runs.start(net, optimizer, budget=0.2, probe=(x, runs.labels(x)))
    assert runs.train(net, optimizer, apo)
    state = apo.state_dict()
    for probe in (None, (x + 1, runs.labels(x))):
        other = Apoptosis(net, optimizer, runs.inputs(4, 0), tolerance=0.1, total_steps=runs.STEPS, probe=probe)
        before = other.ledger().accuracy_cost
        with pytest.raises(CheckpointError, match="probe"):
            other.load_state_dict(state)
        assert other.ledger().accuracy_cost == before
    same = Apoptosis(
        net,
        optimizer,
        runs.inputs(4, 0),
        tolerance=0.1,
        total_steps=runs.STEPS,
        align=1,
        budget=0.2,
        probe=(x, runs.labels(x)),
    )
    same.load_state_dict(state)
    assert same.ledger().accuracy_cost == apo.ledger().accuracy_cost


def test_a_network_without_classes_has_no_accuracy_to_speak_of(runs):
    net = runs.mlp(classes=1)
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)
    events = []
    for step in range(runs.STEPS):
        x = runs.inputs(runs.BATCH, step)
        optimizer.zero_grad()
        (net(x).squeeze(1) - x[:, 0]).square().mean().backward()
        optimizer.step()
        if event := apo.step():
            events.append(event)
    assert events
    assert "flips" not in events[0].measured
    assert events[0].measured["output_rms"] > 0
    assert apo.ledger().accuracy_cost is None
    assert "accuracy" not in str(apo.ledger())
    json.dumps(events[0].as_dict())


def test_an_empty_ledger_prints(runs):
    net = runs.mlp()
    apo = Apoptosis(net, runs.adam(net), runs.inputs(4, 0))
    assert "0 events" in str(apo.ledger())
    assert apo.ledger().parameters[0] == apo.ledger().parameters[1]


def test_a_bound_above_everything_is_no_figure(runs):
    net = runs.mlp(48)
    optimizer = runs.adam(net)
    probe = runs.inputs(2, 777)
    apo = runs.start(net, optimizer, probe=(probe, runs.labels(probe)))
    assert runs.train(net, optimizer, apo)
    ledger = apo.ledger()
    assert ledger.accuracy_cost >= 1.0
    assert "2 held-out probe rows are too few" in str(ledger)
    assert "points" not in str(ledger)
