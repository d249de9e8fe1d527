"""What the example input does not reach is left alone, and said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apoptosis import Apoptosis, shrink_
from apoptosis.graph import analyse
from apoptosis.records import Structure

X = torch.randn(4, 8)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def pin_of(structure: Structure, name: str):
    return next(g.pin for g in structure.groups if g.name == name)


class Branch(Base):
    """Another way through for large inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.b(h) if x.abs().max() < 100 else self.other(h)


def test_a_branch_that_is_not_taken() -> None:
    structure = analyse(Branch(), (X,))
    notes = [note for note in structure.notes if "other" in note]
    assert len(notes) == 1
    assert notes[0].startswith("module 'other' is not run by the forward pass on example_input: its 4 parameters stay")
    for name in ("other.0", "other.2"):
        pin = pin_of(structure, name)
        assert pin.reason == "the forward pass on example_input does not run 'other'"
        assert pin.remedy == "Give an example_input that takes this way, or delete it."
    assert pin_of(structure, "a") is None


def test_a_module_that_is_not_run_is_never_changed(runs) -> None:
    net = Branch()
    with torch.no_grad():
        net.a.weight[3:], net.a.bias[3:] = net.a.weight[:3], net.a.bias[:3]
    before = {name: t.clone() for name, t in net.other.state_dict().items()}
    event = shrink_(net, X, [torch.randn(512, 8)], tolerance=0)
    assert event.groups == {"a": (6, 3)}
    assert all(torch.equal(t, before[name]) for name, t in net.other.state_dict().items())
    assert net.other[0].in_features == net.other[2].in_features == 6
    apo = Apoptosis(net, runs.adam(net), X)
    assert apo.notes() == apo.structure.notes
    assert any("'other'" in note for note in apo.notes())


def test_a_probe_that_takes_the_branch_rolls_back() -> None:
    net = Branch()
    with torch.no_grad():
        net.a.weight[3:], net.a.bias[3:] = net.a.weight[:3], net.a.bias[:3]
    event = shrink_(net, X, [torch.randn(512, 8)], tolerance=0, probe=torch.full((150, 8), 200.0))
    assert not event
    assert net.a.out_features == 6
    assert any("fails on the probe" in note for note in event.notes)


@pytest.mark.parametrize("tied", [False, True])
def test_a_weight_shared_with_a_module_that_is_not_run(tied) -> None:
    class Tied(Base):
        def __init__(self) -> None:
            super().__init__()
            self.twin = nn.Linear(8, 6, bias=False)
            if tied:
                self.twin.weight = self.a.weight

    structure = analyse(Tied(), (X,))
    pin = pin_of(structure, "a")
    if tied:
        assert pin.reason == "'a.weight' belongs to 'twin' too, which the forward pass on example_input does not run"
        assert pin.remedy
    else:
        assert pin is None
        assert pin_of(structure, "twin").reason.endswith("does not run 'twin'")


def test_a_list_of_references_is_no_module_that_could_run() -> None:
    class Listed(Base):
        def __init__(self) -> None:
            super().__init__()
            self.decayed = nn.ParameterList([self.a.weight, self.b.weight])

    structure = analyse(Listed(), (X,))
    assert pin_of(structure, "a") is None
    assert structure.notes == ()


def test_a_raw_parameter_that_nothing_reads() -> None:
    class Raw(Base):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.scale = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.ones(6))

    structure = analyse(Raw(), (X,))
    assert [n for n in structure.notes if "not read" in n] == [
        f"parameter '{name}' is not read by the forward pass on example_input" for name in ("table", "scale")
    ]
    assert "not read" in pin_of(structure, "table").reason
    assert pin_of(structure, "a") is None


def test_a_bias_that_is_not_read_keeps_the_weight_beside_it() -> None:
    class Functional(Base):
        def forward(self, x):
            return self.b(torch.relu(nn.functional.linear(x, self.a.weight)))

    pin = pin_of(analyse(Functional(), (X,)), "a")
    assert pin.reason == "'a.bias' lies along them and is not read by the forward pass on example_input"


def test_modes_that_take_different_ways_are_both_seen() -> None:
    class Modal(Branch):
        def forward(self, x):
            h = torch.relu(self.a(x))
            return self.b(h) if self.training else self.other(h)

    structure = analyse(Modal(), (X,))
    assert not any("not run" in note or "not read" in note for note in structure.notes)
    assert "'other.0' takes part in evaluation mode only" in structure.notes
    assert pin_of(structure, "a") is None
    assert pin_of(structure, "other.0") is None


def test_one_note_for_a_whole_branch_and_none_for_a_network_that_runs_in_full() -> None:
    assert analyse(Base(), (X,)).notes == ()
    net = nn.ModuleDict({"main": Base(), "spare": nn.ModuleList([Base(), Base()])})
    net.forward = lambda x: net["main"](x)
    notes = analyse(net, (X,)).notes
    assert len(notes) == 1
    assert "module 'spare' is not run" in notes[0]
    assert "its 8 parameters" in notes[0]


class Experts(nn.Module):
    """Every row goes to one expert; none of the example's to the last one."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.i, self.o = nn.Linear(8, 12), nn.Linear(12, 3)
        self.ex = nn.ModuleList(nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 12)) for _ in range(3))

    def forward(self, x):
        h, which = self.i(x), torch.arange(len(x)) // 2
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.ex):
            rows = (which == number).nonzero().squeeze(-1)
            if rows.numel() or not self.skip:
                out = out.index_add(0, rows, expert(h[rows]))
        return self.o(h + out)


@pytest.mark.parametrize("skip", [False, True])
def test_an_expert_without_rows_is_noted_and_pinned_with_what_it_reads(skip: bool) -> None:
    structure = analyse(Experts(skip), (X,))
    assert [g.name for g in structure.groups if g.pin is None] == ["ex.0.0", "ex.1.0"]
    pin = pin_of(structure, "i")
    assert "'ex.2'" in pin.reason
    assert "larger example_input" in pin.remedy
    assert "'ex.2'" in structure.notes[0]
    assert "larger example_input" in structure.notes[0]


@pytest.mark.parametrize("skip", [False, True])
def test_experts_with_rows_are_free(skip: bool) -> None:
    structure = analyse(Experts(skip), (torch.randn(6, 8),))
    assert [g.name for g in structure.groups if g.pin is None] == ["i", "ex.0.0", "ex.1.0", "ex.2.0"]
    assert structure.notes == ()


class Standardised(nn.Module):
    """A convolution whose weight is standardised in the model's own forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        w = self.a.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return self.b(torch.relu(nn.functional.conv2d(x, w, self.a.bias)))


def test_a_layer_whose_weight_is_computed_is_listed(removal) -> None:
    removal(Standardised(), (torch.randn(2, 3, 6, 6),), {"a": 6})
