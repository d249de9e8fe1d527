"""After an edit, every column must meet the channel it was folded for."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from apoptosis.errors import StructureChangedError
from apoptosis.graph import analyse, verify

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def shrink(model: nn.Module, kept: dict[str, dict[int, list[int]]]) -> nn.Module:
    small = copy.deepcopy(model)
    for name, dims in kept.items():
        owner, _, leaf = name.rpartition(".")
        value = small.get_parameter(name).detach()
        for dim, positions in dims.items():
            value = value.index_select(dim, torch.tensor(positions))
        setattr(small.get_submodule(owner), leaf, nn.Parameter(value.clone()))
    return small


class Literal(nn.Module):
    def __init__(self, pick) -> None:
        super().__init__()
        self.a, self.b, self.c, self.pick = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(4, 2), pick

    def forward(self, x):
        h = self.a(x).relu()
        return self.b(h), self.c(self.pick(h))


def test_an_honest_edit_passes() -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    kept = {"0.weight": {0: [0, 2, 5]}, "0.bias": {0: [0, 2, 5]}, "2.weight": {1: [0, 2, 5]}}
    verify(analyse(net, (X,), {}), analyse(shrink(net, kept), (X,), {}), {
        name: {dim: torch.tensor(p) for dim, p in dims.items()} for name, dims in kept.items()
    })  # fmt: skip


@pytest.mark.parametrize("pick", [lambda h: h[:, ::2], lambda h: h[:, 2:6], lambda h: h[:, [0, 1, 3, 2]]])
def test_literal_positions_are_caught(pick) -> None:
    net = Literal(pick)
    old = analyse(net, (X,), {})
    columns = {tuple(s.columns.reshape(-1).tolist()) for g in old.groups for s in g.sites if s.module == "c"}
    assert columns
    # channels 1 and 3 are read by no column of c in the first case; what goes shifts what c reads
    rows = [0, 2, 4, 5, 6, 7]
    kept = {"a.weight": {0: rows}, "a.bias": {0: rows}, "b.weight": {1: rows}}
    small = shrink(net, kept)
    small.c.weight = nn.Parameter(net.c.weight.detach()[:, : pick(small.a(X)).shape[1]].clone())
    width = small.c.weight.shape[1]
    with pytest.raises(StructureChangedError, match=r"group 'a|dim \d of"):
        verify(old, analyse(small, (X,), {}), {n: dict(d) for n, d in _arrays(kept, width).items()})


def _arrays(kept: dict[str, dict[int, list[int]]], width: int) -> dict[str, dict[int, np.ndarray]]:
    out = {name: {dim: np.array(p) for dim, p in dims.items()} for name, dims in kept.items()}
    if width != 4:
        out["c.weight"] = {1: np.arange(width)}
    return out


def test_names_the_group_and_a_remedy_is_possible() -> None:
    net = Literal(lambda h: h[:, ::2])
    old = analyse(net, (X,), {})
    rows = [0, 2, 3, 4, 5, 6, 7]  # drops channel 1, which `c` does not read: shapes stay valid
    kept = {"a.weight": {0: rows}, "a.bias": {0: rows}, "b.weight": {1: rows}}
    with pytest.raises(StructureChangedError, match="literal positions") as caught:
        verify(old, analyse(shrink(net, kept), (X,), {}), _arrays(kept, 4))
    assert "a" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_code_that_depends_on_the_width_is_caught() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x):
            h = self.a(x).relu()
            return self.b(h) + (0.0 if h.shape[1] == 6 else h.sum(1, keepdim=True))

    net = Branch()
    kept = {"a.weight": {0: [0, 1]}, "a.bias": {0: [0, 1]}, "b.weight": {1: [0, 1]}}
    with pytest.raises(StructureChangedError, match="did not reach before"):
        verify(analyse(net, (X,), {}), analyse(shrink(net, kept), (X,), {}), _arrays(kept, 4))


def test_wrong_bookkeeping_is_caught() -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    old = analyse(net, (X,), {})
    kept = {"0.weight": {0: [0, 2]}, "0.bias": {0: [0, 2]}, "2.weight": {1: [0, 2]}}
    new = analyse(shrink(net, kept), (X,), {})
    with pytest.raises(StructureChangedError, match="were kept"):
        verify(old, new, {})
    with pytest.raises(StructureChangedError):
        verify(old, new, {**_arrays(kept, 4), "2.weight": {1: np.array([0, 3])}})
    with pytest.raises(StructureChangedError, match="set of tensors"):
        verify(old, analyse(nn.Sequential(nn.Linear(8, 6)), (X,), {}), {})
