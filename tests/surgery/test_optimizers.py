"""One checker over every optimizer of torch.optim: the step after surgery is the step of a small network.

The small network's optimizer state is made here, by plain indexing, from the state before the surgery.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from apoptosis.errors import ArgumentError
from apoptosis.records import Group, Member, Structure, TensorEdit
from apoptosis.surgery import Transaction, build_edits, check_optimizers
from apoptosis.surgery.optimizers import OPTIMIZERS, StateRules, register_optimizer, rules_of

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")

TWINS = {"0": {1: 0, 5: 3}, "2": {4: 2}}
DEAD = {"0": (2, 7), "2": (0,)}


@dataclass(frozen=True)
class Case:
    """options: of the optimizer. whole: its step looks at whole tensors, so dead neurons weigh in the others' step."""

    options: dict = field(default_factory=dict)
    whole: str = ""


CASES: dict[str, list[Case]] = {
    "ASGD": [Case({"lr": 0.05}), Case({"lr": 0.05, "t0": 2.0, "foreach": True})],
    "Adadelta": [Case({"lr": 0.5}), Case({"foreach": True})],
    "Adafactor": [Case({"lr": 0.05}, whole="the update is clipped by its rms over the tensor")],
    "Adagrad": [Case({"lr": 0.05}), Case({"lr": 0.05, "fused": True}), Case({"initial_accumulator_value": 0.1})],
    "Adam": [Case(), Case({"amsgrad": True, "foreach": True}), Case({"fused": True, "amsgrad": True})],
    "AdamW": [Case(), Case({"foreach": False, "amsgrad": True}), Case({"fused": True}), Case({"maximize": True})],
    "Adamax": [Case(), Case({"foreach": True})],
    "Muon": [Case({"lr": 0.01}, whole="the update is orthogonalised as one matrix")],
    "NAdam": [Case(), Case({"foreach": True, "decoupled_weight_decay": True, "weight_decay": 0.01})],
    "RAdam": [Case({"lr": 0.01}), Case({"foreach": True})],
    "RMSprop": [Case({"centered": True, "momentum": 0.9}), Case({"foreach": True})],
    "Rprop": [Case(), Case({"foreach": True})],
    "SGD": [
        Case({"lr": 0.1}),
        Case({"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
        Case({"lr": 0.1, "momentum": 0.9, "fused": True}),
    ],
    "SparseAdam": [Case({"lr": 0.01})],
}
NEWER = {name for name in ("Muon",) if not hasattr(torch.optim, name)}  # than the oldest torch that is supported
ALL = [
    pytest.param(name, case, id=f"{name}-{i}")
    for name, cases in CASES.items()
    for i, case in enumerate(cases)
    if name not in NEWER
]


def test_every_optimizer_of_torch_has_its_case():
    found = {
        name
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    assert found == set(CASES) - NEWER | {"LBFGS"}


class Embedded(nn.Module):
    """An embedding with sparse gradients, read by a linear layer: the network for SparseAdam."""

    def __init__(self, width=8):
        super().__init__()
        self.table, self.reader = nn.Embedding(9, width, sparse=True), nn.Linear(width, 3)
        self.requires_grad_(False)
        self.table.weight.requires_grad_(True)

    def forward(self, x):
        return self.reader(self.table(x.abs().mul(2).long().clamp(max=8)).mean(1))


def build(name, nets, small=False):
    if name == "SparseAdam":
        torch.manual_seed(0)
        return Embedded(6 if small else 8).double()
    return nets.mlp((5, 6, 5, 3) if small else (5, 8, 6, 3), torch.float64)


def structure_of(name, model, nets):
    if name != "SparseAdam":
        return nets.mlp_structure(model)
    member = Member(tensor="table.weight", dim=1, positions=nets.positions(8), role="producer")
    site = nets.linear_site("reader", nets.positions(8), 8)
    group = Group(name="table", num_channels=8, members=(member,), sites=(site,))
    return Structure(groups=(group,), macs=0.0, shapes=nets.shapes(model))


def optimizers_of(name, case, model):
    kind = getattr(torch.optim, name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "Muon":  # takes matrices only
        others = [p for p in parameters if p.ndim != 2]
        return [kind([p for p in parameters if p.ndim == 2], **case.options), torch.optim.SGD(others, lr=0.1)]
    halves = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.02}] if len(parameters) > 2 else parameters
    return [kind(halves, **case.options)]


def cut(tensor, keep):
    """Plain indexing along every dim."""
    for dim, kept in enumerate(keep):
        if tensor.shape[dim] > 1 or len(kept) == 1:
            tensor = tensor.index_select(dim, torch.tensor(kept))
    return tensor


def kept_of(name, gone):
    """Per parameter the kept positions along every dim."""
    if name == "SparseAdam":
        kept = [c for c in range(8) if c not in gone["table"]]
        return {"table.weight": (range(9), kept), "reader.weight": (range(3), kept), "reader.bias": (range(3),)}
    first, second = ([c for c in range(n) if c not in gone[key]] for key, n in (("0", 8), ("2", 6)))
    return {
        "0.weight": (first, range(5)),
        "0.bias": (first,),
        "2.weight": (second, first),
        "2.bias": (second,),
        "4.weight": (range(3), second),
        "4.bias": (range(3),),
    }


def folded(weights, twins, keep):
    """The tensors of the small network: consumers' columns take over the copies', then plain indexing."""
    weights = {n: t.clone() for n, t in weights.items()}
    for reader, pairs in twins.items():
        for j, k in pairs.items():
            weights[reader][:, k] += weights[reader][:, j]
    return {n: cut(t, [list(k) for k in keep[n]]) for n, t in weights.items()}


def small_state(key, value, parameter, keep, state, folded_average):
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return copy.deepcopy(value)
    lists = [list(k) for k in keep]
    if key in ("row_var", "col_var"):  # from the definition: means of V = r c / mean(r) over what is kept
        full = state["row_var"] @ state["col_var"] / state["row_var"].mean(-2, keepdim=True)
        return cut(full, lists).mean(-1 if key == "row_var" else -2, keepdim=True)
    if key == "ax":
        return folded_average
    assert value.shape == parameter.shape
    return cut(value, lists)


@pytest.mark.parametrize(("name", "case"), ALL)
def test_the_step_after_surgery_is_that_of_a_small_network(name, case, nets):
    torch.set_default_dtype(torch.float64)
    try:
        _check_step(name, case, nets)
    finally:
        torch.set_default_dtype(torch.float32)


def _check_step(name, case, nets):
    twins = {"table": {1: 0, 5: 3}} if name == "SparseAdam" else TWINS
    readers = {"table": "reader.weight", "0": "2.weight", "2": "4.weight"}
    model = build(name, nets)
    opts = optimizers_of(name, case, model)
    nets.train(model, opts, 5)
    if name == "SparseAdam":
        with torch.no_grad():
            for j, k in twins["table"].items():
                model.table.weight[:, j] = model.table.weight[:, k]
    else:
        nets.make_duplicates_(model, twins)
    keep = kept_of(name, twins)
    folds = {readers[n]: pairs for n, pairs in twins.items()}
    parameters = dict(model.named_parameters())
    small = build(name, nets, small=True)
    small.load_state_dict(folded({n: p.detach() for n, p in parameters.items()}, folds, keep))
    small_opts = optimizers_of(name, case, small)
    for old, new in zip(opts, small_opts, strict=True):
        averages = {n: old.state.get(p, {}).get("ax", p).detach() for n, p in parameters.items()}
        average = folded(averages, folds, keep)
        for key, p in parameters.items():
            if p in old.state:
                target = small.get_parameter(key)
                new.state[target] = {
                    k: small_state(k, v, p, keep[key], old.state[p], average[key]) for k, v in old.state[p].items()
                }
    structure = structure_of(name, model, nets)
    check_optimizers(opts, model)
    x = torch.randn(4, 5)
    before = model(x)
    with Transaction(model, opts) as transaction:
        transaction.apply(build_edits(structure, nets.exact_reductions(structure, twins)))
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)
    for i in range(3):
        nets.train(model, opts, 1, first=10 + i)
        nets.train(small, small_opts, 1, first=10 + i)
        for key, p in model.named_parameters():
            torch.testing.assert_close(p, small.get_parameter(key), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "case"), ALL)
def test_removing_dead_neurons_leaves_the_others_on_their_way(name, case, nets):
    if case.whole:
        pytest.skip(f"not so for {name}: {case.whole}")
    dead = {"table": (2, 7)} if name == "SparseAdam" else DEAD
    model = build(name, nets)
    with torch.no_grad():
        if name == "SparseAdam":
            model.table.weight[:, [2, 7]] = 0
            model.reader.weight[:, [2, 7]] = 0
        else:
            for layer, reader in (("0", "2"), ("2", "4")):
                for c in dead[layer]:
                    model.get_submodule(layer).weight[c] = 0
                    model.get_submodule(layer).bias[c] = 0
                    model.get_submodule(reader).weight[:, c] = 0
    opts = optimizers_of(name, case, model)
    nets.train(model, opts, 4)
    twin = copy.deepcopy(model)
    twin_opts = optimizers_of(name, case, twin)
    for opt, other in zip(opts, twin_opts, strict=True):
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
    structure = structure_of(name, model, nets)
    reductions = [
        nets.reduction(g, [c for c in range(g.num_channels) if c not in dead[g.name]]) for g in structure.groups
    ]
    with Transaction(model, opts) as transaction:
        transaction.apply(build_edits(structure, reductions))
    keep = kept_of(name, dead)
    nets.train(model, opts, 6, first=4)
    nets.train(twin, twin_opts, 6, first=4)
    for key, p in model.named_parameters():
        survivors = cut(twin.get_parameter(key).detach(), [list(k) for k in keep[key]])
        torch.testing.assert_close(p.detach(), survivors, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", sorted({"Adam", "SGD", "NAdam", "RMSprop", "Rprop", "Muon"} - NEWER))
def test_first_moments_follow_the_chain_rule_of_a_merge(name, nets):
    key = {"SGD": "momentum_buffer", "RMSprop": "momentum_buffer", "Rprop": "prev", "Muon": "momentum_buffer"}
    key = key.get(name, "exp_avg")
    case = Case({"lr": 0.01, "momentum": 0.9} if name in ("SGD", "RMSprop") else {"lr": 0.01})
    model = build(name, nets)
    opts = optimizers_of(name, case, model)
    nets.train(model, opts, 3)
    nets.make_duplicates_(model, TWINS)
    weight, reader = model[0].weight, model[2].weight
    old, old_reader = opts[0].state[weight][key].clone(), opts[0].state[reader][key].clone()
    second = {k: v.clone() for k, v in opts[0].state[weight].items() if k in ("exp_avg_sq", "square_avg", "step_size")}
    structure = nets.mlp_structure(model)
    with Transaction(model, opts) as transaction:
        transaction.apply(build_edits(structure, nets.exact_reductions(structure, TWINS, merge=True)))
    want = old.clone()
    for j, k in TWINS["0"].items():
        want[k] += old[j]
    torch.testing.assert_close(opts[0].state[weight][key], want[[0, 2, 3, 4, 6, 7]])
    rows = old_reader.clone()
    rows[2] += old_reader[4]  # the second layer's own merge; its columns are sliced
    torch.testing.assert_close(opts[0].state[reader][key], rows[[0, 1, 2, 3, 5]][:, [0, 2, 3, 4, 6, 7]])
    for k, v in second.items():
        assert opts[0].state[weight][k].equal(v[[0, 2, 3, 4, 6, 7]])


def test_adafactor_keeps_the_estimates_of_convolutions(nets):
    """Leading dims slice; the factored pair keeps every surviving second moment."""
    torch.manual_seed(0)
    for conv, keep in [(nn.Conv1d(6, 4, 3), {1: [0, 4, 5]}), (nn.Conv2d(6, 4, 3), {0: [1, 2], 1: [0, 4, 5]})]:
        opt = torch.optim.Adafactor(conv.parameters(), lr=0.1)
        conv(torch.randn(2, 6, *(7,) * (conv.weight.ndim - 2))).square().sum().backward()
        opt.step()
        state = opt.state[conv.weight]
        full = state["row_var"] @ state["col_var"] / state["row_var"].mean(-2, keepdim=True)
        for dim, kept in keep.items():
            full = full.index_select(dim, torch.tensor(kept))
        index = {d: torch.tensor(k) for d, k in keep.items()}
        with Transaction(conv, [opt]) as transaction:
            transaction.apply([TensorEdit(tensor="weight", keep=index)])
        torch.testing.assert_close(state["row_var"] @ state["col_var"] / state["row_var"].mean(-2, keepdim=True), full)


class Velocity(torch.optim.Optimizer):
    """Of another package than torch."""


def test_an_entry_may_name_a_class_of_another_package(monkeypatch) -> None:
    made = Velocity([torch.zeros(2)], {})
    assert "velocity" not in rules_of(made)
    monkeypatch.setitem(OPTIMIZERS, f"{__name__}.Velocity", StateRules({"velocity": "first"}))
    assert rules_of(made) == {"velocity": "first"}
    with pytest.raises(ArgumentError, match="has rules already"):
        register_optimizer(Velocity, {"velocity": "first"})
