"""The same edits on optimizer state: which rule each state tensor follows.

Lives here: one table of rules per optimizer class, the check before anything changes, and the new state values.
Does not live here: writing them (modules.py), and saving them (checkpoint.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apoptosis.errors import ArgumentError, UnsupportedOptimizerError
from apoptosis.records import TensorEdit
from apoptosis.sharded import Whole, part, whole
from apoptosis.surgery.redundancy import inside
from apoptosis.surgery.values import apply_edit, merge_like, slice_like, unscaled

Rule = Literal["slice", "first", "value", "row", "column"]

# slice: second moments, step sizes. first: first moments and gradients, by the chain rule for pairwise merges, else
# sliced. value: an average of the parameter itself, folded like it. row, column: Adafactor's factored second moments.
# Keys that are not listed, and classes that are not, go by shape: the parameter's shape is sliced, one number stays.
_RULES: dict[str, dict[str, Rule]] = {
    "Adadelta": {},
    "Adafactor": {"row_var": "row", "col_var": "column"},
    "Adagrad": {},
    "Adam": {"exp_avg": "first"},
    "AdamW": {"exp_avg": "first"},
    "Adamax": {"exp_avg": "first"},
    "ASGD": {"ax": "value"},
    "Muon": {"momentum_buffer": "first"},
    "NAdam": {"exp_avg": "first"},
    "RAdam": {"exp_avg": "first"},
    # grad_avg is sliced with square_avg: merged, the variance square_avg - grad_avg² could turn negative.
    "RMSprop": {"momentum_buffer": "first"},
    "Rprop": {"prev": "first"},
    "SGD": {"momentum_buffer": "first"},
    "SparseAdam": {"exp_avg": "first"},
}
# Squares of gradients, which fall by the square of a factor that the parameter is multiplied by.
_SQUARES = frozenset(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance"))
_REFUSED = {"LBFGS": "its history is one flat vector over all parameters"}
_CONVENTION: dict[str, Rule] = {"exp_avg": "first", "momentum_buffer": "first"}


class StateChange(NamedTuple):
    """One new value of optimizer state: `state[key] = value`."""

    state: MutableMapping[str, Any]
    key: str
    value: Tensor


def check_optimizers(optimizers: Iterable[Optimizer], model: nn.Module) -> None:
    """Refuse optimizers whose state for the model's parameters has no rule. Parameters of other models are left alone.

    Args:
        optimizers: the optimizers that hold the model's parameters.
        model: the model.

    Raises:
        ArgumentError: something that is no torch.optim.Optimizer.
        UnsupportedOptimizerError: LBFGS, or a state entry with neither the parameter's shape nor a rule of its own.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> check_optimizers([torch.optim.Adam(net.parameters())], net)
    """
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise ArgumentError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer.")
        if not any(id(p) in names for group in optimizer.param_groups for p in group["params"]):
            continue
        optimizer = inside(optimizer)
        held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in names]
        _check_class(optimizer)
        for p in held:
            for key, value in optimizer.state.get(p, {}).items():
                _rule(optimizer, names[id(p)], p, key, value)


def state_changes(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], edits: Mapping[str, TensorEdit]
) -> list[StateChange]:
    """Compute the new state values of the edited parameters that the optimizer holds; write nothing.

    Args:
        optimizer: one optimizer.
        parameters: name -> parameter before the event.
        edits: name -> edit.

    Returns: the changes. Raises: UnsupportedOptimizerError: as in `check_optimizers`.
    """
    optimizer = inside(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    changes: list[StateChange] = []
    averages: dict[str, Mapping[str, Tensor]] = {}
    for name, edit in edits.items():
        p = parameters.get(name)
        if p is None or id(p) not in held:
            continue
        _check_class(optimizer)
        state = optimizer.state.get(p, {})
        for key, value in state.items():
            rule = _rule(optimizer, name, p, key, value)
            if rule == "value":
                averages.setdefault(key, Whole(_averages(optimizer, parameters, key)))
                changes.append(StateChange(state, key, part(apply_edit(edit, whole(value), averages[key]), value)))
            elif rule is not None:
                changes.append(StateChange(state, key, part(_changed(rule, edit, state, key, whole(value)), value)))
    return changes


def _check_class(optimizer: Optimizer) -> None:
    for cls in type(optimizer).__mro__:
        if cls.__module__.startswith("torch.optim") and cls.__name__ in _REFUSED:
            raise UnsupportedOptimizerError(
                f"{type(optimizer).__name__} cannot follow a shrinking network: {_REFUSED[cls.__name__]}. "
                "Use another optimizer of torch.optim."
            )


def rules_of(optimizer: Optimizer) -> dict[str, Rule]:
    """Map state keys to rules, for keys with a rule of their own; a subclass follows its torch.optim parent."""
    for cls in type(optimizer).__mro__:
        if cls.__module__.startswith("torch.optim") and cls.__name__ in _RULES:
            return _RULES[cls.__name__]
    return _CONVENTION


def _rule(optimizer: Optimizer, name: str, p: Tensor, key: str, value: object) -> Rule | None:
    """Find the rule of one state entry; None for what stays as it is."""
    if value is None or isinstance(value, bool | int | float | complex | str):
        return None
    if isinstance(value, Tensor):
        rule = rules_of(optimizer).get(key, "slice")
        expected = tuple(p.shape)
        if rule == "row" and p.ndim > 1:
            expected = (*expected[:-1], 1)
        elif rule == "column" and p.ndim > 1:
            expected = (*expected[:-2], 1, expected[-1])
        if tuple(value.shape) == expected:
            return rule
        if value.numel() == 1 and value.ndim <= 1:
            return None
        what = f"a tensor of shape {tuple(value.shape)}"
    else:
        what = f"of type {type(value).__name__}"
    raise UnsupportedOptimizerError(
        f"{type(optimizer).__name__} holds state '{key}' of parameter '{name}' {tuple(p.shape)}, {what}: "
        "there is no rule for slicing it. Use an optimizer whose state has the shape of its parameters."
    )


def _averages(optimizer: Optimizer, parameters: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: optimizer.state.get(p, {}).get(key, p) for name, p in parameters.items()}


def _changed(rule: Rule, edit: TensorEdit, state: Mapping[str, Any], key: str, value: Tensor) -> Tensor:
    if rule == "first":
        return merge_like(edit, value)
    if rule == "row":
        return _factor(edit, value, state.get("col_var"), last=-1, other=-2)
    if rule == "column":
        return _factor(edit, value, state.get("row_var"), last=-2, other=-1)
    return slice_like(edit, unscaled(edit, value, 2) if key in _SQUARES else value)


def _factor(edit: TensorEdit, factor: Tensor, partner: Tensor | None, *, last: int, other: int) -> Tensor:
    """Slice one of Adafactor's factors so that the survivors' second moments stay what they were.

    V_ij = r_i c_j / mean(r) with r_i = mean_j V_ij and c_j = mean_i V_ij. Over the kept columns the mean of V is
    r'_i = r_i mean(c[kept]) / mean(c), and likewise c'; then r'_i c'_j / mean(r') = V_ij.
    """
    ndim = factor.ndim
    averaged = edit.keep.get(ndim + last)
    partner = None if partner is None else whole(partner)
    own = {dim: keep for dim, keep in edit.keep.items() if dim != ndim + last}
    value = factor.detach()
    if averaged is not None and partner is not None:
        kept_mean = partner.index_select(ndim + last, averaged.to(partner.device)).double().mean(last, keepdim=True)
        mean = partner.double().mean(last, keepdim=True)
        ratio = torch.where(mean > 0, kept_mean / mean, torch.ones_like(mean))
        value = (value.double() * ratio).to(factor.dtype)
    return slice_like(TensorEdit(tensor=edit.tensor, keep=own), value)
