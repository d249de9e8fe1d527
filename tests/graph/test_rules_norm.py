"""Normalisations of activations and of weights: what each channel has to itself stays free, the rest pins by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from apoptosis import shrink_
from apoptosis.graph import analyse
from apoptosis.records import Pin

GEN = torch.Generator().manual_seed(0)
X, SEQ = torch.randn(4, 8, generator=GEN), torch.randn(4, 5, 8, generator=GEN)
IMG = torch.randn(3, 3, 6, 6, generator=GEN)


class ChannelNorm(nn.Module):
    """Group normalisation with one group per channel, whatever the width."""

    def __init__(self, width: int, block: int = 1) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.randn(width))
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, x.shape[1] // self.block, self.weight, self.bias)


class Instance(nn.InstanceNorm2d):
    """Instance normalisation that does not look at num_features."""

    def forward(self, x: Tensor) -> Tensor:
        own = self.training or not self.track_running_stats
        return F.instance_norm(x, self.running_mean, self.running_var, self.weight, self.bias, own)


def images(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)
    )


class Sequences(nn.Module):
    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor], **modules) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(8, 6), nn.Linear(6, 2), between
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self, self.a(x)))


def pin_of(model: nn.Module, x: Tensor, name: str) -> Pin:
    pin = next(g.pin for g in analyse(model, (x,), {}).groups if g.name == name)
    assert pin is not None
    return pin


CHANNELWISE = {
    "group": lambda: ChannelNorm(6),
    "instance": lambda: Instance(6),
    "instance, affine": lambda: Instance(6, affine=True),
    "instance, tracked": lambda: Instance(6, affine=True, track_running_stats=True),
    "synchronised batch": lambda: nn.SyncBatchNorm(6),
    "layer, over positions": lambda: nn.LayerNorm([4, 4]),
    "rms, over positions": lambda: nn.RMSNorm([4, 4]),
}


@pytest.mark.parametrize("name", CHANNELWISE)
def test_a_norm_of_each_channel_lets_channels_through(oracle, name: str) -> None:
    norm = CHANNELWISE[name]()
    structure = oracle(images(norm), (IMG,), {"0": 6, "3": 4})
    members = {m.tensor for m in structure.groups[0].members}
    own = {f"1.{leaf}" for leaf in dict(norm.named_parameters()) if not name.endswith("positions")}
    assert members >= own
    assert ("1.running_var" in members) == (getattr(norm, "running_var", None) is not None)
    assert structure.groups[0].neuron is None or name.startswith("synchronised")


def test_group_norm_of_flat_maps_is_one_of_channels_where_blocks_are_channels(oracle) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 5), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).flatten(1)
            return self.b(F.group_norm(h, h.shape[1] // 4))

    oracle(Flat(), (IMG,), {"a": 4})


def test_the_number_of_groups_is_noted_as_one_of_channels() -> None:
    structure = analyse(images(nn.GroupNorm(6, 6, affine=False)), (IMG,), {})
    assert structure.groups[0].pin is None
    (split,) = (s for s in structure.splits if s.module == "1")
    assert split.classes.tolist() == [structure.classes["0.weight"][0].tolist()]


def test_gains_that_a_layer_makes_go_with_the_channels(oracle) -> None:
    class Adaptive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.g, self.b = nn.Conv2d(3, 6, 1), nn.Linear(8, 6), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor, style: Tensor) -> Tensor:
            return self.b(F.group_norm(h := self.a(x), h.shape[1], self.g(style)))

    structure = oracle(Adaptive(), (IMG, X[0]), {"a": 6})
    assert {m.tensor for m in structure.groups[0].members} == {"a.weight", "a.bias", "g.weight", "g.bias"}


def test_group_norm_over_one_block_pins_with_the_remedy() -> None:
    pin = pin_of(images(nn.GroupNorm(1, 6)), IMG, "0")
    assert pin.num_channels == 6
    assert "aten.native_group_norm in '1' normalises over channels, 6 at a time" in pin.reason
    assert "num_groups=6" in pin.remedy


def test_group_norm_over_blocks_lets_whole_blocks_go(oracle) -> None:
    oracle(images(ChannelNorm(6, 2)), (IMG,), {"0": 3, "3": 4})
    structure = analyse(images(nn.GroupNorm(2, 6)), (IMG,), {})
    first = structure.groups[0]
    assert (first.name, first.num_channels, len(first.sites)) == ("0", 2, 1)
    assert {m.tensor for m in first.members} >= {"0.weight", "1.weight", "1.bias"}
    assert next(m for m in first.members if m.tensor == "1.weight").positions.tolist() == [[0, 1, 2], [3, 4, 5]]
    (split,) = (s for s in structure.splits if s.module == "1")
    assert split.classes.shape == (2, 3)


def test_blocks_of_several_norms_are_taken_together(oracle) -> None:
    """Blocks of two and of three channels share some: six go at a time."""
    norms = nn.Sequential(ChannelNorm(12, 2), ChannelNorm(12, 3))
    net = nn.Sequential(nn.Conv2d(3, 12, 1), norms, nn.Conv2d(12, 2, 1))
    oracle(net, (IMG,), {"0": 2})


def test_a_block_that_the_input_reaches_into_is_pinned() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(3, 9, 1), nn.GroupNorm(3, 12), nn.Conv2d(12, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(torch.cat([x, self.a(x)], 1)))

    pin = pin_of(Beside(), IMG, "a")
    assert "normalises" in pin.reason or "values that are none" in pin.reason


@pytest.mark.parametrize("norm", [nn.GroupNorm(3, 12), nn.GroupNorm(3, 12, affine=False), ChannelNorm(12, 4)])
def test_a_block_that_is_there_twice_goes_exactly(norm: nn.Module) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 3), norm, nn.ReLU(), nn.Conv2d(12, 2, 1)).double()
    with torch.no_grad():
        for tensor in (net[0].weight, net[0].bias, *norm.parameters()):
            tensor[8:] = tensor[:4]
    x = torch.randn(40, 3, 6, 6, dtype=torch.float64)
    before = net(x).detach()
    event = shrink_(net, x[:4], [x], tolerance=0)
    assert event.groups == {"0": (3, 2)}
    assert net[0].out_channels == 8
    assert getattr(norm, "num_groups", 2) == 2
    torch.testing.assert_close(net(x).detach(), before, rtol=1e-10, atol=1e-10)


def test_a_written_number_of_groups_is_refused_and_undone() -> None:
    class Literal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.group_norm(x, 3)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 3), Literal(), nn.ReLU(), nn.Conv2d(12, 2, 1)).double()
    with torch.no_grad():
        for tensor in (net[0].weight, net[0].bias):
            tensor[8:] = tensor[:4]
    x = torch.randn(40, 3, 6, 6, dtype=torch.float64)
    before = net(x).detach()
    event = shrink_(net, x[:4], [x], tolerance=0)
    assert not event
    assert any("broke the forward pass" in note for note in event.notes)
    assert torch.equal(net(x).detach(), before)


def by_hand(m: nn.Module, h: Tensor) -> Tensor:
    centred = h - h.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.var(-1, keepdim=True) + 1e-5)


OVER = {
    "layer": (lambda m, h: m.n(h), {"n": nn.LayerNorm(6)}, "native_layer_norm in 'n'"),
    "functional layer": (lambda m, h: F.layer_norm(h, (6,)), {}, "native_layer_norm"),
    "rms": (lambda m, h: m.n(h), {"n": nn.RMSNorm(6)}, "mean in 'n'"),
    "layer by hand": (by_hand, {}, "mean"),
    "rms by hand": (lambda m, h: h * h.pow(2).mean(-1, keepdim=True).rsqrt(), {}, "mean"),
    "variance and mean": (lambda m, h: h - torch.var_mean(h, -1, keepdim=True)[1], {}, "var_mean"),
    "standard deviation": (lambda m, h: h / h.std(-1, keepdim=True), {}, "std"),
    "layer over everything": (lambda m, h: F.layer_norm(h, h.shape[1:]), {}, "native_layer_norm"),
}


@pytest.mark.parametrize("name", OVER)
def test_norms_over_channels_pin_with_operator_line_and_remedy(name: str) -> None:
    between, modules, operator = OVER[name]
    pin = pin_of(Sequences(between, **modules), SEQ, "a")
    assert f"aten.{operator}" in pin.reason
    assert "normalises over channels" in pin.reason
    assert pin.where.startswith("test_rules_norm.py:")
    assert "BatchNorm" in pin.remedy


def test_the_norm_belongs_to_the_pinned_group() -> None:
    structure = analyse(Sequences(lambda m, h: m.n(h), n=nn.LayerNorm(6)), (SEQ,), {})
    group = structure.groups[0]
    assert {m.tensor for m in group.members} == {"a.weight", "a.bias", "n.weight", "n.bias"}
    assert [site.weight for site in group.sites] == ["b.weight"]


def test_local_response_norm_pins() -> None:
    pin = pin_of(images(nn.LocalResponseNorm(3)), IMG, "0")
    assert "in '1' normalises over channels that are neighbours" in pin.reason
    assert pin.remedy


class Standardised(nn.Conv2d):
    """Weight standardisation: every row has mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        w = w / (w.std(dim=(1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias)


class StandardisedFlat(nn.Conv2d):
    """The same, as it was published first: the deviation taken of the flattened rows."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
        w = w / (self.weight.view(self.weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5)
        return F.conv2d(x, w, self.bias)


class StandardisedByNorm(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, F.layer_norm(self.weight, self.weight.shape[1:]), self.bias)


class Equalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.3, self.bias)


def linear(width_in: int, width_out: int) -> nn.Linear:
    return nn.Linear(width_in, width_out)


LINEARS = {
    "weight norm": lambda i, o: parametrizations.weight_norm(linear(i, o)),
}


def test_a_weight_times_a_number_is_the_weight(oracle) -> None:
    net = nn.Sequential(linear(8, 6), nn.ReLU(), Equalised(6, 4), nn.ReLU(), linear(4, 2))
    structure = oracle(net, (X,), {"0": 6, "2": 4})
    assert structure.groups[1].neuron is None  # its rows are not what is multiplied


@pytest.mark.parametrize("name", LINEARS)
def test_rows_of_computed_weights_are_channels(oracle, name: str) -> None:
    make = LINEARS[name]
    net = nn.Sequential(linear(8, 6), nn.ReLU(), make(6, 4), nn.ReLU(), linear(4, 2))
    structure = oracle(net, (X,), {"0": 6, "2": 4})
    group = next(g for g in structure.groups if g.name == "2")
    assert group.members[0].role == "producer"
    assert group.neuron is None  # its rows are not what is multiplied
    (site,) = next(g for g in structure.groups if g.name == "0").sites
    assert site.normal is not None
    assert not site.normal.centred


@pytest.mark.parametrize("name", LINEARS)
def test_rows_of_computed_weights_have_a_price(name: str) -> None:
    net = nn.Sequential(linear(8, 6), nn.ReLU(), LINEARS[name](6, 4), nn.ReLU(), linear(4, 2))
    group = next(g for g in analyse(net, (X,), {}).groups if g.name == "2")
    assert group.macs_per_channel == X.shape[0] * (6 + 2)  # what makes a channel, what reads it


def test_pruned_rows_take_their_mask_along() -> None:
    net = nn.Sequential(linear(8, 6), prune.random_unstructured(linear(6, 4), "weight", 0.3), linear(4, 2))
    group = next(g for g in analyse(net, (X,), {}).groups if g.name == "1")
    assert group.pin is None
    assert {m.tensor for m in group.members} == {"1.weight_orig", "1.weight_mask", "1.bias"}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_the_old_weight_norm_alike() -> None:
    net = nn.Sequential(linear(8, 6), nn.ReLU(), nn.utils.weight_norm(linear(6, 4)), nn.ReLU(), linear(4, 2))
    with torch.no_grad():
        net(X)
    structure = analyse(net, (X,), {})
    group = next(g for g in structure.groups if g.name == "2")
    assert group.pin is None
    assert {m.tensor for m in group.members} == {"2.weight_v", "2.weight_g", "2.bias"}
    assert next(g for g in structure.groups if g.name == "0").pin is None


KERNELS = {
    "weight norm": lambda i, o: parametrizations.weight_norm(nn.Conv2d(i, o, 2)),
    "standardised": lambda i, o: Standardised(i, o, 2),
    "standardised, flattened": lambda i, o: StandardisedFlat(i, o, 2),
    "standardised by a norm": lambda i, o: StandardisedByNorm(i, o, 2),
}


@pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)
def test_rows_of_computed_kernels_are_channels(oracle, make) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 2), nn.ReLU(), make(6, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    )
    structure = oracle(net, (IMG,), {"0": 6, "2": 4} if make is KERNELS["weight norm"] else {"2": 4})
    assert structure.groups[1].members[0].macs > 0


def test_rows_of_one_size_without_a_gain_take_over_for_no_input() -> None:
    class Flat(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            rows = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
            return F.conv2d(x, rows.reshape_as(self.weight), self.bias)

    net = nn.Sequential(nn.Conv2d(3, 6, 2), nn.ReLU(), Flat(6, 4, 2), nn.ReLU(), nn.Conv2d(4, 2, 1))
    pin = pin_of(net, IMG, "0")
    assert "normalises each row of '2.weight' over them" in pin.reason
    assert "gain" in pin.remedy
    assert next(g for g in analyse(net, (IMG,), {}).groups if g.name == "2").pin is None


def test_a_gain_that_serves_twice_pins() -> None:
    class Twice(nn.Conv2d):
        def __init__(self, *args: int) -> None:
            super().__init__(*args)
            self.gain = nn.Parameter(torch.rand(self.out_channels))

        def forward(self, x: Tensor) -> Tensor:
            rows = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, self.gain, training=True)
            return F.conv2d(x, rows.reshape_as(self.weight)) + self.gain[:, None, None]

    net = nn.Sequential(nn.Conv2d(3, 6, 2), nn.ReLU(), Twice(6, 4, 2), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert "'2.gain' is the gain of rows that are normalised, and is read elsewhere too" in pin_of(net, IMG, "0").reason


PARAMETRIZED = {
    "spectral norm": (parametrizations.spectral_norm, "remove_parametrizations(2, 'weight')"),
    "orthogonal": (parametrizations.orthogonal, "remove_parametrizations(2, 'weight')"),
    "old spectral norm": (nn.utils.spectral_norm, "remove_spectral_norm(2)"),
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.3), "prune.remove(2, 'weight')"),
}


def parametrized(name: str) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(linear(8, 6), nn.ReLU(), PARAMETRIZED[name][0](linear(6, 4)), nn.ReLU(), linear(4, 2))


@pytest.mark.filterwarnings("ignore:.*(spectral|weight)_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_what_a_computed_weight_reads_is_pinned(name: str) -> None:
    structure = analyse(parametrized(name), (X,), {})
    (first,) = (g for g in structure.groups if g.name == "0")
    assert first.pin is not None
    assert "in '2'" in first.pin.reason
    assert first.pin.remedy
    rows = [g for g in structure.groups if g.name.startswith("2")]
    if name == "pruned":
        assert [(g.num_channels, g.pin) for g in rows] == [(4, None)]
    else:  # every row depends on all others
        assert rows
        assert all(g.pin is not None for g in rows)


@pytest.mark.filterwarnings("ignore:.*(spectral|weight)_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_what_a_computed_weight_reads_is_pinned_with_the_way_out(name: str) -> None:
    pins = {g.name: g.pin for g in analyse(parametrized(name), (X,), {}).groups}
    assert pins["0"] is not None
    assert PARAMETRIZED[name][1] in pins["0"].remedy


def test_a_norm_over_the_rows_pins_the_rows() -> None:
    net = nn.Sequential(linear(8, 6), parametrizations.weight_norm(linear(6, 4), dim=None), linear(4, 2))
    pin = pin_of(net, X, "1")
    assert "reduces over channels" in pin.reason or "before it is used" in pin.reason


def test_a_buffer_of_numbers_stays_a_table() -> None:
    net = Sequences(lambda m, h: h.masked_fill(m.mask[: h.shape[1], :1] == 0, 0.0))
    net.register_buffer("mask", torch.tril(torch.ones(5, 5)))
    assert analyse(net, (SEQ,), {}).groups[0].pin is None
