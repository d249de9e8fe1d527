"""Stacks of matrices with a bias for every matrix, added in the product itself (gates of RecurrentGemma)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apoptosis import shrink_
from apoptosis.graph import analyse


class Gates(nn.Module):
    """Blocks of one width, each with a matrix and a bias of its own, between two layers."""

    def __init__(self, inputs: int = 16, blocks: int = 3, width: int = 6) -> None:
        super().__init__()
        self.blocks = blocks
        self.enter = nn.Linear(inputs, blocks * width)
        self.weight = nn.Parameter(torch.randn(blocks, width, 5) / 2.5)
        self.bias = nn.Parameter(torch.randn(blocks, 5))
        self.leave = nn.Linear(blocks * 5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        h = h.reshape(x.shape[0], self.blocks, -1).permute(1, 0, 2)
        h = torch.baddbmm(self.bias[:, None, :], h, self.weight)
        return self.leave(torch.relu(h).permute(1, 0, 2).reshape(x.shape[0], -1))


def test_rows_and_columns_may_go() -> None:
    torch.manual_seed(0)
    net, x = Gates().double(), torch.randn(128, 16).double()
    pins = {g.name: g.pin for g in analyse(net, (x,)).groups}
    assert pins["enter"] is None
    assert pins["weight"] is None
    with torch.no_grad():
        for layer, width in ((net.enter, 6),):  # the same places in every block
            for block in range(3):
                layer.weight[block * width + 4] = layer.weight[block * width + 1]
                layer.bias[block * width + 4] = layer.bias[block * width + 1]
        net.weight[:, :, 3], net.bias[:, 3] = net.weight[:, :, 2], net.bias[:, 2]
        net.bias.add_(1.0)
    before = net(x).detach()
    event = shrink_(net, x, [x], tolerance=0)
    assert {name: counts for name, counts in event.groups.items() if counts[0] != counts[1]} == {
        "enter": (6, 5), "weight": (5, 4),
    }  # fmt: skip
    assert (net.weight.shape, net.bias.shape) == ((3, 5, 4), (3, 4))
    assert (net(x) - before).abs().max() < 1e-12
