"""A further norm layer is a class with its entry in SHRUNK, and a row for the attribute that holds its width."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from apoptosis import load, register_attributes, save, shrink_
from apoptosis.graph import analyse
from apoptosis.graph.explain import OPT_IN
from apoptosis.modules import norms
from apoptosis.surgery import attributes


class Centred(nn.Module):
    """Takes the mean over all channels off and divides by a number; eps is not that of a mean square."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.eps, self.weight = width, 0.5, nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (1.0 + self.eps) * self.weight


class ShrunkCentred(norms._Compensated, Centred):
    def forward(self, x: Tensor) -> Tensor:
        by_mean, _, _ = self._sums(x)
        mean = ((x * by_mean).sum(-1, keepdim=True) + self.constant_sum) / self.full_width
        return (x - mean) / (1.0 + self.eps) * self.weight


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attributes, "_REGISTERED", dict(attributes._REGISTERED))
    monkeypatch.setitem(norms.SHRUNK, Centred, ShrunkCentred)
    register_attributes(Centred, [("weight", 0, "width")])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), Centred(16), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        net[0].weight[8:], net[0].bias[8:] = 2.0 * net[0].weight[:8], 2.0 * net[0].bias[:8]
    return net


def test_its_pin_names_the_way_out() -> None:
    net = network()
    net[1].eps = 1  # no float that a norm by the mean square could hold
    (pin,) = (group.pin for group in analyse(net, (torch.zeros(2, 6).double(),)).groups if group.name == "0")
    assert OPT_IN in pin.remedy
    assert "none of these" not in pin.remedy


def test_it_loses_channels_and_travels_in_checkpoints(tmp_path) -> None:
    net, x = network().eval(), torch.randn(300, 6, dtype=torch.float64)
    before = copy.deepcopy(net)(x).detach()
    assert "0" not in shrink_(copy.deepcopy(net), x[:3], [x], tolerance=0, align=1).groups
    event = shrink_(net, x[:3], [x], tolerance=0, align=1, norm_widths="compensated")
    assert event.groups.get("0") == (16, 8), event.notes  # half of them are multiples of the others
    assert (type(net[1]), net[1].width, net[1].full_width) == (ShrunkCentred, 8, 16)
    torch.testing.assert_close(net(x), before, rtol=1e-9, atol=1e-9)
    save(tmp_path / "net.safetensors", net)
    again = network()
    load(tmp_path / "net.safetensors", again)
    assert type(again[1]) is ShrunkCentred
    torch.testing.assert_close(again.eval()(x), before, rtol=1e-9, atol=1e-9)
