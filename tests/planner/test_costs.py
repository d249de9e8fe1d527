"""What a network costs at other widths, against networks that have them."""

import time

import pytest
import torch
from torch import nn

from apoptosis import shrink_
from apoptosis.graph import analyse
from apoptosis.planner import Costs, macs_after
from apoptosis.records import Group, Member, Structure


class Mixed(nn.Module):
    """Convolutions (plain, depthwise, grouped) with norms, a flatten and a buffer that no channel lies in."""

    def __init__(self, a=8, b=12, c=10):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, a, 3, padding=1), nn.BatchNorm2d(a)
        self.depth, self.second = nn.Conv2d(a, a, 3, padding=1, groups=a), nn.Conv2d(a, b, 1)
        self.third, self.head = nn.Linear(b * 16, c), nn.Linear(c, 2)
        self.register_buffer("positions", torch.arange(7.0))

    def forward(self, x):
        h = torch.relu(self.second(self.depth(torch.relu(self.norm(self.first(x))))))
        return self.head(torch.relu(self.third(nn.functional.max_pool2d(h, 2).flatten(1))))


class Attention(nn.Module):
    def __init__(self, heads=4, size=6, width=8):
        super().__init__()
        self.size = size
        self.qkv, self.out = nn.Linear(width, 3 * heads * size), nn.Linear(heads * size, width)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (-1, self.size)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        h = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.4)
        return self.out(h.transpose(1, 2).flatten(2))


def num_parameters(net):
    return sum(p.numel() for p in net.parameters())


def test_costs_are_those_of_the_network_that_has_these_widths():
    x = torch.randn(2, 3, 8, 8)
    costs = Costs(analyse(Mixed(), (x,)))
    full, found = costs.of({}), costs.of({"first": 5, "second": 4, "third": 9})
    narrow = Mixed(5, 4, 9)
    assert (full.parameters, found.parameters) == (num_parameters(Mixed()), pytest.approx(num_parameters(narrow)))
    assert (full.macs, found.macs) == (analyse(Mixed(), (x,)).macs, pytest.approx(analyse(narrow, (x,)).macs))


def test_whole_heads_and_channels_inside_them_multiply():
    structure = analyse(Attention(), (torch.randn(2, 5, 8),))
    heads = next(g for g in structure.groups if g.name.endswith(":heads"))
    inner = next(g for g in structure.open_groups if g.name in heads.conflicts_with)
    costs, full = Costs(structure), num_parameters(Attention())
    assert costs.of({}).parameters == full
    half = costs.of({heads.name: 2})
    assert half.parameters == num_parameters(Attention(heads=2))
    per_channel = full - costs.of({inner.name: inner.num_channels - heads.num_channels}).parameters
    both = costs.of({heads.name: 2, inner.name: inner.num_channels - heads.num_channels})
    assert half.parameters - both.parameters == pytest.approx(per_channel / 2)


def test_costs_of_a_shrunk_transformer_are_told_before():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    net = nn.Sequential(nn.Linear(6, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3))
    x = torch.randn(64, 5, 6)
    costs = Costs(analyse(net, (x[:2],)))
    event = shrink_(net, x[:2], [x], tolerance=0.3, align=1)
    assert len(event.groups) >= 4
    found = costs.of({name: after for name, (_, after) in event.groups.items()})
    assert found.parameters == pytest.approx(num_parameters(net))
    assert found.macs == pytest.approx(analyse(net, (x[:2],)).macs)  # queries times keys, and times values, too


def test_an_unknown_group_is_refused():
    with pytest.raises(KeyError, match="nobody"):
        Costs(analyse(Mixed(), (torch.randn(2, 3, 8, 8),))).of({"nobody": 3})


def test_a_structure_without_groups_costs_what_it_costs():
    found = Costs(Structure(groups=(), macs=7.0, shapes={"w": (2, 3)})).of({})
    assert (found.macs, found.parameters) == (7.0, 6.0)


def test_groups_that_share_an_axis_side_by_side_add_up():
    def group(name, first, number):
        positions = torch.arange(first, first + number)[:, None].numpy()
        member = Member(tensor="w", dim=0, positions=positions, role="producer", macs=10.0)
        return Group(name=name, num_channels=number, members=(member,), sites=())

    structure = Structure(groups=(group("a", 0, 4), group("b", 4, 6)), macs=100.0, shapes={"w": (10, 3)})
    costs = Costs(structure)
    assert macs_after(structure, {"a": 2, "b": 3}) == pytest.approx(50.0)
    assert costs.of({"a": 2}).parameters == pytest.approx(24.0)


def test_an_answer_takes_microseconds():
    """A scheduler asks some hundred times an event; 12 layers have 48 groups and 72 weights."""
    layer = nn.TransformerEncoderLayer(24, 4, 32, dropout=0.0, batch_first=True)
    net = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
    structure = analyse(net, (torch.randn(1, 4, 24),))
    costs = Costs(structure)
    keeps = {g.name: g.num_channels // 2 for g in structure.open_groups if not g.name.endswith(":heads")}
    assert len(keeps) >= 24
    best = float("inf")
    for _ in range(50):
        start = time.perf_counter()
        costs.of(keeps)
        best = min(best, time.perf_counter() - start)
    assert best < 1e-3  # 0.05 ms on an idle machine
