"""Tensors laid side by side: empty ones, interleaved ones, and the largest of several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Branches(nn.Module):
    """Two layers, and whatever is made of them, read by a third."""

    def __init__(self, way: str, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.a, self.b, self.o = nn.Linear(4, 10), nn.Linear(4, 10), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).relu(), self.b(x).tanh()
        if self.way == "empty":
            a, b = torch.cat([a, a[:, 10:]], -1), torch.cat([b[:, :0], b], -1)
            return self.o(torch.cat([a, b], -1))
        if self.way == "interleaved":
            return self.o(torch.stack([a, b], -1).flatten(1))
        if self.way == "in turn":
            return self.o(torch.stack([a, b], 1).flatten(1))
        stacked = torch.stack([a, b], 1)
        return self.o(stacked.amax(1) if self.way == "amax" else stacked.max(1).values)


def test_what_is_empty_lays_nothing_beside(removal) -> None:
    removal(Branches("empty", 20), (X,), {"a": 10, "b": 10})


@pytest.mark.parametrize("way", ["interleaved", "amax", "max"])
def test_channels_that_stand_place_by_place_go_together(way: str, removal) -> None:
    structure = removal(Branches(way, 20 if way == "interleaved" else 10), (X,), {"a": 10})
    assert {m.tensor for m in structure.groups[0].members if m.role == "producer"} == {"a.weight", "b.weight"}


def test_layers_laid_in_turn_keep_one_width(removal) -> None:
    structure = removal(Branches("in turn", 20), (X,), {"a": 10, "b": 10})
    assert [g.tied_groups for g in structure.groups[:2]] == [("b",), ("a",)]
