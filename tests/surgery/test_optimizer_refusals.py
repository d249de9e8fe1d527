from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from apoptosis.errors import ArgumentError, UnsupportedOptimizerError
from apoptosis.surgery import Transaction, build_edits, check_optimizers
from apoptosis.surgery.optimizers import rules_of


def test_lbfgs_is_refused(nets):
    model = nets.mlp()
    with pytest.raises(UnsupportedOptimizerError, match="LBFGS cannot follow"):
        check_optimizers([torch.optim.LBFGS(model.parameters())], model)
    check_optimizers([torch.optim.LBFGS(nets.mlp().parameters())], model)  # another model's


class Foreign(torch.optim.Optimizer):
    """An optimizer that is not of torch, with whatever state the test gives it."""

    def __init__(self, parameters, value):
        super().__init__(parameters, {"lr": 0.1})
        self.value = value

    @torch.no_grad()
    def step(self):
        for p in (p for g in self.param_groups for p in g["params"] if p.grad is not None):
            p.add_(p.grad, alpha=-0.1)
            self.state[p].setdefault("thing", self.value(p))


@pytest.mark.parametrize(
    "value",
    [torch.ones_like, lambda p: torch.ones(()), lambda p: torch.ones(1), lambda p: 3, lambda p: None, lambda p: "a"],
)
def test_foreign_state_of_the_parameters_shape_follows(value, nets):
    model = nets.mlp(dtype=torch.float64)
    opt = Foreign(model.parameters(), value)
    nets.train(model, [opt], 2)
    check_optimizers([opt], model)
    structure = nets.mlp_structure(model)
    with Transaction(model, [opt]) as transaction:
        transaction.apply(build_edits(structure, [nets.reduction(g, (0, 1)) for g in structure.groups]))
    nets.train(model, [opt], 2)
    thing = opt.state[model[2].weight]["thing"]
    assert not isinstance(thing, torch.Tensor) or thing.shape in ((2, 2), (), (1,))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            lambda p: torch.ones(p.shape[0], 2),
            r"Foreign holds state 'thing' of parameter '0.weight' \(11, 7\).*dry run.*\(11, 2\)",
        ),
        (lambda p: [torch.ones_like(p)], "of type list"),
        (lambda p: np.ones(3), "of type ndarray"),
    ],
)
def test_foreign_state_of_another_shape_is_refused(value, message, nets):
    model = nets.mlp(dtype=torch.float64)
    opt = Foreign(model.parameters(), value)
    nets.train(model, [opt], 1)
    with pytest.raises(UnsupportedOptimizerError, match=message):
        Transaction(model, [opt])
    with pytest.raises(ArgumentError, match=r"not a torch\.optim\.Optimizer"):
        check_optimizers([model], model)


def test_a_subclass_follows_its_parents_rules(nets):
    class Mine(torch.optim.ASGD):
        pass

    assert rules_of(Mine(nets.mlp().parameters())) == {"ax": "value"}


def test_other_models_state_is_left_alone(nets):
    model, other = nets.mlp(dtype=torch.float64), nets.mlp(dtype=torch.float64, seed=3)
    opt = torch.optim.Adam([*model.parameters(), *other.parameters()])
    nets.train(model, [opt], 2)
    nets.train(other, [opt], 2)
    before = {id(p): copy.deepcopy(opt.state[p]) for p in other.parameters()}
    structure = nets.mlp_structure(model)
    with Transaction(model, [opt]) as transaction:
        transaction.apply(build_edits(structure, [nets.reduction(structure.groups[0], (1, 2))]))
    for p in other.parameters():
        assert all(torch.equal(opt.state[p][k], v) for k, v in before[id(p)].items())
    nets.train(other, [opt], 1)
    nets.train(model, [opt], 1)
