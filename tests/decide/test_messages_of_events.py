"""What events, plans and ledgers say: shares are shares, multiply-adds are per example, nothing is said of no event."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from apoptosis import Apoptosis, shrink_


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        net[0].weight[8:], net[0].bias[8:] = net[0].weight[:8], net[0].bias[:8]
    return net


X = torch.randn(128, 6, generator=torch.Generator().manual_seed(1))


def _start(net, rows=4, **kwargs):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    asked = {"tolerance": 1e-3, "total_steps": 40, "align": 1, "calibration": 1.0} | kwargs
    return optimizer, Apoptosis(net, optimizer, X[:rows], **asked)


def _step(net, optimizer):
    F.mse_loss(net(X), X[:, :4]).backward()
    optimizer.step()
    optimizer.zero_grad()


def _train(net, optimizer, apo, steps=40):
    events = []
    for _ in range(steps):
        _step(net, optimizer)
        events += [event] if (event := apo.step()) else []
    return events


@pytest.mark.parametrize("rows", [1, 4, 32])
def test_multiply_adds_are_per_example_everywhere(rows):
    net = _network()
    optimizer, apo = _start(net, rows)
    before = 6 * 16 + 16 * 4
    assert apo.ledger().macs == (before, before)
    assert (apo.plan().macs_before, apo.plan().macs_after) == (before, before)
    for _ in range(40):
        _step(net, optimizer)
        if apo.watching and apo.plan().reductions:
            plan = apo.plan()
            assert plan.macs_before == before
            assert plan.macs_after == (6 + 4) * plan.widths["0"][1]
            assert f"{before} -> {plan.macs_after:.0f} multiply-adds" in str(plan)
        if event := apo.step():
            break
    assert event.macs == (before, (6 + 4) * event.groups["0"][1])
    assert apo.ledger().macs == event.macs
    assert shrink_(_network(), X[:rows], [X], tolerance=1e-3).macs == (before, (6 + 4) * 8)


def test_without_events_nothing_is_said_of_predictions():
    net = _network()
    _, apo = _start(net)
    assert "predictions" not in str(apo.ledger())
    optimizer, apo = _start(net)
    assert _train(net, optimizer, apo)
    assert "of the predictions (largest output) on training inputs" in str(apo.ledger())


def test_limits_that_add_up_to_more_than_everything_are_one():
    net = _network()
    optimizer, apo = _start(net)
    assert _train(net, optimizer, apo)
    apo._acceptance.training_flips = 1.06
    ledger = apo.ledger()
    assert ledger.accuracy_cost == 1.0
    assert "may have changed every one of the predictions" in str(ledger)
    assert "points" not in str(ledger)
    assert "too few to bound" in str(replace(ledger, population=True))


# ---------------------------------------------------------------------- between forward and backward


def _early(net, optimizer, apo, steps=40):
    """Lightning's order with step() in on_before_zero_grad: after the forward pass, before zero_grad and backward."""
    events = []
    for _ in range(steps):
        loss = F.mse_loss(net(X), X[:, :4])
        events += [event] if (event := apo.step()) else []
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return events


def test_a_step_between_forward_and_backward_changes_nothing_and_says_so():
    net, twin = _network(), _network()
    optimizer, apo = _start(net)
    other = torch.optim.SGD(twin.parameters(), lr=0.01)
    with pytest.warns(RuntimeWarning, match=r"between a forward pass and its backward pass.*on_train_batch_end"):
        assert not _early(net, optimizer, apo)
    for _ in range(40):
        other.zero_grad()
        F.mse_loss(twin(X), X[:, :4]).backward()
        other.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
    assert "between a forward pass and its backward pass" in str(apo.ledger())


@pytest.mark.parametrize("how", ["plain", "accumulated", "kept", "evaluated", "frozen inputs", "retained"])
def test_usual_orders_are_no_fault(how):
    net = _network()
    optimizer, apo = _start(net)
    events, kept = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            out = net(X)
            loss = F.mse_loss(out, X[:, :4])
            loss.backward(retain_graph=how == "retained")
            if how == "accumulated":
                F.mse_loss(net(X), X[:, :4]).backward()
            if how == "kept":
                kept.append((out, loss))
            optimizer.step()
            optimizer.zero_grad()
            if how == "evaluated":
                with torch.no_grad():
                    kept = [net(X)]
            events += [event] if (event := apo.step()) else []
    assert events


def test_a_loss_of_something_inside_is_no_fault():
    class Aside(nn.Module):
        """The loss is computed from an attribute; the output is for the user alone."""

        def __init__(self):
            super().__init__()
            self.body, self.other = _network(), nn.Linear(6, 3)

        def forward(self, x):
            self.scores = self.body(x)
            return self.other(x), self.scores.detach()

    net = Aside()
    optimizer, apo = _start(net)
    events = []
    for _ in range(40):
        out = net(X)
        F.mse_loss(net.scores, X[:, :4]).backward()
        optimizer.step()
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            events += [event] if (event := apo.step()) else []
    assert out
    assert events
