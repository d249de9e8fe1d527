"""The oracle notices: every check fails when what it is about is broken."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from families.family import Family, first_tensor
from families.oracle import CHECKS, operate, oracle
from families.registry import FAMILIES


@pytest.fixture(scope="module")
def operation():
    return operate(FAMILIES["MLP, tanh, batch norm"], torch.float64)


def broken(operation, change):
    model, optimizer = operation.copy()
    with torch.no_grad():
        change(model)
    return replace(operation, after=model, optimizer=optimizer)


def fails(check, operation, match):
    with pytest.raises(AssertionError, match=match):
        CHECKS[check][0](operation)


def test_it_passes_untouched(operation):
    for check, _ in CHECKS.values():
        check(operation)


def test_other_outputs(operation):
    fails("eval outputs", broken(operation, lambda m: m[-1].bias.mul_(1 + 1e-8)), "evaluation mode")


def test_other_outputs_in_training_only(operation):
    changed = broken(operation, lambda m: setattr(m[1], "eps", 1e-3))
    fails("train outputs", changed, "training mode")


def test_statistics_that_training_passes_leave_behind(operation):
    changed = broken(operation, lambda m: setattr(m[1], "momentum", 0.2))
    fails("train outputs", changed, "after training")


def test_nothing_found(operation):
    event = replace(operation.event, groups={})
    fails("planted", replace(operation, event=event), "planted")


def test_one_less_found(operation):
    groups = {name: (before, after + 1) for name, (before, after) in operation.event.groups.items()}
    fails("planted", replace(operation, event=replace(operation.event, groups=groups)), "planted")


def test_a_listed_group_is_pinned(operation):
    fails("planted", replace(operation, not_planted={"0": "pinned: no rule"}), "must not be pinned")


def test_attributes_that_lie(operation):
    fails("attributes", broken(operation, lambda m: setattr(m[0], "out_features", 12)), "out_features is 12")


def test_a_checkpoint_that_does_not_tell_everything(operation):
    fails("checkpoint", broken(operation, lambda m: setattr(m[1], "eps", 1e-3)), "after save and load")


def test_state_that_a_state_dict_does_not_hold(operation):
    class Hidden(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.scale = inner, torch.ones(())

        def forward(self, x):
            return self.inner(x) * float(self.scale)

        def __deepcopy__(self, memo):
            other = Hidden(copy.deepcopy(self.inner, memo))
            other.scale = self.scale + 1.0
            return other

    model, optimizer = operation.copy()
    with pytest.raises(AssertionError):
        CHECKS["state_dict"][0](replace(operation, after=Hidden(model), optimizer=optimizer))


def test_no_gradient(operation):
    fails("gradients", broken(operation, lambda m: m[0].weight.requires_grad_(False)), "'0.weight' has no gradient")


def test_an_optimizer_that_lost_a_parameter(operation):
    model, optimizer = operation.copy()
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]
    fails("gradients", replace(operation, after=model, optimizer=optimizer), "left '0.weight' as it was")


def test_an_optimizer_of_another_model(operation):
    model, _ = operation.copy()
    _, other = operation.copy()
    fails("training", replace(operation, after=model, optimizer=other), "the loss went")


def test_optimizer_state_of_another_shape(operation):
    model, optimizer = operation.copy()
    optimizer.state[model[0].weight]["exp_avg"] = torch.zeros(12, 6, dtype=torch.float64)
    fails(
        "training", replace(operation, after=model, optimizer=optimizer), r"exp_avg of '0.weight' has shape \(12, 6\)"
    )


def test_groups_that_are_lost_after_the_first_event(operation):
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model, optimizer = operation.copy()
    fails("second event", replace(operation, after=Wrapped(model), optimizer=optimizer), "no longer found")


def test_a_family_whose_listed_group_is_pinned_fails_as_a_whole():
    family = FAMILIES["MLP"]
    listed = Family(name="pinned", build=family.build, example=family.example, groups={**family.groups, "6": 1})
    with pytest.raises(AssertionError, match=r"planted.*'6' must not be pinned"):
        oracle(listed)


def test_a_group_that_is_known_to_be_missing_does_not():
    family = FAMILIES["MLP"]
    known = replace(family, groups={**family.groups, "6": 1}, missing={"6": "the output"})
    oracle(known)


def test_first_tensor():
    x = torch.ones(2)
    assert first_tensor({"a": torch.ones(2, dtype=torch.long), "b": [x]}) is x
    with pytest.raises(TypeError, match="no floating point tensor"):
        first_tensor({"a": 1})
