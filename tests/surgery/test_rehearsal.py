"""Widths that a model keeps in plain numbers: found before anything is removed, and followed by every event."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.swa_utils import AveragedModel

from apoptosis import Apoptosis, load, save, shrink_
from apoptosis.errors import ArgumentError, CheckpointError
from apoptosis.surgery import register_attributes
from apoptosis.surgery.attributes import _REGISTERED

HALF = 4


def conv(num_in, num_out, kernel=1):
    return nn.Sequential(
        nn.Conv2d(num_in, num_out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(num_out), nn.SiLU()
    )


class C2f(nn.Module):
    """As in YOLO: two parts of a convolution's channels, cut by a width of the block."""

    def __init__(self, num_in, num_out, style):
        super().__init__()
        self.c, self.style = num_out // 2, style
        self.widths, self.pair = [self.c, self.c], (self.c, 2 * self.c)
        self.cv1, self.cv2 = conv(num_in, 2 * self.c), conv(3 * self.c, num_out)
        self.inner = conv(self.c, self.c, 3)

    def forward(self, x):
        y = self.cv1(x)
        if self.style == "split":
            a, b = y.split((self.c, self.c), 1)
        elif self.style == "width":
            a, b = torch.split(y, self.c, dim=1)
        elif self.style == "slice":
            a, b = y[:, : self.c], y[:, self.c :]
        elif self.style == "list":
            a, b = torch.split(y, self.widths, dim=1)
        elif self.style == "tuple":
            a, b = y[:, : self.pair[0]], y[:, self.pair[0] : self.pair[1]]
        elif self.style == "narrow":
            a, b = y.narrow(1, 0, self.c), y.narrow(1, self.c, self.c)
        elif self.style == "view":
            a, b = y.view(y.shape[0], 2, self.c, *y.shape[2:]).unbind(1)
        else:
            sizes = [self.c] * 2  # which another line reads
            a, b = y.split(sizes, 1)
        return self.cv2(torch.cat((a, b, self.inner(b)), 1))


STYLES = ("split", "width", "slice", "list", "tuple", "narrow", "view", "elsewhere")


def network(style="split"):
    torch.manual_seed(0)
    net = nn.Sequential(
        conv(3, 8, 3), C2f(8, 16, style), C2f(16, 16, style), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                module.weight.uniform_(0.5, 2.0)
                module.bias.normal_()
    return net.double().eval()


def repeat(block: nn.Sequential, to: int, source: int) -> None:
    """Let one channel of a convolution with its norm be a copy of another."""
    with torch.no_grad():
        for tensor in (*block[0].parameters(), *block[1].parameters(), *block[1].buffers()):
            if tensor.dim():
                tensor[to] = tensor[source]


def width_of(block):
    return {"list": block.widths[0], "tuple": block.pair[0]}.get(block.style, block.c)


def planted(style):
    net = network(style)
    for block in (net[1], net[2]):
        width = block.c
        for first in (0, 1):  # two channels of every part are others' doubles
            repeat(block.cv1, first, first + 2)
            repeat(block.cv1, width + first, width + first + 2)
        repeat(block.inner, 0, 1)
    return net


def batch(rows=64):
    return torch.randn(rows, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("style", STYLES)
def test_a_width_in_an_attribute_follows_whatever_it_is_called(style, tmp_path):
    net, fresh = planted(style), network(style)
    x = batch()
    expected = net(x).detach()
    event = shrink_(net, x[:2], [x], tolerance=0)
    assert not any("broke the forward pass" in note for note in event.notes), event.notes
    for block in (net[1], net[2]):
        assert block.cv1[0].out_channels == 2 * width_of(block) <= 12, event.groups
    torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9)
    again = shrink_(net, x[:2], [x], tolerance=0.5)
    assert again
    assert net[1].cv1[0].out_channels == 2 * width_of(net[1])
    save(tmp_path / "net.safetensors", net)
    load(tmp_path / "net.safetensors", fresh)
    assert torch.equal(fresh(x), net(x))
    assert fresh[1].c == net[1].c
    assert fresh[1].widths == net[1].widths
    assert fresh[1].pair == net[1].pair


def test_a_run_follows_such_widths_and_in_averaged_copies_too(caplog):
    net = planted("slice")
    opt = Adam(net.parameters(), lr=1e-2)
    averaged = AveragedModel(net)
    x = batch(32)
    target = torch.randn(32, 3, dtype=torch.float64)
    apo = Apoptosis(net, opt, x[:2], tolerance=0.1, total_steps=40, align=1, calibration=0.0)
    apo.follow(averaged)
    net.train()
    with caplog.at_level(logging.WARNING):
        for _ in range(40):
            opt.zero_grad()
            (net(x) - target).square().mean().backward()
            opt.step()
            averaged.update_parameters(net)
            apo.step()
    assert apo.ledger().events >= 1
    assert not any("broke" in pin.reason for pin in apo.pins())
    assert net[1].c < 8
    assert averaged.module[1].c == net[1].c
    averaged.eval()
    assert averaged(x).shape == (32, 3)


class Res2Net(nn.Module):
    """Parts that are convolved one after the other, of a width and a number that the block keeps."""

    def __init__(self, width=8, scale=3):
        super().__init__()
        self.width, self.nums = width, scale - 1
        self.conv1 = conv(3, width * scale)
        self.convs = nn.ModuleList([conv(width, width, 3) for _ in range(self.nums)])
        self.conv3 = conv(width * scale, 5)

    def forward(self, x):
        parts = torch.split(self.conv1(x), self.width, 1)
        out = [parts[-1]]
        sp = parts[0]
        for i in range(self.nums):
            sp = self.convs[i](sp if i == 0 else sp + parts[i])
            out.append(sp)
        return self.conv3(torch.cat(out, 1)).mean((2, 3))


def test_the_width_of_a_part_follows():
    torch.manual_seed(0)
    net = Res2Net().double().eval()
    x = batch()
    assert shrink_(net, x[:2], [x], tolerance=0.3)
    assert net.width < 8
    assert net.conv1[0].out_channels == 3 * net.width
    assert net.nums == 2


class Parent(nn.Module):
    """The child cuts by a number that its parent hands it."""

    class Cut(nn.Module):
        def forward(self, x, at):
            return torch.tanh(x[:, :at]), x[:, at:]

    def __init__(self):
        super().__init__()
        self.a, self.cut = nn.Linear(6, 12), self.Cut()
        self.left = 5
        self.b, self.c = nn.Linear(5, 4), nn.Linear(7, 4)

    def forward(self, x):
        left, right = self.cut(self.a(x), self.left)
        return self.b(left) + self.c(right)


def test_the_number_may_be_a_parents():
    torch.manual_seed(0)
    net, x = Parent().double(), torch.randn(200, 6, dtype=torch.float64)
    with torch.no_grad():
        net.a.weight[1:3], net.a.bias[1:3] = net.a.weight[:1], net.a.bias[:1]
    expected = net(x).detach()
    assert shrink_(net, x[:2], [x], tolerance=0)
    assert net.left == 3
    assert net.b.in_features == 3
    torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9)


class Shared(nn.Module):
    """One number is the width of two groups: they shrink alike."""

    def __init__(self, frozen):
        super().__init__()
        self.wide = 8
        self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 8)
        self.out = nn.Linear(8 + 8, 8)
        self.more, self.last = nn.Linear(8, 5), nn.Linear(5, 3)
        self.frozen = frozen

    def forward(self, x):
        a, b = torch.tanh(self.a(x)), torch.tanh(self.b(x))
        a, b = a.reshape(-1, self.wide), b.reshape(-1, self.wide)
        out = self.last(torch.tanh(self.more(torch.tanh(self.out(torch.cat([a, b], 1))))))
        return (out, b) if self.frozen else out


@pytest.mark.parametrize("frozen", [False, True])
def test_groups_of_one_number_shrink_alike_or_not_at_all(frozen):
    torch.manual_seed(0)
    net, x = Shared(frozen).double(), torch.randn(300, 4, dtype=torch.float64)
    apo = Apoptosis(net, Adam(net.parameters()), x[:3], align=1)
    if frozen:
        pins = {pin.group: pin for pin in apo.pins()}
        assert "network's output" in pins["b"].reason
        assert pins["a"].reason.startswith(
            "they share the width that 'wide' of the model holds with 'b', which is pinned"
        )
    else:
        assert {group.name: group.tied_groups for group in apo.groups()} == {
            "a": ("b",),
            "b": ("a",),
            "out": (),
            "more": (),
        }
        assert shrink_(net, x[:3], [x], tolerance=0.1)
        assert net.a.out_features == net.b.out_features == net.wide < 8
    assert net(x) is not None


class Literal(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 10), nn.Linear(6, 8)
        self.out, self.outs = nn.Linear(4, 3), nn.Linear(18, 3)
        self.last = nn.Linear(3, 3)

    def forward(self, x):
        left, right = self.a(x).split([4, 4], 1)
        rest = torch.cat([torch.relu(self.b(x)), torch.relu(self.c(x))], 1)
        return self.last(torch.tanh(self.out(left * right) + self.outs(rest.view(-1, 18))))


def test_what_does_not_follow_is_pinned_at_construction_and_costs_no_event():
    torch.manual_seed(0)
    net, x = Literal(), torch.randn(300, 6)
    before = copy.deepcopy(net.state_dict())
    apo = Apoptosis(net, Adam(net.parameters()), x[:3], align=1)
    pins = {pin.group: pin for pin in apo.pins()}
    assert {"a", "b", "c"} <= set(pins)
    assert "test_rehearsal.py" in pins["a"].reason
    assert "register_attributes" in pins["a"].remedy
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    event = shrink_(net, x[:3], [x], tolerance=0.01)
    assert not any(note.startswith("rolled back") for note in event.notes)


class Cut(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.size = 2 * width  # a number that the search does not take for a width
        self.conv = nn.Linear(4, width)

    def forward(self, x):
        y, at = self.conv(x), self.size // 4  # on another line than it is used
        return y[:, :at] * y[:, at:]


@pytest.fixture
def registered():
    yield lambda kind, rows: register_attributes(kind, rows)
    _REGISTERED.pop(Cut, None)


def test_rows_may_name_a_tensor_of_a_module_inside(registered):
    def made():
        torch.manual_seed(0)
        net = nn.Sequential(Cut(8), nn.Linear(4, 3)).double()
        with torch.no_grad():
            for row in (0, 4):
                net[0].conv.weight[row + 1], net[0].conv.bias[row + 1] = net[0].conv.weight[row], net[0].conv.bias[row]
        return net

    x = torch.randn(200, 4, dtype=torch.float64)
    net = made()
    assert not shrink_(net, x[:2], [x], tolerance=0)
    registered(Cut, [("conv.weight", 0, "size")])
    net = made()
    expected = net(x).detach()
    assert shrink_(net, x[:2], [x], tolerance=0)
    assert net[0].size == 2 * net[0].conv.out_features == 12
    torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (("conv.wieght", 0, "size"), "'0' has no parameter or buffer 'conv.wieght'"),
        (("conf.weight", 0, "size"), "'0' has no parameter or buffer 'conf.weight'"),
        (("conv.weight", 0, "sizes"), "'0' has no attribute 'sizes'"),
    ],
)
def test_rows_that_name_nothing_are_refused(registered, row, text):
    registered(Cut, [row])
    net, x = nn.Sequential(Cut(8), nn.Linear(4, 3)), torch.randn(20, 4)
    with pytest.raises(ArgumentError, match=text):
        Apoptosis(net, Adam(net.parameters()), x)
    with pytest.raises(ArgumentError, match=text):
        shrink_(net, x, [x], tolerance=0)


def test_a_checkpoint_gives_no_attribute_a_value_that_is_no_width_here(tmp_path):
    net, fresh = planted("split"), network("split")
    x = batch()
    assert shrink_(net, x[:2], [x], tolerance=0)
    save(tmp_path / "net.safetensors", net)
    fresh[1].c = "eight"
    with pytest.raises(CheckpointError, match="no width in attribute 'c'"):
        load(tmp_path / "net.safetensors", fresh)


def test_a_trial_leaves_model_and_buffers_as_they_were():
    net = network("split")
    x: Tensor = batch(4)
    before = {
        name: (id(value), value.data_ptr(), value.clone()) for name, value in net.state_dict(keep_vars=True).items()
    }
    attributes = [dict(vars(module)) for module in net.modules()]
    Apoptosis(net, Adam(net.parameters()), x, align=1).close()
    for name, value in net.state_dict(keep_vars=True).items():
        assert (id(value), value.data_ptr()) == before[name][:2]
        assert torch.equal(value, before[name][2])
    for module, old in zip(net.modules(), attributes, strict=True):
        assert vars(module).keys() == old.keys()
        assert all(vars(module)[key] is value for key, value in old.items())
