"""Every activation of torch.nn has its rule, or pins by name."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.nn.modules import activation

from apoptosis.graph import analyse
from apoptosis.numerics.activations import NEURON_TYPES, NOT_ELEMENTWISE

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
MAKE = {
    "Threshold": lambda: nn.Threshold(0.1, 2.0),
    "PReLU": lambda: nn.PReLU(6),
    "GELU": lambda: nn.GELU(approximate="tanh"),
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "ELU": lambda: nn.ELU(1.3),
    "CELU": lambda: nn.CELU(1.4),
    "Hardtanh": lambda: nn.Hardtanh(-2.0, 3.0),
    "Softplus": lambda: nn.Softplus(2.0, 5.0),
    "Softshrink": lambda: nn.Softshrink(0.3),
    "Hardshrink": lambda: nn.Hardshrink(0.3),
    "RReLU": lambda: nn.RReLU(0.1, 0.3),
    "Softmax": lambda: nn.Softmax(-1),
    "Softmin": lambda: nn.Softmin(-1),
    "LogSoftmax": lambda: nn.LogSoftmax(-1),
}
ALL = [
    name
    for name, cls in vars(activation).items()
    if inspect.isclass(cls)
    and issubclass(cls, nn.Module)
    and cls.__module__ == activation.__name__
    and name != "Module"
]
ELEMENTWISE = [name for name in ALL if name not in NOT_ELEMENTWISE]


def test_the_list_is_the_one_of_torch() -> None:
    assert set(activation.__all__) <= set(ALL)
    assert len(ELEMENTWISE) >= 20


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_activations_let_channels_through(oracle, name: str) -> None:
    make = MAKE.get(name, getattr(nn, name))
    net = nn.Sequential(nn.Linear(8, 6), make(), nn.Linear(6, 3))
    structure = oracle(net, (X,), {"0": 6}, training=name != "RReLU")
    neuron = structure.groups[0].neuron
    assert neuron is not None
    kind = NEURON_TYPES[neuron.activation]
    assert kind.module == {"ReLU6": "Hardtanh", "SELU": "ELU"}.get(name, name)  # the operators they are made of
    if neuron.slopes is None:
        z = nn.functional.linear(X, net[0].weight, net[0].bias)
        torch.testing.assert_close(kind.phi(z, *kind.fill(neuron.args)), net[1].eval()(z))
    else:
        assert neuron.slopes == "1.weight"


@pytest.mark.parametrize("name", [n for n in NOT_ELEMENTWISE if "oft" in n and n != "Softmax2d"])
def test_softmax_over_channels_pins(name: str) -> None:
    structure = analyse(nn.Sequential(nn.Linear(8, 6), MAKE[name](), nn.Linear(6, 3)), (X,), {})
    pin = structure.groups[0].pin
    assert pin is not None
    assert "softmax" in pin.reason
    assert "normalises" in pin.reason


def test_softmax_over_positions_does_not() -> None:
    structure = analyse(nn.Sequential(nn.Linear(8, 6), nn.Softmax(1), nn.Linear(6, 3)), (X.view(2, 2, 8),), {})
    assert structure.groups[0].pin is None
    assert structure.groups[0].neuron is None


def test_softmax2d_pins() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Softmax2d(), nn.Conv2d(4, 2, 1))
    assert analyse(net, (torch.randn(2, 3, 4, 4),), {}).groups[0].pin is not None


def test_glu_ties_halves() -> None:
    structure = analyse(nn.Sequential(nn.Linear(8, 6), nn.GLU(), nn.Linear(3, 2)), (X,), {})
    assert structure.groups[0].pin is None
    assert structure.groups[0].num_channels == 3
    assert structure.groups[0].neuron is None


def test_two_activations_or_scaling_are_no_neuron() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * x

    for steps in ((nn.ReLU(), nn.Tanh()), (nn.ReLU(), Scaled()), (Scaled(),)):
        structure = analyse(nn.Sequential(nn.Linear(8, 6), *steps, nn.Linear(6, 3)), (X,), {})
        assert structure.groups[0].pin is None
        assert structure.groups[0].neuron is None


def test_no_activation_is_the_identity() -> None:
    structure = analyse(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)), (X,), {})
    assert structure.groups[0].neuron is not None
    assert structure.groups[0].neuron.activation == "identity"


def test_shared_slope_is_a_scalar() -> None:
    structure = analyse(nn.Sequential(nn.Linear(8, 6), nn.PReLU(), nn.Linear(6, 3)), (X,), {})
    assert structure.groups[0].neuron is not None
    assert structure.groups[0].neuron.slopes == "1.weight"
    assert {m.tensor for m in structure.groups[0].members} == {"0.weight", "0.bias"}


def test_functional_forms() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(nn.functional.gelu(self.a(x)))

    structure = analyse(Net(), (X,), {})
    assert structure.groups[0].neuron is not None
    assert structure.groups[0].neuron.activation == "gelu"
