"""Weights times a number: followed as the weight itself, with the factor known; and linear layers that make maps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apoptosis import shrink_
from apoptosis.graph import analyse
from apoptosis.records import Group

Scale = Callable[[Tensor, Tensor], Tensor]
SCALES: dict[str, tuple[Scale, float]] = {
    "times": (lambda w, g: w * 0.5, 0.5),
    "times, first": (lambda w, g: 0.5 * w, 0.5),
    "divided": (lambda w, g: w / 4.0, 0.25),
    "twice": (lambda w, g: -(w * 3.0) / 2.0, -1.5),
    "learned": (lambda w, g: w * g, 1.25),
    "by its size": (lambda w, g: w / math.sqrt(w[0].numel()), 8**-0.5),
}


class Scaled(nn.Module):
    def __init__(self, scale: Scale, kind: str) -> None:
        super().__init__()
        self.first, self.norm, self.gain = nn.Linear(4, 8), nn.BatchNorm1d(6), nn.Parameter(torch.tensor(1.25))
        self.weight = nn.Parameter(torch.randn(6, 8))
        self.bias = None if kind == "norm" else nn.Parameter(torch.randn(6))
        self.last, self.scale, self.kind = nn.Linear(6, 3), scale, kind

    def forward(self, x: Tensor) -> Tensor:
        x, w = torch.tanh(self.first(x)), self.scale(self.weight, self.gain)
        if self.kind == "linear":
            return self.last(torch.tanh(F.linear(x, w, self.bias)))
        x = F.conv1d(x[..., None], w[..., None], self.bias if self.kind == "conv" else None)[..., 0]
        return self.last(torch.tanh(self.norm(x) if self.kind == "norm" else x))


def groups_of(net: nn.Module, x: Tensor) -> dict[str, Group]:
    return {g.name: g for g in analyse(net, (x,)).groups}


@pytest.mark.parametrize("kind", ["linear", "conv", "norm"])
@pytest.mark.parametrize("name", SCALES)
def test_redundancy_goes_and_constants_are_folded_with_the_factor(name: str, kind: str) -> None:
    torch.manual_seed(0)
    scale, factor = SCALES[name]
    net = Scaled(scale, kind).double().eval()
    with torch.no_grad():
        net.first.weight[1], net.first.bias[1] = net.first.weight[0], net.first.bias[0]
        net.first.weight[2], net.first.bias[2] = 0.0, 0.7
        for leaf in (
            net.weight,
            *([] if net.bias is None else [net.bias]),
            net.norm.weight,
            net.norm.bias,
            net.norm.running_mean,
            net.norm.running_var,
        ):
            leaf[4] = leaf[3]
    site = groups_of(net, torch.randn(5, 4).double())["first"].sites[0]
    assert site.factors[0] == pytest.approx(factor)
    batch = torch.randn(300, 4).double()
    before = copy.deepcopy(net)
    event = shrink_(net, batch[:4], [batch], tolerance=0, align=1)
    constants = 0 if name == "learned" else 1  # nothing is folded with a number that training changes
    assert event.groups["first"] == (8, 7 - constants), event.notes
    assert len(net.weight) == 5
    x = torch.randn(9, 4).double()
    torch.testing.assert_close(net(x), before(x), rtol=1e-10, atol=1e-10)


def test_other_readers_of_the_weight_pin_it() -> None:
    def scale(w: Tensor, g: Tensor) -> Tensor:
        return w * w.abs().max()

    group = groups_of(Scaled(scale, "linear"), torch.randn(5, 4))["first"]
    assert group.pin is not None


def test_gradients_follow_a_factor_that_follows_the_size() -> None:
    torch.manual_seed(0)
    net = Scaled(SCALES["by its size"][0], "linear").double()
    with torch.no_grad():
        net.first.weight[4:], net.first.bias[4:] = net.first.weight[:4], net.first.bias[:4]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(300, 4).double()
    net(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        net.first.weight[4:], net.first.bias[4:] = net.first.weight[:4], net.first.bias[:4]
    momentum = optimizer.state[net.weight]["momentum_buffer"].clone()
    event = shrink_(net.eval(), x[:4], [x], tolerance=0, align=1, optimizer=optimizer)
    kept = event.groups["first"][1]
    assert kept == 4
    ratio = math.sqrt(8 / kept)  # the weight is divided by a smaller root now, and took its inverse
    new = optimizer.state[net.weight]["momentum_buffer"] / ratio
    distance = torch.cdist(new.T, momentum.T)  # which of two duplicates stays is not said
    assert float(distance.min(1).values.max()) < 1e-9


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda width: nn.GroupNorm(width, width)])
def test_a_linear_layer_that_makes_maps_goes_channel_by_channel(norm: Callable[[int], nn.Module]) -> None:
    net = nn.Sequential(nn.Linear(4, 45), nn.Unflatten(1, (5, 3, 3)), norm(5), nn.ReLU(), nn.Conv2d(5, 2, 3))
    group = groups_of(net, torch.randn(6, 4))["0"]
    assert group.pin is None
    assert group.num_channels == 5
    assert {m.tensor: m.positions.shape for m in group.members}["0.weight"] == (5, 9)
