"""Removals in front of padded convolutions, looked at where the padding is read: float64, the borders alone.

Holds: the whole way from a network to the smaller one. The theorem is tests/numerics/test_theorems.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apoptosis import shrink_

CASES = {
    "zeros": lambda: nn.Conv2d(8, 5, 3, padding=1),
    "zeros, wide": lambda: nn.Conv2d(8, 5, 3, padding=3),
    "zeros, dilated": lambda: nn.Conv2d(8, 5, 3, padding=2, dilation=2),
    "zeros, strided": lambda: nn.Conv2d(8, 5, 3, padding=1, stride=2),
    "zeros, without bias": lambda: nn.Conv2d(8, 5, 3, padding=1, bias=False),
    "same": lambda: nn.Conv2d(8, 5, 3, padding="same"),
    "transposed": lambda: nn.ConvTranspose2d(8, 5, 3, stride=2, padding=1),
    "reflected": lambda: nn.Conv2d(8, 5, 3, padding=1, padding_mode="reflect"),
    "wrapped": lambda: nn.Conv2d(8, 5, 3, padding=1, padding_mode="circular"),
}


def build(reader: nn.Module, planted: str) -> nn.Module:
    """A network whose last 3 of 8 channels are redundant behind the activation, and whose mean is far from zero."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 3).double()
    with torch.no_grad():
        if planted == "mixtures":
            mix = torch.randn(3, 5, dtype=torch.float64)
            first.bias.copy_(torch.full((8,), 2.0))
            first.weight[5:] = torch.einsum("oc,cikl->oikl", mix, first.weight[:5])
            first.bias[5:] = mix @ first.bias[:5]
        else:
            first.weight[5:], first.bias[5:] = 1.5 * first.weight[:3], 1.5 * first.bias[:3]
    act = nn.Identity() if planted == "mixtures" else nn.ReLU()
    return nn.Sequential(first, act, reader).double()


@pytest.mark.parametrize("planted", ["mixtures", "multiples"])
@pytest.mark.parametrize("name", CASES)
def test_the_border_is_exact(name: str, planted: str) -> None:
    net = build(CASES[name](), planted)
    x = torch.randn(320, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fresh = torch.randn(16, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.5
    before = net(fresh).detach()
    event = shrink_(net, x[:3], x.split(64), tolerance=0)
    assert event.groups["0"] == (8, 5)
    change = (net(fresh) - before).detach() / before.abs().max()
    border = torch.ones(before.shape[-2:], dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert float(change[..., border].abs().max()) <= 1e-10
    assert float(change.abs().max()) <= 1e-10


def test_constants_stay_in_front_of_zero_padding_and_go_in_front_of_none() -> None:
    for padding, kept in ((1, 8), (0, 7)):
        net = build(nn.Conv2d(8, 5, 3, padding=padding), "multiples")
        with torch.no_grad():  # seven channels that differ, one that is constant
            net[0].weight[5:] = torch.randn(3, 3, 3, 3, dtype=torch.float64)
            net[0].weight[7], net[0].bias[7] = 0.0, 1.0
        x = torch.randn(320, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        before = net(x).detach()
        shrink_(net, x[:3], x.split(64), tolerance=0)
        assert net[0].out_channels == kept
        assert float((net(x) - before).detach().abs().max()) <= 1e-10 * float(before.abs().max())
