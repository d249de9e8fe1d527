"""Convolutions called as functions: which sites they are, who sees what they read, what stays pinned and why."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apoptosis import Apoptosis, shrink_
from apoptosis.graph import analyse
from apoptosis.observe.linear_map import gather_weight, sampled_site
from apoptosis.records import Group


class Same(nn.Conv2d):
    """A subclass that pads and convolves by itself."""

    fill = "constant"

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 0, 2), mode=self.fill), self.weight, self.bias, groups=self.groups)


def groups_of(net: nn.Module, x: Tensor) -> dict[str, Group]:
    return {g.name: g for g in analyse(net, (x,)).groups}


class Calls(nn.Module):
    """forward is given as a function of the module and its input."""

    def __init__(self, forward, **parts) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(6, 2, 1)
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self._function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self._function(self, self.first(x).relu()))


X = torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fill", ["constant", "reflect", "replicate"])
def test_a_subclass_that_pads_is_seen_by_a_hook(fill: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Same(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    net[2].fill = fill
    site = groups_of(net, X)["0"].sites[0]
    assert not site.functional
    assert site.conv is not None
    assert site.conv.padded == (((1, 1, 0, 2), fill),)
    assert site.zero_padded == (fill == "constant")
    assert (site.bias, site.norm) == ("2.bias", "3")


def test_what_changes_the_input_first_is_run_again() -> None:
    def forward(net: Calls, x: Tensor) -> Tensor:
        return F.conv2d(x * 2, net.weight)

    site = groups_of(Calls(forward, weight=torch.randn(6, 8, 3, 3)), X)["first"].sites[0]
    assert site.functional
    assert (site.taps, site.kind) == (9, "conv")

    class InPlace(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)  # the same memory, other numbers than the hook saw
            return F.conv2d(x, self.weight, self.bias)

    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh(), InPlace(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    with torch.no_grad():
        assert groups_of(nn.Sequential(net, nn.Flatten()), X)["0.0"].sites[0].functional


def test_a_weight_of_another_module_and_views_of_weights() -> None:
    def forward(net: Calls, x: Tensor) -> Tensor:
        x = F.conv2d(x, net.inner.weight, net.inner.bias, padding=1)
        return F.conv2d(x.relu(), net.point[..., None, None])

    found = groups_of(Calls(forward, inner=nn.Conv2d(8, 5, 3), point=torch.randn(6, 5)), X)
    assert all(found[name].pin is None for name in ("first", "inner", "point"))
    assert found["inner"].sites[0].key == ":point:1"
    assert found["first"].sites[0].bias == "inner.bias"


def test_two_strides_with_one_weight_stay_and_two_pads_are_run_again() -> None:
    def two(a: dict[str, object], b: dict[str, object]):
        def forward(net: Calls, x: Tensor) -> Tensor:
            one = F.conv2d(x, net.weight, **a).mean((2, 3), keepdim=True)
            return one + F.conv2d(x, net.weight, **b).mean((2, 3), keepdim=True)

        return forward

    apart = groups_of(Calls(two({"stride": 1}, {"stride": 2}), weight=torch.randn(6, 8, 3, 3)), X)
    assert "in several ways" in apart["first"].pin.reason
    assert apart["first"].pin.remedy
    alike = groups_of(Calls(two({}, {}), weight=torch.randn(6, 8, 3, 3)), X)
    assert alike["first"].pin is None


def test_the_response_is_that_of_the_module() -> None:
    """The exact response of a site is the operator's, restricted to channels, for every layout of the weight."""
    for transposed, groups in ((False, 1), (False, 2), (True, 1), (True, 2)):

        def forward(net: Calls, x: Tensor, transposed: bool = transposed, groups: int = groups) -> Tensor:
            convolve = F.conv_transpose2d if transposed else F.conv2d
            return convolve(x, net.weight, stride=2, padding=1, groups=groups)

        shape = (8, 6 // groups, 3, 3) if transposed else (6, 8 // groups, 3, 3)
        net = Calls(forward, weight=torch.randn(*shape)).double()
        group = groups_of(net, X.double())["first"]
        site = group.sites[0]
        sample = net.first(X.double()).relu().detach()
        shown = sampled_site(net, site, sample, net.weight)
        rms = shown._response(sample, shown._weight).square().mean(1).sum()
        expected = net._function(net, sample).movedim(1, 0).flatten(1).square().mean(1).sum()
        torch.testing.assert_close(rms, expected)
        assert gather_weight(site, net.weight).shape[1] == group.num_channels


def test_buffers_pin_and_equal_filters_do_not() -> None:
    def blurred(net: Calls, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, net.taps.expand(x.shape[1], 1, 3, 3), groups=x.shape[1]), net.weight)

    def mixed(net: Calls, x: Tensor) -> Tensor:
        return F.conv2d(x, net.taps)

    net = Calls(blurred, weight=torch.randn(6, 8, 1, 1))
    net.register_buffer("taps", torch.rand(1, 1, 3, 3))
    assert groups_of(net, X)["first"].pin is None
    net = Calls(mixed)
    net.register_buffer("taps", torch.rand(6, 8, 3, 3))
    assert "buffer 'taps'" in groups_of(net, X)["first"].pin.reason


def test_offsets_are_folded_where_no_zeros_lie_at_the_border() -> None:
    """A constant channel goes from in front of a convolution on a parameter; its bias takes the constant."""

    def forward(net: Calls, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), net.weight, net.bias).tanh()

    torch.manual_seed(0)
    net = Calls(forward, weight=torch.randn(6, 8, 3, 3), bias=torch.randn(6)).double()
    with torch.no_grad():
        net.first.weight[3], net.first.bias[3] = 0.0, 1.5
    before = copy.deepcopy(net)
    batch = torch.randn(64, 3, 7, 7).double()
    event = shrink_(net.eval(), batch[:4], [batch], tolerance=0, align=1)
    assert event.groups["first"][1] <= 7, event.notes
    torch.testing.assert_close(net(X.double()), before(X.double()), rtol=1e-9, atol=1e-9)


def test_zeros_at_the_border_are_seen() -> None:
    """A constant channel is none behind zeros that the forward pass pads with: it stays, or the outputs do."""

    def forward(net: Calls, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x * 1.5, (1, 1, 1, 1)), net.weight, net.bias).tanh()

    torch.manual_seed(0)
    net = Calls(forward, weight=torch.randn(6, 8, 3, 3), bias=torch.randn(6)).double()
    with torch.no_grad():
        net.first.weight[3], net.first.bias[3] = 0.0, 1.5
        net.first.weight[5], net.first.bias[5] = 2 * net.first.weight[4], 2 * net.first.bias[4]
    before = copy.deepcopy(net)
    batch = torch.randn(64, 3, 7, 7).double()
    event = shrink_(net.eval(), batch[:4], [batch], tolerance=0, align=1)
    assert event.groups["first"] == (8, 7), event.notes
    torch.testing.assert_close(net(X.double()), before(X.double()), rtol=1e-9, atol=1e-9)


def test_training_with_events_and_gradients() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Same(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), Same(16, 16, 3, groups=16), nn.ReLU(),
                        Same(16, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 49, 3))  # fmt: skip
    with torch.no_grad():
        for tensor in (net[0].weight, net[0].bias, net[3].weight, net[3].bias):
            tensor[8:] = tensor[:8]
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    apo = Apoptosis(net, optimizer, example_input=X, total_steps=40, align=1, calibration=0.0, tolerance=0.05)
    for step in range(40):
        x = torch.randn(32, 3, 7, 7, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        apo.step()
    assert net[0].out_channels == net[3].groups == net[3].in_channels == net[5].in_channels <= 8
    assert apo.ledger().events
