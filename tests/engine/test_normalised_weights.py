"""Weights that are normalised row by row before use: inputs go, and the gains keep every row's size."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from apoptosis import Apoptosis, shrink_
from families.functional import NormFree, ScaledStandard
from families.plant import enliven

LAYERS = {
    "standardised": ScaledStandard,
    "normalised": lambda *args, **more: nn.utils.parametrizations.weight_norm(nn.Conv2d(*args, **more)),
}


def network(kind: str) -> NormFree:
    torch.manual_seed(0)
    net = NormFree(LAYERS[kind]).double()
    enliven(net)
    return net


def images(seed: int, rows: int = 64) -> torch.Tensor:
    return torch.randn(rows, 3, 6, 6, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("kind", LAYERS)
def test_more_tolerance_removes_more_and_changes_little(kind: str) -> None:
    left = []
    for tolerance in (0.02, 0.2):
        net = network(kind).eval()
        before = copy.deepcopy(net)
        event = shrink_(net, images(0, 4), [images(1), images(2)], tolerance=tolerance, align=1)
        left.append(event.macs[1])
        x = images(3)
        with torch.no_grad():
            expected = before(x)
            change = (net(x) - expected).norm() / (expected - expected.mean(0)).norm()
        assert change <= 5 * tolerance, (tolerance, float(change), event.groups)
    assert left[1] < left[0] <= event.macs[0]


@pytest.mark.parametrize("kind", LAYERS)
def test_training_goes_on_through_events(kind: str) -> None:
    net = network(kind)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    apo = Apoptosis(net, optimizer, images(0, 4), total_steps=60, tolerance=0.4, align=1, calibration=0.0)
    losses = []
    for step in range(60):
        x = images(step)
        loss = (net(x) - x.mean((2, 3)) @ torch.ones(3, 4).double()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        apo.step()
        losses.append(float(loss.detach()))
    assert apo.ledger().events
    assert losses[-1] < losses[0]


def test_a_constant_channel_needs_another_one_under_rows_of_mean_zero() -> None:
    """Of two dead channels one goes: the other carries the weights that keep the rows' mean."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), ScaledStandard(8, 6, 1), nn.Flatten(), nn.Linear(216, 2)
    ).double()
    with torch.no_grad():
        for dead in (2, 5):
            net[0].weight[dead], net[0].bias[dead] = 0.0, -1.0
    before = copy.deepcopy(net)
    event = shrink_(net.eval(), images(0, 4), [images(1)], tolerance=0, align=1)
    assert event.groups["0"] == (8, 7), event.notes
    torch.testing.assert_close(net(images(2)), before(images(2)), rtol=1e-9, atol=1e-9)
