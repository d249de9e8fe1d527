"""What reads channels without being a plain layer: recurrences, functional layers, layers with an own forward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apoptosis.graph import analyse

GEN = torch.Generator().manual_seed(0)
X, SEQ = torch.randn(4, 8, generator=GEN), torch.randn(4, 5, 8, generator=GEN)


class Net(nn.Module):
    """a: 8 -> 6, b: width -> 2, and what lies between."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor], width: int = 6, **modules: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.between = nn.Linear(8, 6), nn.Linear(width, 2), between
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self, self.a(x)))


def outputs(m: nn.Module, h: Tensor) -> Tensor:
    return m.mid(h)[0]


KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
FORMS: dict[str, dict[str, object]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "without bias": {"bias": False},
    "two layers": {"num_layers": 2, "dropout": 0.3},
    "bidirectional": {"bidirectional": True, "batch_first": True},
    "two layers, bidirectional": {"bidirectional": True, "num_layers": 2},
}


def recurrent_widths(form: str) -> dict[str, int]:
    """Every layer and direction has hidden channels of its own; `equal` says that they share one number."""
    many = (2 if "two" in form else 1) * (2 if "bidirectional" in form else 1)
    return {"a": 6, **{"mid" if i == 0 else f"mid#{i + 1}": 6 for i in range(many)}}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_recurrences_shrink(removal, kind: str, form: str) -> None:
    wide = 12 if "bidirectional" in form else 6
    net = Net(outputs, width=wide, mid=KINDS[kind](6, 6, **FORMS[form]))
    structure = removal(net, (SEQ,), recurrent_widths(form), modes=(False,) if "two" in form else (True, False))
    hidden = [g for g in structure.groups if g.name.startswith("mid")]
    assert all(set(g.tied_groups) == {h.name for h in hidden} - {g.name} for g in hidden)
    assert all(site.functional == (site.module == "mid") for g in hidden for site in g.sites)
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    assert {m.positions.shape for m in hidden[0].members} == {(6, gates)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_state_is_read_as_well(removal, kind: str) -> None:
    def last(m: nn.Module, h: Tensor) -> Tensor:
        state = m.mid(h)[1]
        return (state[0] if isinstance(state, tuple) else state)[-1]

    removal(Net(last, mid=KINDS[kind](6, 6, batch_first=True)), (SEQ,), {"a": 6, "mid": 6})


def test_an_initial_state_is_made_by_a_layer(removal) -> None:
    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.start, self.mid, self.b = nn.Linear(8, 6), nn.GRU(8, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.mid(x, self.start(x[:, 0]).unsqueeze(0))[0])

    structure = removal(Started(), (SEQ,), {"start": 6})
    assert {m.tensor for m in structure.groups[0].members} >= {"start.weight", "mid.weight_hh_l0", "mid.weight_ih_l0"}


CELLS = {"LSTMCell": nn.LSTMCell, "GRUCell": nn.GRUCell, "RNNCell": nn.RNNCell}


@pytest.mark.parametrize("given", [True, False], ids=["zeros of its own", "zeros of the user"])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_in_a_loop_shrink(removal, kind: str, given: bool) -> None:
    def loop(m: nn.Module, h: Tensor) -> Tensor:
        zeros = h.new_zeros(h.shape[0], m.mid.hidden_size)
        state = None if not given else (zeros, zeros) if kind == "LSTMCell" else zeros
        outs = []
        for step in h.unbind(1):
            state = m.mid(step, state)
            outs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outs, 1)

    structure = removal(Net(loop, mid=CELLS[kind](6, 6)), (SEQ,), {"a": 6, "mid": 6})
    group = next(g for g in structure.groups if g.name == "mid")
    assert {(s.weight, s.functional) for s in group.sites} == {("b.weight", False), ("mid.weight_hh", True)}


def test_projected_states_are_channels_of_their_own(removal) -> None:
    net = Net(outputs, width=3, mid=nn.LSTM(6, 9, proj_size=3))
    structure = analyse(net, (SEQ,), {})
    assert {g.name: g.num_channels for g in structure.groups if g.pin is None} == {"a": 6, "mid": 9, "mid#2": 3}


class Loose(nn.Module):
    """F.linear with a parameter of its own, a bias of its own or none."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.weight = nn.Linear(8, 6), nn.Parameter(torch.randn(5, 6))
        self.bias = nn.Parameter(torch.randn(5)) if bias else None
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(self.a(x).relu(), self.weight, self.bias).tanh())


@pytest.mark.parametrize("x", [X, SEQ, SEQ.transpose(0, 1)], ids=["rows", "sequences", "not contiguous"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_functional_layer_shrinks_on_both_sides(removal, bias: bool, x: Tensor) -> None:
    structure = removal(Loose(bias=bias), (x,), {"a": 6, "weight": 5})
    first = structure.groups[0]
    (site,) = first.sites
    assert (site.module, site.weight, site.dim, site.functional) == ("", "weight", 1, True)
    assert site.bias == ("bias" if bias else None)
    second = structure.groups[1]
    assert {m.tensor for m in second.members} == {"weight", "bias"} - (set() if bias else {"bias"})


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * 2.0


class Transposed(nn.Module):
    """The Conv1D of GPT-2: a linear layer whose weight lies the other way round."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class Einsum(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,io->...o", x, self.weight)


class Matmul(Einsum):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + 1.0


OWN = {"scaled": Scaled, "transposed": Transposed, "einsum": Einsum, "matmul": Matmul}


@pytest.mark.parametrize("name", OWN)
def test_layers_with_a_forward_of_their_own_shrink(removal, name: str) -> None:
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), OWN[name](6, 5), nn.Tanh(), nn.Linear(5, 2))
    structure = removal(net, (SEQ,), {"0": 6, "2": 5})
    (site,) = structure.groups[0].sites
    assert site.functional
    assert (site.module, site.weight, site.dim) == ("2", "2.weight", 1 if name == "scaled" else 0)


def test_a_weight_that_is_also_used_otherwise_still_pins() -> None:
    class Decayed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.weight.sum()

    structure = analyse(nn.Sequential(nn.Linear(8, 6), Decayed(6, 2)), (X,), {})
    assert structure.groups[0].pin is not None
    assert structure.groups[0].pin.where.startswith("test_consumers.py:")
