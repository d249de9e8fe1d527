"""Windows that overlap in memory, and weights that take a factor in their own place for evaluation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from apoptosis import shrink_
from apoptosis.graph import analyse


class Windows(nn.Module):
    """Attention in overlapping windows of memory, which lies in another order than the axes (Longformer)."""

    def __init__(self, gap: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (
            nn.Linear(12, 8),
            nn.Linear(12, 8),
            nn.Linear(12, 8),
            nn.Linear(8, 3),
        )
        self.gap = gap

    @staticmethod
    def chunk(x: Tensor) -> Tensor:
        x = x.view(x.size(0), x.size(1) // 4, 4, x.size(2))
        size, stride = list(x.size()), list(x.stride())
        size[1], stride[1] = size[1] * 2 - 1, stride[1] // 2
        return x.as_strided(size=size, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).transpose(0, 1) for layer in (self.query, self.key, self.value))  # (batch, length, ...)
        if self.gap:
            q = q[..., :4]
            return self.out(q.as_strided((q.shape[0], q.shape[1], 8), q.stride()))
        q, k, v = (self.chunk(y) for y in (q, k, v))
        return self.out(torch.einsum("bcxd,bcyd->bcxy", q, k).softmax(-1) @ v).mean(2)


class Rescaled(nn.Module):
    """As RWKV does for evaluation: weights are divided in their own place, and multiplied again for training."""

    def __init__(self, first: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.which, self.rescaled = (self.first if first else self.second), False

    def forward(self, x: Tensor) -> Tensor:
        if self.training == self.rescaled:
            with torch.no_grad():
                (self.which.weight.mul_ if self.rescaled else self.which.weight.div_)(4)
            self.rescaled = not self.rescaled
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def duplicate(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight[3], layer.bias[3] = layer.weight[1], layer.bias[1]


def open_groups(net: nn.Module, x: Tensor) -> set[str]:
    return {g.name for g in analyse(net, (x,)).groups if g.pin is None}


def test_overlapping_windows_are_followed_and_exact() -> None:
    torch.manual_seed(0)
    net = Windows().double()
    x = torch.randn(8, 16, 12).double()
    assert {"query", "value"} <= open_groups(net, x)
    for layer in (net.query, net.value):
        duplicate(layer)
    before = net(x).detach()
    event = shrink_(net, x, [x], tolerance=0)
    assert {name: kept for name, (_, kept) in event.groups.items()} == {"query": 7, "value": 7}
    assert (net(x) - before).abs().max() < 1e-12


def test_memory_between_the_elements_is_not_read() -> None:
    pins = {g.name: g.pin.reason for g in analyse(Windows(gap=True), (torch.randn(8, 16, 12),)).groups if g.pin}
    assert "reads memory beyond its operand" in pins["query"]


@pytest.mark.parametrize("first", [False, True])
def test_weights_that_take_a_factor_in_their_place_shrink(first: bool) -> None:
    torch.manual_seed(0)
    net, x = Rescaled(first).double(), torch.randn(64, 5).double()
    assert open_groups(net, x) == {"first", "second"}
    with torch.no_grad():
        net.second.bias.add_(0.5)  # none of them is always off
    for layer in (net.first, net.second):
        duplicate(layer)
    outputs = [net.train(mode)(x).detach() for mode in (False, True)]
    shrink_(net, x, [x], tolerance=0)
    assert (net.first.out_features, net.second.out_features) == (7, 5)
    assert not net.rescaled
    for mode, before in zip((False, True), outputs, strict=True):
        assert (net.train(mode)(x) - before).abs().max() < 1e-12
