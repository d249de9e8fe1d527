"""One number as the width of rows: which groups then keep the same share, and which make room for the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from apoptosis import shrink_
from apoptosis.graph import analyse
from apoptosis.records import Group, Structure

X = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))


class Partial(nn.Module):
    """Two heads of size 8, of which the first 4 channels are turned by their position; pairs of them share a frequency.

    number: "head_dim" splits queries, keys and values; "own" the values by a number of theirs; "" leaves it to torch.
    """

    def __init__(self, number: str = "head_dim") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.number, self.turned = number, 4
        if number:
            self.head_dim, self.v_head_dim = 8, 6 if number == "own" else 8
        self.q, self.k = nn.Linear(7, 16), nn.Linear(7, 16)
        self.v = nn.Linear(7, 12 if number == "own" else 16)
        self.out = nn.Linear(12 if number == "own" else 16, 3)
        self.register_buffer("frequencies", torch.tensor([1.0, 0.1]))

    def turn(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[-2]).to(x), self.frequencies)
        cos, sin = (torch.cat((part, part), -1) for part in (angles.cos(), angles.sin()))
        first, rest = x[..., : self.turned], x[..., self.turned :]
        one, two = first.chunk(2, -1)
        return torch.cat((first * cos + torch.cat((-two, one), -1) * sin, rest), -1)

    def forward(self, x: Tensor) -> Tensor:
        if self.number:
            own = self.v_head_dim if self.number == "own" else self.head_dim
            q, k, v = (
                y.view(*y.shape[:2], -1, n).transpose(1, 2)
                for y, n in ((self.q(x), self.head_dim), (self.k(x), self.head_dim), (self.v(x), own))
            )
        else:
            q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        weights = (self.turn(q) @ self.turn(k).mT * 0.3).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def by_name(structure: Structure) -> dict[str, Group]:
    return {group.name: group for group in structure.groups}


def test_what_is_not_turned_makes_room_in_rows_as_wide_as_the_values() -> None:
    groups = by_name(analyse(Partial(), (X,), {}))
    assert (groups["q"].num_channels, groups["q#2"].num_channels, groups["v"].num_channels) == (2, 4, 16)
    pin = groups["q"].pin
    assert pin is not None
    assert "a part of rows" in pin.reason
    assert pin.remedy
    assert (groups["q#2"].tied_groups, groups["q#2"].num_static) == (("v",), 4)
    assert (groups["v"].tied_groups, groups["v"].num_static) == (("q#2",), 0)


@pytest.mark.parametrize("number", ["own", ""])
def test_rows_of_a_width_of_their_own_are_free(number: str) -> None:
    groups = by_name(analyse(Partial(number), (X,), {}))
    assert {name: groups[name].pin for name in ("q", "q#2", "v")} == {"q": None, "q#2": None, "v": None}
    assert all(not groups[name].tied_groups and not groups[name].num_static for name in ("q", "q#2", "v"))


def silence(net: Partial, structure: Structure, name: str, channels: list[int]) -> None:
    """Let channels of a group be zero."""
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    for member in by_name(structure)[name].members:
        if not member.is_buffer:
            places = torch.from_numpy(member.positions[channels].reshape(-1))
            tensors[member.tensor].data.index_fill_(member.dim, places, 0.0)


@pytest.mark.parametrize("number", ["head_dim", "own", ""])
def test_as_many_columns_go_of_either(number: str) -> None:
    net = Partial(number).double()
    x = torch.randn(64, 5, 7, dtype=torch.float64)
    structure = analyse(net, (x[:3],), {})
    silence(net, structure, "q#2", [1])
    silence(net, structure, "v", [2, 8] if number != "own" else [2, 7])
    expected = net(x)
    event = shrink_(net, x[:3], [x], tolerance=0, align=1)
    assert event.groups["q#2"] == (4, 3)
    assert event.groups["v"][0] - event.groups["v"][1] == 2
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-10)


def test_a_written_number_of_turned_channels_keeps_them() -> None:
    net = Partial("").double()
    x = torch.randn(64, 5, 7, dtype=torch.float64)
    silence(net, analyse(net, (x[:3],), {}), "q", [1])
    expected = net(x)
    event = shrink_(net, x[:3], [x], tolerance=0, align=1)
    assert "q" not in event.groups
    assert any("'q' (2 channels)" in note for note in event.notes)
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-10)
