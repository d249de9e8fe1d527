"""Tolerance 0 and those close to it: nothing that the given data shows alive goes, and more tolerance finds no less."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from apoptosis import Apoptosis, shrink_


def late_unit():
    """A network, one of whose units fires in inputs with a large first number alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        net[0].weight[7], net[0].bias[7] = torch.tensor([1.0, 0.0, 0.0, 0.0]), -5.0
    return net


class LateUnitInALoop(nn.Module):
    """The same read by a functional call, which is observed by running passes again."""

    def __init__(self):
        super().__init__()
        first, _, last = late_unit()
        self.first, self.weight = first, nn.Parameter(last.weight.detach().clone())

    def forward(self, x):
        return nn.functional.linear(self.first(x).relu(), self.weight)


@pytest.mark.parametrize("build", [late_unit, LateUnitInALoop])
def test_at_tolerance_0_every_batch_is_read(build):
    net = build()
    quiet = torch.randn(600, 4, generator=torch.Generator().manual_seed(1)).double().clamp(-3, 3)
    loud = quiet.clone()
    loud[0, 0] = 9.0
    before = net(loud)
    event = shrink_(net, quiet[:2], [*quiet.split(300)] * 4 + [loud], tolerance=0)
    torch.testing.assert_close(net(loud), before, rtol=0, atol=1e-12)
    assert not event
    event = shrink_(net, quiet[:2], [quiet], tolerance=0)  # what no batch shows cannot be known
    assert list(event.groups.values()) == [(8, 7)]
    assert "(600 rows)" in str(event)


class Residual(nn.Module):
    """Every second channel of its layers is a copy of another."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.out = nn.Linear(32, 4)
        duplicate(self.a, self.b, self.c)

    def forward(self, x):
        h = self.a(x).relu()
        return self.out((h + self.c(self.b(h).relu())).relu())


class Tied(nn.Module):
    """Copies in front of a weight that is the embedding table, too."""

    def __init__(self):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.table.weight
        duplicate(self.up, self.down)

    def forward(self, ids):
        h = self.table(ids)
        return self.head(h + self.down(self.up(h).relu()))


def duplicate(*layers):
    for layer in layers:
        half = layer.weight.shape[0] // 2
        with torch.no_grad():
            layer.weight[half:], layer.bias[half:] = layer.weight[:half], layer.bias[:half]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("build", [Residual, Tied])
def test_tolerances_that_float32_does_not_resolve_find_what_0_finds(build, dtype):
    kept = []
    for tolerance in (0, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        torch.manual_seed(1)
        net = build().to(dtype)
        x = torch.randint(0, 50, (64, 20)) if build is Tied else torch.randn(512, 8, dtype=dtype)
        event = shrink_(net, x[:2], [x], tolerance=tolerance)
        kept.append(sum(after for _, after in event.groups.values()))
        assert event.measured["output_rms"] < 1e-5
        assert len(event.groups) == (1 if build is Tied else 2)
    assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize("seed", range(3))
def test_more_tolerance_never_removes_less(seed):
    torch.manual_seed(seed)
    layers = [layer for _ in range(2) for layer in (nn.Linear(96, 96), nn.ReLU())]
    net = nn.Sequential(nn.Linear(16, 96), nn.ReLU(), *layers, nn.Linear(96, 5))
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    x = torch.randn(1024, 16)
    y = (x[:, 0] * x[:, 1] > 0).long() * 2 + (x[:, 2] > 0).long()
    for _ in range(60):
        rows = torch.randint(0, 1024, (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    left = []
    for tolerance in (0.05, 0.1, 0.2, 0.3, 0.5, 0.9):
        event = shrink_(copy.deepcopy(net), x[:2], [x], tolerance=tolerance)
        left.append(event.macs[1])
        assert event.measured["output_rms"] <= 0.25
    assert left == sorted(left, reverse=True)
    assert any("rolled back at tolerance 0.9" in note for note in event.notes)
    assert event.measured["output_rms"] > 0.15  # as much as the limit lets go


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_training_what_was_redundant_a_few_steps_ago_is_looked_at_again(dtype, norm):
    """A large learning rate: units die and come to life again within a window."""
    events = []
    for seed in range(4):
        torch.manual_seed(seed)
        norms = [nn.BatchNorm1d(32)] if norm else []
        net = nn.Sequential(nn.Linear(6, 32), *norms, nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        net = net.to(dtype)
        optimizer = torch.optim.SGD(net.parameters(), 0.5, momentum=0.9)
        apo = Apoptosis(net, optimizer, torch.zeros(4, 6, dtype=dtype), tolerance=0, total_steps=60, align=1,
                        calibration=1.0)  # fmt: skip
        for _ in range(60):
            x = torch.randn(64, 6, dtype=dtype)
            y = (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            if event := apo.step():
                events.append(event.measured["output_rms"])
        assert apo.ledger().rolled_back == 0
    assert events
    assert max(events) < (1e-12 if dtype == torch.float64 else 1e-5)
