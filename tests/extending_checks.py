"""Run by test_extending.py with one package or another on the path: one check per kind of addition."""

import json
import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import SGD

CHECKS: dict[str, Callable[[], None]] = {}


def check(what: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(function: Callable[[], None]) -> Callable[[], None]:
        CHECKS[what] = function
        return function

    return add


def twice(*middle: nn.Module) -> nn.Sequential:
    """A network whose first layer makes every channel twice."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 32), *middle, nn.Linear(32, 3))
    with torch.no_grad():
        network[0].weight[16:], network[0].bias[16:] = network[0].weight[:16], network[0].bias[:16]
    return network


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(256, 12, generator=generator) for _ in range(2)]


class Airy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.airy_ai(x)


@check("operator")
def operator() -> None:
    from apoptosis import shrink_

    event = shrink_(twice(Airy()), torch.zeros(2, 12), batches(), tolerance=0)
    assert event.groups == {"0": (32, 16)}


@check("module type with attributes")
def module_type() -> None:
    from apoptosis import shrink_

    class Gain(nn.LocalResponseNorm):
        """Of a stock type that has no rows of its own, with a number that only its user reads."""

        def __init__(self) -> None:
            super().__init__(size=32)
            self.weight = nn.Parameter(torch.ones(32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x * self.weight)

    network = twice(Gain())
    shrink_(network, torch.zeros(2, 12), batches(), tolerance=0)
    assert network[1].weight.shape == (16,)
    assert network[1].size == 16


class Sphere(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.spherical_bessel_j0(x)


@check("neuron type")
def neuron_type() -> None:
    from apoptosis.graph import analyse

    group = analyse(twice(Sphere()), (torch.zeros(2, 12),)).groups[0]
    assert group.neuron is not None
    assert group.neuron.activation == "sphere"


@check("optimizer")
def optimizer() -> None:
    from apoptosis import shrink_

    class HeavyBall(SGD):
        @torch.no_grad()
        def step(self, closure=None):  # type: ignore[no-untyped-def]
            for parameter in self.param_groups[0]["params"]:
                state = self.state[parameter]
                state["velocity"] = 0.9 * state.get("velocity", torch.zeros_like(parameter)) + parameter.grad
                parameter -= 1e-4 * state["velocity"]

    HeavyBall.__module__ = "torch.optim.heavy_ball"  # a class that torch has added
    network = twice(nn.ReLU())
    optimizer = HeavyBall(network.parameters(), lr=1e-4)
    with torch.no_grad():
        network[2].weight[:, 16:] = network[2].weight[:, :16]
    network(batches()[0]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = optimizer.state[network[0].weight]["velocity"].clone()
    event = shrink_(network, torch.zeros(2, 12), batches(), tolerance=0, criterion="pairwise", optimizer=optimizer)
    assert event.groups == {"0": (32, 16)}
    torch.testing.assert_close(optimizer.state[network[0].weight]["velocity"], before[:16] + before[16:])


@check("criterion")
def criterion() -> None:
    from apoptosis import shrink_

    network = twice(nn.ReLU())
    with torch.no_grad():
        network[2].weight[:, 20:] = 0.0
    shrink_(network, torch.zeros(2, 12), batches(), tolerance=0, criterion="largest")


@check("norm over channels")
def norm() -> None:
    from apoptosis import shrink_
    from apoptosis.modules import norms

    network, x = twice(norms.Damped(32)), batches()[0]
    before = network(x)
    event = shrink_(network, torch.zeros(2, 12), batches(), tolerance=1e-4, norm_widths="compensated")
    assert event.groups == {"0": (32, 16)}
    assert network[1].size == 16
    torch.testing.assert_close(network(x), before, rtol=1e-4, atol=1e-4)


class Box(nn.Module):
    """Keeps as many numbers as the network inside has parameters."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside
        self.set_up()

    def set_up(self) -> None:
        self.flat = [0.0] * sum(p.numel() for p in self.inside.parameters())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(x)


@check("wrapper")
def wrapper() -> None:
    from apoptosis import shrink_

    box = Box(twice(nn.ReLU()))
    event = shrink_(box, torch.zeros(2, 12), batches(), tolerance=0)
    assert event.groups == {"0": (32, 16)}
    assert len(box.flat) == sum(p.numel() for p in box.inside.parameters())


@check("report plot")
def report_plot() -> None:
    from apoptosis.tools.report.figures import PLOTS

    assert "steps" in PLOTS


@check("data set of the command")
def data_set() -> None:
    from apoptosis.tools.recipes.datasets import load_dataset

    assert len(load_dataset("half").test) > 0


@check("network of the command")
def network() -> None:
    from apoptosis.tools.recipes.networks import build_network

    assert [p.shape for p in build_network("narrow", (64,), 10).parameters() if p.ndim == 2] == [(16, 64), (10, 16)]


def said(function: Callable[[], None]) -> str:
    try:
        function()
    except Exception as error:  # noqa: BLE001 - what it was is the result
        return f"{type(error).__name__}: {error}" or "failed"
    return ""


if __name__ == "__main__":
    sys.stdout.write(json.dumps({what: said(function) for what, function in CHECKS.items()}))
