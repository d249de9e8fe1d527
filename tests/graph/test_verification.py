"""After an edit, every column must meet the channel it was folded for."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from apoptosis.errors import StructureChangedError
from apoptosis.graph import analyse, verify
from apoptosis.graph.trace.partial_ops import changed_split
from apoptosis.graph.trace.scalars import changed_scalar
from apoptosis.records import ScalarOperands, Split, Structure

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


class Scaled(nn.Module):
    """A hidden layer, and a number that its owner says how to compute."""

    def __init__(self, scale) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(8, 6), nn.Linear(6, 2), scale
        self.norm, self.drop, self.rate = nn.BatchNorm1d(2, eps=1e-3, momentum=None), nn.Dropout(0.25), 0.5

    def forward(self, x):
        return self.scale(self, self.a(x).relu())


KEPT = {"a.weight": {0: [0, 2, 5]}, "a.bias": {0: [0, 2, 5]}, "b.weight": {1: [0, 2, 5]}}
WIDTH = {
    "div": lambda m, h: m.b(h) / h.shape[1] ** 0.5,
    "mul": lambda m, h: m.b(h) * m.b.weight.shape[1] ** -0.5,
    "in_features": lambda m, h: m.b(h) * m.b.in_features**-0.5,
    "add": lambda m, h: m.b(h) + h.numel(),
    "rsub": lambda m, h: h.shape[1] - m.b(h),
    "pow": lambda m, h: m.b(h) ** h.shape[1],
    "clamp": lambda m, h: m.b(h).clamp(max=1 / h.shape[1]),
    "where": lambda m, h: torch.where(h[:, :1].detach() * 0 > m.b(h), 1.0 / h.shape[1], m.b(h)),
    "alpha": lambda m, h: torch.add(m.b(h), 1.0, alpha=h.shape[1]),
    "addmm": lambda m, h: torch.addmm(m.b.bias, h, m.b.weight.t(), alpha=h.shape[1] ** -0.5),
    "literal": lambda m, h: m.b(h) / torch.tensor(h.shape[1]),
    "full": lambda m, h: m.b(h) / torch.full((1,), float(h.shape[1])),
    "in place": lambda m, h: m.b(h).mul_(1 / h.shape[1]),
    "before": lambda m, h: m.b(h * h.shape[1] ** -0.5),
    "leaky": lambda m, h: torch.nn.functional.leaky_relu(m.b(h), 1 / h.shape[1]),
    "once more": lambda m, h: m.b(h) * 1.0 if h.shape[1] == 6 else m.b(h),
}  # fmt: skip


def _verified(net: nn.Module, small: nn.Module) -> None:
    verify(analyse(net, (X,), {}), analyse(small, (X,), {}), _arrays(KEPT, 4))


@pytest.mark.parametrize("name", WIDTH)
def test_numbers_that_follow_a_width_are_caught(name: str) -> None:
    net = Scaled(WIDTH[name])
    small = shrink(net, KEPT)
    small.b.in_features = 3
    with pytest.raises(StructureChangedError, match=r"operator aten\.\w+.*\(test_verification\.py:\d+\).*with sizes"):
        _verified(net, small)


HONEST = {
    "constants": lambda m, h: (m.b(h * 0.5) / 3).clamp(-1, 1) ** 2,
    "norm and dropout": lambda m, h: m.drop(m.norm(m.b(m.drop(h)))) * 2,
    "functional dropout": lambda m, h: m.b(torch.nn.functional.dropout(h, m.rate)),
    "mean": lambda m, h: m.b(h - h.mean(0)) + 1e-6,
    "sizes": lambda m, h: m.b(h.new_zeros(4, h.shape[1]) + h.view(-1, h.shape[1]) * h.new_full((1, h.shape[1]), 2.0)),
    "batch": lambda m, h: m.b(h) / h.shape[0],
    "data": lambda m, h: m.b(h) / m.b(h).detach().abs().max().item() * 3,
}


@pytest.mark.parametrize("name", HONEST)
def test_other_numbers_pass(name: str) -> None:
    net = Scaled(HONEST[name])
    small = shrink(net, KEPT)
    small.rate = small.drop.p = 0.125  # a dropout rate may be scheduled
    assert analyse(net, (X,), {}).scalars or name == "functional dropout"
    _verified(net, small)


def test_numbers_before_a_number_from_data_are_compared() -> None:
    net = Scaled(lambda m, h: m.b(h) / h.shape[1] / m.b(h).detach().abs().max().item())
    with pytest.raises(StructureChangedError, match="uses the number 3, which was 6"):
        _verified(net, shrink(net, KEPT))


def test_not_a_number_is_the_same_number() -> None:
    calls = [ScalarOperands(operator="aten.mul", values=(float("nan"), 1.0))]
    assert changed_scalar(calls, list(calls)) is None
    assert changed_scalar(calls, [ScalarOperands(operator="aten.mul", values=(float("nan"), 2.0))]) is not None
    assert "no longer runs" in str(changed_scalar(calls * 2, calls))
    assert "runs only" in str(changed_scalar(calls, calls * 2))


def test_a_part_that_is_gone_does_not_leave_its_place_to_halves_of_another() -> None:
    """What is left of two parts is split again, and swapped: every element of it belongs to the same channel."""
    before = Split(module="", classes=np.array([[1, 1], [2, 2]]))
    one, halves = Split(module="", classes=np.array([[5, 5]])), Split(module="", classes=np.array([[5], [5]]))
    old = Structure(groups=(), macs=0.0, shapes={}, splits=(before,))
    for after in (one, halves):  # one row, and one column, which is told like it
        assert changed_split(old, Structure(groups=(), macs=0.0, shapes={}, splits=(after,)), {5: 2}) is None
    wide = Split(module="", classes=np.array([[1, 1, 1, 1], [2, 2, 2, 2]]))
    old = Structure(groups=(), macs=0.0, shapes={}, splits=(wide,))
    after = Split(module="", classes=np.array([[5, 5], [5, 5]]))
    error = changed_split(old, Structure(groups=(), macs=0.0, shapes={}, splits=(after,)), {5: 2})
    assert error is not None
    assert "hold others than before" in str(error)
