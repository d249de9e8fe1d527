"""What has no rule, or cannot be folded, pins with its reason and stays right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from apoptosis.errors import ArgumentError, CaptureError
from apoptosis.graph import analyse, register_rule
from apoptosis.graph.rules.table import OPERATORS, _table
from apoptosis.graph.trace.values import Value

GEN = torch.Generator().manual_seed(0)
X, SEQ, IMG = (
    torch.randn(4, 8, generator=GEN),
    torch.randn(4, 5, 8, generator=GEN),
    torch.randn(3, 3, 8, 8, generator=GEN),
)


class Net(nn.Module):
    """a: 8 -> 6, b: 6 -> 2, and what lies between."""

    def __init__(self, between: Callable, **modules) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(8, 6), nn.Linear(6, 2), between
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.b(self.between(self, self.a(x)))


BETWEEN = {
    "topk": (lambda m, h: h.topk(6, dim=-1).values, "aten.topk", "orders channels"),
    "sort": (lambda m, h: h.sort(-1).values, "aten.sort", "orders channels"),
    "sum": (lambda m, h: h + h.sum(-1, keepdim=True), "aten.sum", "reduces over channels"),
    "norm": (lambda m, h: h / h.norm(dim=-1, keepdim=True), "aten.linalg_vector_norm", "reduces over channels"),
    "cumsum": (lambda m, h: h.cumsum(-1), "aten.cumsum", "over channels"),
    "mask": (lambda m, h: h * torch.arange(6.0), "aten.mul", "combines channels with the result of aten.arange"),
    "layer norm": (lambda m, h: F.layer_norm(h, (6,)), "aten.native_layer_norm", "normalises over channels"),
    "outer": (lambda m, h: (h[:, :, None] * h[:, None, :]).sum(-1), "aten.mul", "different axes"),
    "gather": (lambda m, h: h.gather(1, torch.zeros(4, 6, dtype=torch.long)), "aten.gather", "picks channels"),
    "functional": (lambda m, h: F.linear(h, torch.eye(6)), "aten.addmm|aten.mm", "not a parameter"),
    "item": (lambda m, h: h * float(h.detach().abs().amax(0)[0]), "aten._local_scalar_dense", "has no rule"),
    "gate": (lambda m, h: h * h[:, :1], "aten.mul", "spreads one channel"),
    "bmm": (lambda m, h: (h[:, None] @ torch.ones(4, 6, 6))[:, 0], "aten.bmm", "not a parameter"),
    "scatter": (lambda m, h: h.index_add(1, torch.tensor([0]), h[:, :1]), "aten.index_add", "writes channels"),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_pins_with_operator_and_line(name: str) -> None:
    between, operator, text = BETWEEN[name]
    structure = analyse(Net(between), (X,), {})
    pins = [g.pin for g in structure.groups if g.name.startswith("a")]
    assert pins
    for pin in pins[:1]:
        assert pin is not None
        assert any(o in pin.reason for o in operator.split("|"))
        assert text in pin.reason
        assert pin.where.startswith("test_pins.py:")
        assert text in str(pin)


@pytest.mark.parametrize("modules", [{"mid": nn.LayerNorm(6)}, {"mid": nn.RMSNorm(6)}], ids=["layer", "rms"])
def test_norms_over_channels_pin_and_do_not_fail(oracle, modules) -> None:
    structure = oracle(Net(lambda m, h: m.mid(h), **modules), (SEQ,), {}, training=False)
    assert structure.groups[0].pin is not None


def test_group_norm_over_all_channels_pins() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(1, 4), nn.Conv2d(4, 2, 1))
    pin = analyse(net, (IMG,), {}).groups[0].pin
    assert pin is not None
    assert "native_group_norm" in pin.reason


def test_norm_must_be_the_only_reader() -> None:
    class Two(nn.Module):
        def __init__(self, *, extra: bool) -> None:
            super().__init__()
            self.a, self.b, self.n, self.c = (
                nn.Linear(8, 6),
                nn.Linear(6, 5, bias=False),
                nn.BatchNorm1d(5),
                nn.Linear(5, 2),
            )
            self.extra = extra

        def forward(self, x):
            h = self.b(self.a(x).relu())
            return self.c(self.n(h) + (h if self.extra else 0.0))

    assert analyse(Two(extra=False), (X,), {}).groups[0].sites[0].norm == "n"
    assert analyse(Two(extra=True), (X,), {}).groups[0].sites[0].norm is None


def test_norm_on_two_sources_is_nobodys() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.n = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(6, 5), nn.BatchNorm1d(5)

        def forward(self, x):
            h = self.a(x).relu()
            return self.n(self.b(h)), self.n(self.c(h))

    assert all(s.norm is None for s in analyse(Shared(), (X,), {}).groups[0].sites)


def test_part_of_a_layer_is_a_group_of_its_own() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(4, 2)

        def forward(self, x):
            out, rest = self.a(x).split([2, 4], -1)
            return out, self.b(rest.relu())

    groups = {g.name: g for g in analyse(Split(), (X,), {}).groups}
    assert groups["a"].num_channels == 2
    assert groups["a"].pin is not None
    assert groups["a#2"].num_channels == 4
    assert groups["a#2"].pin is None
    assert groups["a#2"].members[0].positions.reshape(-1).tolist() == [2, 3, 4, 5]


def test_nothing_reads_it() -> None:
    class Lost(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(8, 6), nn.Linear(8, 2), nn.Linear(3, 3)

        def forward(self, x):
            self.a(x)
            return self.b(x)

    structure = analyse(Lost(), (X,), {})
    assert structure.groups[0].pin is not None
    assert structure.groups[0].pin.reason == "no consumer site reads these channels"
    assert any("module 'unused' is not run" in note for note in structure.notes)


def test_modes_are_united() -> None:
    class Modal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.aux = nn.Linear(8, 6), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x):
            h = self.a(x).relu()
            return (self.b(h), self.aux(h)) if self.training else (self.b(h), h.topk(2, -1).values)

    structure = analyse(Modal(), (X,), {})
    assert structure.groups[0].pin is not None
    assert "topk" in structure.groups[0].pin.reason
    assert "'aux' takes part in training mode only" in structure.notes


def test_constants_beside_channels_pin_their_columns() -> None:
    def between(m, h):
        out = torch.zeros(4, 6)
        out[:, :3] = h[:, :3]
        out[:, 3:] = torch.arange(3.0)
        return out

    structure = analyse(Net(between), (X,), {})
    columns = structure.classes["b.weight"][1]
    assert np.isin(columns, structure.pinned_classes).tolist() == [False] * 3 + [True] * 3
    assert columns[:3].tolist() == structure.classes["a.weight"][0][:3].tolist()


def test_output_objects_are_searched() -> None:
    class Box:
        def __init__(self, h) -> None:
            self.inner = {"h": [h]}

    class Boxed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x):
            h = self.a(x)
            return self.b(h), Box(h)

    pin = analyse(Boxed(), (X,), {}).groups[0].pin
    assert pin is not None
    assert "network's output" in pin.reason


def test_rules_can_be_registered_once(monkeypatch) -> None:
    with pytest.raises(ArgumentError, match="'relu' has a rule already"):
        register_rule("relu", lambda call: None)
    with pytest.raises(ArgumentError, match=r"no operator 'aten::top_k' [(]similar names: .*topk"):
        register_rule("top_k", lambda call: None)
    with pytest.raises(ArgumentError, match="is a str, not a function"):
        register_rule("special_airy_ai", "elementwise")
    monkeypatch.setitem(OPERATORS, "never_heard_of", OPERATORS["relu"])
    monkeypatch.delitem(OPERATORS, "never_heard_of")
    net = Net(lambda m, h: torch.special.airy_ai(h))
    try:
        register_rule("special_airy_ai", lambda call: call.value(call.args[0]))
        assert analyse(net, (X,), {}).groups[0].pin is None
    finally:
        OPERATORS.pop("special_airy_ai")
    assert analyse(net, (X,), {}).groups[0].pin is not None


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda ids: ids, "'special_airy_ai' returned a ndarray"),
        (lambda ids: Value(ids[:, :3]), r"ids of shape \(1, 3\) for an output of shape \(\d+, 6\)"),
        (lambda ids: [Value(ids[0])], r"ids of shape \(6,\)"),
    ],
)
def test_answers_of_a_rule_that_do_not_fit_are_refused(registries, answer, said) -> None:
    register_rule("special_airy_ai", lambda call: answer(call.value(call.args[0]).ids))
    with pytest.raises(CaptureError, match=said):
        analyse(Net(lambda m, h: torch.special.airy_ai(h)), (X,), {})


def test_an_operator_that_is_named_twice_is_listed() -> None:
    with pytest.raises(ValueError, match=r"more than once in the table of operators: cos, relu[.]"):
        _table((("sin cos cos", OPERATORS["cos"]), ("relu", OPERATORS["relu"]), ("relu", OPERATORS["cos"])))


def test_expanded_buffer_is_read_rightly() -> None:
    net = Net(lambda m, h: h * m.scale)
    net.register_buffer("scale", torch.ones(1, 1).expand(1, 6))
    group = analyse(net, (X,), {}).groups[0]
    assert group.pin is None
    assert [m.tensor for m in group.members] == ["a.weight", "a.bias", "scale"]


def test_a_single_example_without_a_batch_axis() -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    assert analyse(net, (X[0],), {}).groups[0].pin is None
    bare = nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False))
    assert analyse(bare, (X[0],), {}).groups[0].pin is None


def test_layers_of_width_one(oracle) -> None:
    net = nn.Sequential(
        nn.Linear(8, 1), nn.ReLU(), nn.Linear(1, 6), nn.BatchNorm1d(6), nn.Linear(6, 1), nn.PReLU(1), nn.Linear(1, 2)
    )
    structure = oracle(net, (X,), {"0": 1, "2": 6, "4": 1})
    assert structure.groups[1].sites[0].columns.shape == (6, 1)


NORMS = {
    "batch": lambda n: nn.BatchNorm1d(n),
    "batch, bare": lambda n: nn.BatchNorm1d(n, affine=False, track_running_stats=False),
    "instance": lambda n: nn.InstanceNorm1d(n),
    "instance, tracked": lambda n: nn.InstanceNorm1d(n, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("name", NORMS)
def test_statistics_over_channels_pin(name: str) -> None:
    groups = analyse(Net(lambda m, h: m.n(h).relu(), n=NORMS[name](5)), (SEQ,), {}).groups
    group = next(g for g in groups if g.name == "a")
    assert group.pin is not None
    assert "normalises over channels" in group.pin.reason
    assert group.pin.where.startswith("test_pins.py:")


@pytest.mark.parametrize("name", NORMS)
def test_statistics_of_each_channel_do_not_pin(name: str, oracle) -> None:
    net = Net(lambda m, h: m.n(h.transpose(1, 2)).relu().transpose(1, 2), n=NORMS[name](6))
    if name.startswith("batch"):
        oracle(net, (SEQ,), {"a": 6})
    assert next(g for g in analyse(net, (SEQ,), {}).groups if g.name == "a").pin is None


def test_no_site_names_a_norm_over_its_outputs() -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(4, 2))
    groups = {g.name: g for g in analyse(net, (SEQ,), {}).groups}
    assert groups["0"].sites[0].norm is None
    assert groups["2"].pin is not None


def test_no_neuron_names_a_norm_of_another_size() -> None:
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.BatchNorm1d(144), nn.ReLU(), nn.Linear(144, 2))
    group = analyse(flat, (IMG,), {}).groups[0]
    assert group.pin is None
    assert group.neuron is None
    plain = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    neuron = analyse(plain, (X,), {}).groups[0].neuron
    assert neuron is not None
    assert neuron.norm == "1"
    single = Net(lambda m, h: m.c(m.n(m.d(h)).relu()).transpose(1, 2), n=nn.BatchNorm1d(5), c=nn.Linear(1, 6))
    single.d = nn.Linear(6, 1)
    single.b = nn.Linear(5, 2)
    found = next(g for g in analyse(single, (SEQ,), {}).groups if g.name == "d")
    assert found.neuron is None
    assert all(g.sites == () or all(s.norm is None for s in g.sites) for g in (found,))
