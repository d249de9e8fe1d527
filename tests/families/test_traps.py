"""Traps in the user's code: writing in place, literals, modes and branches that the structure could get wrong.

Every test says what comes out: planted redundancy is found and the outputs stay, or the channels are pinned with their
reason, or the surgery is rolled back and says why. `shrink` compares the outputs in any case. Traps in tensors and
weights are in test_traps_tensors.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apoptosis.graph import analyse
from families.traps import FOUND, Net, X, shrink

# ------------------------------------------------------------------------------------- writing through views, in place


def _view_in_place(net: Any, h: Tensor) -> Tensor:
    view = h.view(len(h), 2, 4)
    view[:, 1].mul_(2.0)
    view.tanh_()
    return h


def _row_in_place(net: Any, h: Tensor) -> Tensor:
    h = h.clone()
    h.select(0, 0).add_(1.0)
    return h.relu_()


def _through_transpose(net: Any, h: Tensor) -> Tensor:
    h = h.relu()
    h.t().mul_(2.0)
    return h


def _overwritten(net: Any, h: Tensor) -> Tensor:
    out = torch.empty_like(h)
    out.copy_(h)
    return out.sigmoid_()


def _assigned(net: Any, h: Tensor) -> Tensor:
    out = torch.zeros(len(h), 8, dtype=h.dtype)
    out[:, :] = h
    return out.relu()


def _assigned_rows(net: Any, h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[::2] = h[::2]
    out[1::2] = h[1::2].tanh()
    return out


def _in_place_chain(net: Any, h: Tensor) -> Tensor:
    h += 0.5
    h *= 2.0
    h.clamp_(min=-1.0).exp_()
    return h


def _out_argument(net: Any, h: Tensor) -> Tensor:
    out = torch.empty_like(h)
    with torch.no_grad():
        torch.tanh(h, out=out)
    return out


@pytest.mark.parametrize("between", [_row_in_place, _through_transpose, _overwritten, _assigned_rows, _in_place_chain])
def test_written_in_place_is_found(between) -> None:
    assert shrink(Net(between), X, {"a": 3}).event.groups == FOUND


@pytest.mark.parametrize("between", [_view_in_place, _assigned])
def test_literal_widths_of_what_is_written_roll_back(between) -> None:
    result = shrink(Net(between), X, {"a": 2})
    assert not result.event
    assert "'a' (8 channels): removing channels broke the forward pass" in result.notes


def test_written_to_an_argument_pins() -> None:
    result = shrink(Net(_out_argument), X, {})
    assert not result.event
    assert "operator aten.tanh has no rule (test_traps.py:" in result.pins["a"]


def test_slices_assigned_side_by_side() -> None:
    """Both sources fill their own half of one tensor, and their columns follow them."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c, self.b = nn.Linear(6, 4), nn.Linear(6, 5), nn.Linear(9, 3)

        def forward(self, x: Tensor) -> Tensor:
            a, c = self.a(x).relu(), self.c(x).tanh()
            out = x.new_zeros(len(x), a.shape[1] + c.shape[1])
            out[:, : a.shape[1]] = a
            out[:, a.shape[1] :] = c
            return self.b(out)

    torch.manual_seed(0)
    result = shrink(Halves().double(), X, {"a": 1, "c": 2})
    assert result.event.groups == {"a": (4, 3), "c": (5, 3)}
    assert result.after.b.in_features == 6


# ------------------------------------------------------------------------------------------------------ literals


def _even(net: Any, h: Tensor) -> Tensor:
    return torch.cat((h.relu(), h[:, ::2]), 1)


def _rolled(net: Any, h: Tensor) -> Tensor:
    return torch.cat((h.tanh(), h.roll(4, 1)), 1)


def _paired(net: Any, h: Tensor) -> Tensor:
    return h.view(len(h), 4, 2).flatten(1).relu()


def _wide(net: Any, h: Tensor) -> Tensor:
    return h.view(-1, 8).relu()


def _listed(net: Any, h: Tensor) -> Tensor:
    return h[:, [3, 1, 2, 0, 7, 5, 6, 4]].relu()


def _narrowed(net: Any, h: Tensor) -> Tensor:
    return h.narrow(1, 0, 8).relu()


LITERALS = {
    "even": (_even, 12),
    "rolled": (_rolled, 16),
    "view": (_wide, 8),
    "view in pairs": (_paired, 8),
    "list": (_listed, 8),
    "narrow": (_narrowed, 8),
}


@pytest.mark.parametrize("name", LITERALS)
def test_literals_are_rolled_back_and_pinned(name: str) -> None:
    between, out = LITERALS[name]
    net = Net(between, out=out)
    open_groups = [group for group in analyse(net, (X,), {}).groups if group.pin is None]
    result = shrink(net, X, {group.name: group.rows if group.rows > 1 else 2 for group in open_groups})
    assert open_groups
    assert not result.event, "the planted channels cannot go without changing what a literal means"
    assert "removing channels broke the forward pass" in result.notes
    assert "literal" in result.notes
    assert "exclude=" in result.notes
    assert {n: tuple(p.shape) for n, p in result.after.named_parameters()} == {
        n: tuple(p.shape) for n, p in result.before.named_parameters()
    }


def test_literal_slices_with_their_own_functions() -> None:
    """Behind a literal slice other channels go through the function: every shape fits, and every column."""
    net = Net(lambda net, h: torch.cat((F.gelu(h[:, :5]), F.silu(h[:, 5:8])), 1))
    with torch.no_grad():
        net.a.weight[1:3], net.a.bias[1:3] = net.a.weight[0], net.a.bias[0]
    result = shrink(net, X, {})
    assert not result.event
    assert "'a' (8 channels): removing channels broke the forward pass" in result.notes


def test_a_literal_pins_its_own_group_alone() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).relu()).view(-1, 8).tanh())

    torch.manual_seed(0)
    result = shrink(Two().double(), X, {"a": 3, "b": 2})
    assert result.event.groups == FOUND
    assert "'b' (8 channels): removing channels broke the forward pass" in result.notes


# ------------------------------------------------------------------------------------------------------ modes


class Auxiliary(nn.Module):
    """Heads of one mode only: the channels they read are read in that mode, too."""

    def __init__(self, *, pick: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pick = pick
        self.a, self.b, self.aux = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.a(x).relu()
        if self.training:
            return self.b(h), self.aux(h)
        return (self.b(h), h.sort(1).values) if self.pick else (self.b(h),)


def test_a_head_of_training_alone_keeps_its_columns() -> None:
    net = Auxiliary()
    structure = analyse(net, (X,), {})
    assert {site.module for site in structure.groups[0].sites} == {"b", "aux"}
    assert "'aux' takes part in training mode only" in structure.notes
    result = shrink(net, X, {"a": 3})
    assert result.after.aux.in_features == result.after.b.in_features == result.after.a.out_features
    assert result.event.groups == FOUND or "training" in result.notes or "observed" in result.notes


def test_what_pins_in_one_mode_pins_in_both() -> None:
    result = shrink(Auxiliary(pick=True), X, {})
    assert not result.event
    assert "a" in result.pins
    assert "sort" in result.pins["a"]


def test_ties_of_one_mode_hold_in_both() -> None:
    class Modal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c, self.b = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                return self.b(self.a(x).relu() + self.c(x).relu())
            return self.b(self.a(x).relu())

    torch.manual_seed(0)
    net = Modal().double()
    group = analyse(net, (X,), {}).groups[0]
    assert {m.tensor for m in group.members} == {"a.weight", "a.bias", "c.weight", "c.bias"}
    result = shrink(net, X, {"a": 3})
    assert result.after.c.out_features == result.after.a.out_features == 5


def test_control_flow_that_the_example_does_not_take() -> None:
    """The branch is not seen: its parameters are named, and stay as wide as they are, so that it fails aloud."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.rare = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).relu()
            return self.rare(h) if len(x) == 1 else self.b(h)

    torch.manual_seed(0)
    net = Branch().double()
    notes = analyse(net, (X,), {}).notes
    assert any("'rare" in note and "not r" in note for note in notes)
    result = shrink(net, X, {"a": 3})
    assert result.event.groups == FOUND
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        result.after(X[:1])
