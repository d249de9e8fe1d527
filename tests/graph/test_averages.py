"""Momentum encoders and target networks inside the model: what they average stays, by name."""

import copy

import pytest
import torch
from torch import nn

from apoptosis import Apoptosis


def encoder():
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 8))


class Momentum(nn.Module):
    """Two encoders, one of which is an average of the other (MoCo, BYOL), and a head of its own."""

    def __init__(self, runs_copy):
        super().__init__()
        self.query = encoder()
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        self.runs_copy = runs_copy

    def forward(self, x):
        y = self.head(self.query(x))
        if self.runs_copy:
            with torch.no_grad():
                target = self.key(x).mean(1, keepdim=True)
            y = y + target
        return y

    @torch.no_grad()
    def update(self):
        for k, q in zip(self.key.parameters(), self.query.parameters(), strict=True):
            k.mul_(0.9).add_(q, alpha=0.1)


@pytest.mark.parametrize("runs_copy", [True, False])
def test_what_a_momentum_encoder_follows_stays_and_training_goes_on(runs_copy):
    torch.manual_seed(0)
    net = Momentum(runs_copy)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    apo = Apoptosis(net, optimizer, torch.zeros(2, 6), tolerance=0.1, total_steps=60, align=1, calibration=1.0)
    assert [group.name for group in apo.groups()] == ["head.0"]
    pin = next(pin for pin in apo.pins() if pin.group == "query.0")
    assert "'query.0.weight' is followed by the frozen copy 'key'" in str(pin) or "'query.0.bias'" in str(pin)
    assert "apo.follow(copy)" in str(pin)
    events = 0
    for _ in range(60):
        x = torch.randn(128, 6)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()
        net.update()
        events += bool(apo.step())
    assert events
    assert net.query[0].out_features == 32 > net.head[0].out_features


def test_layers_that_were_trained_apart_are_no_averages():
    """A stack of like layers, the first of which is frozen for fine-tuning."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
                        nn.Linear(32, 2))  # fmt: skip
    net[2].requires_grad_(False)
    apo = Apoptosis(net, torch.optim.SGD(net.parameters(), 0.1), torch.zeros(2, 6), total_steps=60)
    assert [group.name for group in apo.groups()] == ["4"]
