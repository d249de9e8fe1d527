"""Stacks of matrices in one product: batches, einsum, matrices picked by number; what of them still pins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from apoptosis.graph import analyse
from apoptosis.records import Group, Structure

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
Way = Callable[[nn.Module, Tensor], Tensor]


class Stack(nn.Module):
    """Three experts of hidden width 8 in two tensors; `way` says how they are put together."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.w1, self.w2 = nn.Parameter(torch.randn(3, 6, 8)), nn.Parameter(torch.randn(3, 8, 5))
        self.b1, self.out = nn.Parameter(torch.randn(3, 8)), nn.Linear(5, 2)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.way(self, x))


def named(structure: Structure, name: str) -> Group:
    return next(g for g in structure.groups if g.name == name)


def batched(m: nn.Module, x: Tensor) -> Tensor:
    return ((x @ m.w1 + m.b1[:, None]).relu() @ m.w2).sum(0)


def by_einsum(m: nn.Module, x: Tensor) -> Tensor:
    h = (torch.einsum("bd,edh->beh", x, m.w1) + m.b1).relu()
    return torch.einsum("beh,ehd->bed", h, m.w2).sum(1)


def transposed(m: nn.Module, x: Tensor) -> Tensor:
    return (m.w2.mT @ (m.w1.mT @ x.T).tanh()).sum(0).T


def picked(m: nn.Module, x: Tensor) -> Tensor:
    which = torch.arange(len(x)) % 3
    h = torch.bmm(x[:, None], m.w1[which])[:, 0] + m.b1[which]
    return torch.bmm(m.w2[which].mT, h.relu()[..., None])[..., 0]


def copied(m: nn.Module, x: Tensor) -> Tensor:
    return (x @ m.w1.transpose(0, 2).contiguous().transpose(0, 2)).relu().matmul(m.w2).sum(0)


def some(m: nn.Module, x: Tensor) -> Tensor:
    return ((x @ m.w1[1:]).relu() @ m.w2[1:]).sum(0)


WAYS = {way.__name__: way for way in (batched, by_einsum, transposed, picked, copied, some)}


@pytest.mark.parametrize("name", WAYS)
def test_the_same_place_of_every_matrix_is_one_channel(removal, name: str) -> None:
    structure = removal(Stack(WAYS[name]), (X,), {"w1": 8, "w2": 5})
    group = named(structure, "w1")
    own = {(m.tensor, m.dim) for m in group.members}
    assert ("w1", 2) in own
    assert {(s.weight, s.dim, s.select) for s in group.sites} == {("w2", 1, ())}
    assert not any(m.dim == 0 for g in structure.groups for m in g.members if m.tensor in ("w1", "w2"))


def part_of_the_columns(m: nn.Module, x: Tensor) -> Tensor:
    return ((x @ m.w1[..., :4]).relu() @ m.w2[:, :4]).sum(0)


def scaled_before(m: nn.Module, x: Tensor) -> Tensor:
    return ((x @ (m.w1 * torch.arange(8.0))).relu() @ m.w2).sum(0)


def overwritten(m: nn.Module, x: Tensor) -> Tensor:
    copy = m.w1.detach().transpose(0, 1).contiguous()
    copy[0] *= 2.0
    return ((x @ copy.transpose(0, 1)).relu() @ m.w2).sum(0)


def over_two_axes(m: nn.Module, x: Tensor) -> Tensor:
    return torch.einsum("beh,ehd->bd", (x @ m.w1).relu().transpose(0, 1), m.w2)


@pytest.mark.parametrize("way", [part_of_the_columns, scaled_before, overwritten, over_two_axes])
def test_what_is_no_stack_of_whole_matrices_pins(way: Way) -> None:
    groups = analyse(Stack(way), (X,), {}).groups
    assert all(g.pin is not None for g in groups if any((m.tensor, m.dim) == ("w1", 2) for m in g.members))
    assert way is scaled_before or any(g.pin is not None and g.pin.remedy for g in groups if g.name in ("w1", "w2"))
