"""Weights and biases that are shared, tied, computed or overwritten."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from apoptosis.graph import analyse

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, parametrizations.orthogonal])
def test_computed_weights_pin(wrap) -> None:
    structure = analyse(
        nn.Sequential(nn.Linear(8, 6), nn.ReLU(), wrap(nn.Linear(6, 4)), nn.ReLU(), nn.Linear(4, 2)), (X,), {}
    )
    assert all(g.pin is not None for g in structure.groups)


def test_tied_encoder_and_decoder_pin() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 6)

        def forward(self, x):
            return F.linear(self.a(x).relu(), self.a.weight.t())

    assert all(g.pin is not None for g in analyse(Tied(), (X,), {}).groups)


def test_one_weight_in_two_modules_pins_its_readers() -> None:
    net = nn.Sequential(
        nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)
    )
    net[4].weight = net[2].weight
    structure = analyse(net, (X,), {})
    assert structure.aliases == {"4.weight": "2.weight"}
    assert structure.groups[0].pin is not None
    assert "read elsewhere too" in structure.groups[0].pin.reason


def test_bias_that_another_reads_takes_no_offset() -> None:
    net = nn.Sequential(
        nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)
    )
    net[4].bias = net[2].bias
    structure = analyse(net, (X,), {})
    assert structure.groups[0].pin is None
    assert structure.groups[0].sites[0].bias is None


def test_weight_overwritten_in_the_forward_pass_pins() -> None:
    class Constrained(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.div_(self.weight.norm())
            return super().forward(x)

    structure = analyse(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), Constrained(6, 2)), (X,), {})
    assert structure.groups[0].pin is not None


def test_parameters_that_share_memory_pin() -> None:
    net = nn.Sequential(
        nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)
    )
    net[4].weight = nn.Parameter(net[2].weight.data)
    groups = analyse(net, (X,), {}).groups
    assert all(g.pin is not None for g in groups)
    assert groups[0].pin is not None
    assert groups[0].pin.reason == "'2.weight' and '4.weight' share memory without being one tensor"
