"""Optimizers around optimizers, and of other libraries: their state follows, or they are refused beforehand."""

from __future__ import annotations

import copy
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from apoptosis import Apoptosis, load, save
from apoptosis.errors import CheckpointError, UnsupportedOptimizerError
from apoptosis.records import TensorEdit
from apoptosis.surgery import Transaction, build_edits, check_optimizers, layers


class Lookahead(torch.optim.Optimizer):
    """Slow weights in a state of its own, around an optimizer with another one."""

    def __init__(self, base, k=5, alpha=0.5):
        super().__init__(base.param_groups, {})
        self.optimizer, self.k, self.alpha, self.count = base, k, alpha, 0
        self.param_groups = base.param_groups
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["slow"] = p.detach().clone()

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        self.count += 1
        if self.count % self.k == 0:
            for p in (p for group in self.param_groups for p in group["params"]):
                self.state[p]["slow"].lerp_(p, self.alpha)
                p.copy_(self.state[p]["slow"])


class Sharp(torch.optim.Optimizer):
    """Sharpness-aware: the base optimizer takes over the groups, its state is apart."""

    def __init__(self, params, base, **arguments):
        super().__init__(params, arguments)
        self.base_optimizer = base(self.param_groups, **arguments)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None, "it takes a closure"
        members = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in members:
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad, alpha=0.05)
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        for p in members:
            p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        return loss


class Factored(torch.optim.Optimizer):
    """Second moments as a row and a column factor, as Adafactor's of transformers, in the last two dims."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state, square = self.state[p], p.grad.square() + 1e-12
            if p.ndim < 2:
                update = p.grad * state.setdefault("exp_avg_sq", torch.ones_like(p)).lerp_(square, 0.1).rsqrt()
            else:
                row = state.setdefault("exp_avg_sq_row", square.mean(-1)).lerp_(square.mean(-1), 0.1)
                column = state.setdefault("exp_avg_sq_col", square.mean(-2)).lerp_(square.mean(-2), 0.1)
                scale = row.unsqueeze(-1) * column.unsqueeze(-2) / row.mean(-1, keepdim=True).unsqueeze(-1)
                update = p.grad * scale.rsqrt()
            p.sub_(update, alpha=1e-2)


class Flat(torch.optim.Optimizer):
    """State as vectors, one of them the weights as they were at first."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            state.setdefault("first", p.flatten().clone())
            state.setdefault("sum", torch.zeros_like(p).flatten()).add_(p.grad.flatten())
            p.sub_(state["sum"].reshape(p.shape), alpha=1e-3)

    def __init__(self, params):
        super().__init__(params, {})


class Boxed(torch.optim.Optimizer):
    """Keeps momenta in an object, where nobody sees them."""

    def __init__(self, params, place="object"):
        super().__init__(params, {})
        self.place, self.box = place, type("Box", (), {})()

    @torch.no_grad()
    def step(self, closure=None):
        members = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.place == "object":
            if not hasattr(self.box, "momenta"):
                self.box.momenta = [torch.zeros_like(p) for p in members]
            momenta = self.box.momenta
        elif self.place == "state":
            momenta = self.state.setdefault("shared", {"all": [torch.zeros_like(p) for p in members]})["all"]
        else:
            momenta = self.param_groups[0].setdefault("momenta", [torch.zeros_like(p) for p in members])
        for p, momentum in zip(members, momenta, strict=True):
            p.sub_(momentum.mul_(0.9).add_(p.grad), alpha=1e-2)


class Masters(torch.optim.Optimizer):
    """Steps on copies in float64 and writes them back."""

    def __init__(self, params):
        self.pairs = [(p, nn.Parameter(p.detach().double())) for p in params]
        super().__init__([p for p, _ in self.pairs], {})
        self.inner = torch.optim.SGD([p for _, p in self.pairs], lr=0.1)


class Preconditioned(torch.optim.Optimizer):
    """A matrix per dim, as Shampoo's."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if p.ndim == 2:
                self.state[p].setdefault("left", torch.eye(p.shape[0])).add_(p.grad @ p.grad.T)
            p.sub_(p.grad, alpha=1e-2)


def loop(runs, net, optimizer, apo, steps, first=0):
    """Train by a closure, which every optimizer here takes; returns the events."""
    events = []
    for step in range(first, steps):
        x = runs.inputs(runs.BATCH, step)

        def closure(x=x):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), runs.labels(x))
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)
        if event := apo.step():
            events.append(event)
    return events


MADE = {
    "lookahead": lambda net: Lookahead(torch.optim.Adam(net.parameters(), lr=3e-3)),
    "sharp": lambda net: Sharp(net.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9),
    "two in one": lambda net: Lookahead(Sharp(net.parameters(), torch.optim.Adam, lr=3e-3)),
    "factored": lambda net: Factored(net.parameters()),
    "flat": lambda net: Flat(net.parameters()),
}


@pytest.mark.parametrize("kind", [kind for kind in MADE if kind != "two in one"])
def test_a_run_goes_on_after_its_events(runs, kind):
    net = runs.mlp()
    runs.doubled(net, 0)
    optimizer = MADE[kind](net)
    apo = runs.start(net, optimizer)
    assert loop(runs, net, optimizer, apo, runs.STEPS)
    assert net[0].out_features < 32
    for layer in layers(optimizer):
        for p, state in layer.state.items():
            assert all(v.numel() <= p.numel() for v in state.values() if isinstance(v, torch.Tensor))


def test_layers_come_innermost_first_and_once(runs):
    net = runs.mlp()
    optimizer = MADE["two in one"](net)
    assert [type(layer).__name__ for layer in layers(optimizer)] == ["Adam", "Sharp", "Lookahead"]
    assert layers(torch.optim.Adam(net.parameters()))[0].__class__ is torch.optim.Adam
    optimizer.optimizer.state = optimizer.optimizer.base_optimizer.state  # one state for both
    assert [type(layer).__name__ for layer in layers(optimizer)] == ["Adam", "Lookahead"]


def test_slow_weights_are_folded_as_the_weights_are(nets):
    """The slow network computes after an exact removal what it computed before."""
    model = nets.mlp(dtype=torch.float64)
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.0))  # the slow weights are the weights
    nets.train(model, [optimizer], 1)
    structure = nets.mlp_structure(model)
    with Transaction(model, [optimizer]) as transaction:
        transaction.apply(build_edits(structure, [nets.reduction(g, (0, 1)) for g in structure.groups]))
    for p in model.parameters():
        assert torch.equal(optimizer.state[p]["slow"], p)


def test_flattened_state_is_cut_as_its_parameter_is(nets):
    model = nets.mlp(dtype=torch.float64)
    optimizer = Flat(model.parameters())
    nets.train(model, [optimizer], 1)
    for p in model.parameters():
        optimizer.state[p]["first"] = p.detach().flatten().clone()
        optimizer.state[p]["sum"] = torch.arange(p.numel(), dtype=p.dtype)
    structure, weight = nets.mlp_structure(model), model[2].weight
    want = torch.arange(weight.numel(), dtype=weight.dtype).reshape(weight.shape)[:2][:, :2]
    with Transaction(model, [optimizer]) as transaction:
        transaction.apply(build_edits(structure, [nets.reduction(g, (0, 1)) for g in structure.groups]))
    assert torch.equal(optimizer.state[weight]["sum"], want.flatten())
    assert torch.equal(optimizer.state[weight]["first"], weight.flatten())


def test_factors_of_square_weights_stay_beside_their_dims(nets):
    """By shape alone (8,) may be rows or columns of (8, 8): a dry run knows. Survivors keep their second moments."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    optimizer = Factored(model.parameters())
    check_optimizers([optimizer], model)
    model(torch.randn(5, 8, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    weight = model[1].weight
    state = optimizer.state[weight]
    row, column = state["exp_avg_sq_row"].clone(), state["exp_avg_sq_col"].clone()
    full = row[:, None] * column[None, :] / row.mean()
    keep = torch.tensor([1, 4, 6])
    edits = [TensorEdit(tensor="0.weight", keep={0: keep}), TensorEdit(tensor="0.bias", keep={0: keep}),
             TensorEdit(tensor="1.weight", keep={1: keep})]  # fmt: skip
    with Transaction(model, [optimizer]) as transaction:
        transaction.apply(edits)
    new_row, new_column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
    assert (new_row.shape, new_column.shape) == ((8,), (3,))
    torch.testing.assert_close(new_row[:, None] * new_column[None, :] / new_row.mean(), full[:, keep])
    assert optimizer.state[model[0].weight]["exp_avg_sq_row"].shape == (3,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: Boxed(net.parameters()), r"Boxed cannot follow.*dry run.*outside\s+of its state"),
        (lambda net: Boxed(net.parameters(), "state"), r"parameter '0.weight'.*state\['shared'\]"),
        (lambda net: Boxed(net.parameters(), "group"), r"parameter '0.weight'.*parameter groups' 'momenta'"),
        (lambda net: Masters(net.parameters()), "Masters steps on copies .* inner SGD"),
        (lambda net: Preconditioned(net.parameters()), r"'left' of parameter '0.weight'.*\(11, 11\)"),
    ],
)
def test_what_cannot_follow_is_refused_before_the_first_step(runs, make, message):
    net = runs.mlp()
    optimizer = make(net)
    before, rest = runs.everything(net), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(UnsupportedOptimizerError, match=message):
        Apoptosis(net, optimizer, runs.inputs(4, 0), total_steps=60, calibration=1.0)
    assert runs.same(runs.everything(net), before)
    assert runs.same(optimizer.state_dict(), rest)


def test_tensors_that_appear_later_are_refused_at_the_event_and_nothing_changes(runs):
    """What a dry run does not come to, since it takes a hundred steps."""

    class Late(torch.optim.SGD):
        def step(self, closure=None):
            self.count = getattr(self, "count", 0) + 1
            if self.count == 100:
                self.copies = [p.detach().clone() for p in self.param_groups[0]["params"]]
            return super().step(closure)

    net = runs.mlp()
    optimizer = Late(net.parameters(), lr=0.05)
    apo = runs.start(net, optimizer)
    optimizer.count = 99
    seen = []
    with pytest.raises(UnsupportedOptimizerError, match="attribute 'copies'"):
        runs.train(net, optimizer, apo, after=lambda _: seen.append(runs.everything(net, optimizer)))
    assert net[0].out_features == 32
    runs.train(net, optimizer, None, steps=3)


def test_a_dry_run_leaves_no_trace(runs, capsys):
    class Loud(torch.optim.SGD):
        steps = 0

        def step(self, closure=None):
            Loud.steps += 1
            sys.stdout.write(f"a step {random.random()} {np.random.rand()} {torch.rand(1)}")
            return super().step(closure)

    net = runs.mlp()
    optimizer = Lookahead(Loud(net.parameters(), lr=0.05, momentum=0.9))
    called = []
    handle = torch_optimizer.register_optimizer_step_post_hook(lambda *_: called.append(1))
    optimizer.register_step_post_hook(lambda *_: called.append(2))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 1)
    before, hooks = runs.everything(net, optimizer), dict(torch_optimizer._global_optimizer_post_hooks)
    apo = runs.start(net, optimizer)
    handle.remove()
    assert Loud.steps >= 24
    assert called == []
    assert capsys.readouterr().out == ""
    assert hooks
    assert runs.same(runs.everything(net, optimizer), before)
    assert optimizer.count == 0
    assert schedule.last_epoch == 0
    apo.close()


def test_what_a_dry_run_cannot_do_is_no_reason_to_refuse(runs):
    class Needs(torch.optim.SGD):
        def step(self, closure=None):
            if self.param_groups[0]["params"][0].shape != (32, 6):
                raise RuntimeError("other parameters")
            return super().step(closure)

    net = runs.mlp()
    Apoptosis(net, Needs(net.parameters(), lr=0.1), runs.inputs(4, 0), total_steps=60, calibration=1.0)


@pytest.mark.parametrize("kind", ["lookahead", "sharp"])
def test_what_is_wrapped_is_saved_and_loaded(runs, kind, tmp_path):
    def fresh(seed):
        net = runs.mlp(seed=seed)
        optimizer = MADE[kind](net)
        return net, optimizer, runs.start(net, optimizer)

    net, optimizer, apo = fresh(0)
    assert loop(runs, net, optimizer, apo, 40)
    save(tmp_path / "a", net, optimizer, apo, count=getattr(optimizer, "count", 0))
    loop(runs, net, optimizer, apo, 50, first=40)
    other, again, resumed = fresh(1)
    extra = load(tmp_path / "a", other, again, resumed)
    again.count = extra["count"]
    loop(runs, other, again, resumed, 50, first=40)
    assert runs.same(runs.everything(net)["tensors"], runs.everything(other)["tensors"])
    plain = runs.mlp()
    with pytest.raises(CheckpointError, match="wrap"):
        load(tmp_path / "a", plain, runs.adam(plain))


def test_factored_optimizers_of_transformers_go_on(runs):
    optimization = pytest.importorskip("transformers.optimization")
    net = runs.cnn()
    runs.doubled(net, 3)
    optimizer = optimization.Adafactor(net.parameters(), lr=3e-3, relative_step=False, beta1=0.9)
    apo = runs.start(net, optimizer, example=runs.inputs(4, 0, (2, 6, 6)))
    events = runs.train(net, optimizer, apo, shape=(2, 6, 6))
    assert events
    state = optimizer.state[net[3].weight]
    assert state["exp_avg_sq_row"].shape == net[3].weight.shape[:-1]
    assert state["exp_avg_sq_col"].shape == net[3].weight.shape[:-2] + net[3].weight.shape[-1:]


@pytest.mark.parametrize(
    "name",
    ["Lion", "AdaFactor", "CAME", "SM3", "Prodigy", "ScheduleFreeAdamW", "Ranger", "DAdaptAdam", "AdaBelief", "Tiger"],
)
def test_optimizers_of_another_library_go_on(runs, name):
    library = pytest.importorskip("pytorch_optimizer")
    net = runs.mlp()
    runs.doubled(net, 0)
    optimizer = getattr(library, name)(net.parameters())
    if hasattr(optimizer, "train"):
        optimizer.train()
    runs.train(net, optimizer, runs.start(net, optimizer))


@pytest.mark.parametrize("name", ["Shampoo", "SOAP", "Kron", "ScalableShampoo", "SPAM", "AggMo"])
def test_optimizers_of_another_library_are_refused_beforehand(runs, name):
    library = pytest.importorskip("pytorch_optimizer")
    net = runs.mlp()
    with pytest.raises(UnsupportedOptimizerError, match=f"{name} holds state"):
        runs.start(net, getattr(library, name)(net.parameters()))


def test_wrappers_of_another_library_go_on(runs):
    library = pytest.importorskip("pytorch_optimizer")
    for make in (
        lambda p: library.Lookahead(torch.optim.Adam(p, lr=3e-3)),
        lambda p: library.SAM(p, torch.optim.AdamW, lr=3e-3),
        lambda p: library.OrthoGrad(torch.optim.AdamW(p, lr=3e-3)),
    ):
        net = runs.mlp()
        runs.doubled(net, 0)
        optimizer = make(net.parameters())
        assert loop(runs, net, optimizer, runs.start(net, optimizer), runs.STEPS)
    net = runs.mlp()
    with pytest.raises(UnsupportedOptimizerError, match=r"state\['trac'\]"):
        runs.start(net, library.TRAC(torch.optim.AdamW(net.parameters())))
