"""What an output pins beside the layer that makes it: the pin says which output, and what ties the channels to it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from apoptosis.graph import analyse


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        h = torch.relu(self.first(x))
        h = h + torch.tanh(self.second(h))
        return {"scores": h.sum(1, keepdim=True) * 0 + 1.0, "picture": h + torch.tanh(self.third(h))}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.code = nn.Linear(6, 5)
        self.middle = nn.Linear(5, 6)

    def forward(self, x):
        return F.linear(torch.relu(self.middle(torch.relu(self.code(x)))), self.code.weight)


def pins(net, x):
    return {g.name: g.pin for g in analyse(net, (x,)).groups if g.pin is not None}


def test_a_residual_sum_is_named_with_its_output():
    class Plain(Residual):
        def forward(self, x):
            h = torch.relu(self.first(x))
            h = h + torch.tanh(self.second(h))
            return {"none": None, "picture": h + torch.tanh(self.third(h))}

    pin = pins(Plain(), torch.randn(3, 4))["first"]
    assert pin.reason.startswith("they are the network's output 'picture', tied to it by operator aten.add")
    assert pin.where.startswith("test_output_paths.py:")
    assert "A layer behind it would free it" in pin.remedy


def test_what_is_put_out_itself_needs_no_more_words():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    assert pins(net, torch.randn(3, 4))["2"].reason == "they are the network's output"


def test_sums_on_the_way_are_counted():
    torch.manual_seed(0)

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(4, 6)
            self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            h = self.stem(x)
            for block in self.blocks:
                h = torch.tanh(block(h)) + h
            return (h,)

    reason = pins(Deep(), torch.randn(3, 4))["stem"].reason
    assert reason.startswith("they are the network's output '[0]', tied to it by operator aten.add")


def test_a_weight_that_serves_twice_is_named():
    reason = pins(Tied(), torch.randn(3, 6))["code"].reason
    assert reason.startswith("they are the network's output") or "is read elsewhere too" in reason
    assert "'code.weight'" in reason


def test_pins_under_norms_name_the_option_that_frees_them_or_why_it_does_not():
    class Own(nn.LayerNorm):
        def forward(self, x):
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    class Functional(nn.Module):
        def forward(self, x):
            return F.layer_norm(x, (6,))

    def remedy(norm):
        net = nn.Sequential(nn.Linear(4, 6), norm, nn.Linear(6, 2))
        return pins(net, torch.randn(3, 4))["0"].remedy

    for norm in (nn.LayerNorm(6), nn.RMSNorm(6)):
        assert remedy(norm).endswith("norm_widths='compensated' lets go what the norm's statistics can do without.")
    assert remedy(Own(6)).endswith("this norm is none of these (Own has a forward pass of its own).")
    assert "norm_widths='compensated'" in remedy(Functional())


def test_a_convolution_over_channels_says_what_holds_them_and_frees_what_lies_inside():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

        def forward(self, x):
            y = self.conv(x.mean((2, 3)).view(x.shape[0], 1, -1))
            return x * torch.sigmoid(y).view(x.shape[0], -1, 1, 1)

    net = nn.Sequential(
        nn.Conv2d(3, 6, 1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3),
        Attention(),
        nn.Conv2d(8, 5, 1),
        nn.Flatten(),
        nn.Linear(80, 2),
    )
    structure = analyse(net, (torch.randn(2, 3, 6, 6),))
    groups = {g.name: g for g in structure.groups}
    assert groups["2"].pin is not None
    assert "aten.convolution in '3.conv' slides over channels" in groups["2"].pin.reason
    assert groups["2"].num_channels == 8
    assert groups["0"].pin is None
    assert groups["4"].pin is None
