"""The same edits on optimizer state: which rule each state tensor follows.

Holds: one table of rules per optimizer class, rules by shape for classes that are not in it, and the new state
values. Elsewhere: writing them (transaction.py), saving them (checkpoint/save_load.py), the check before
anything changes and what is learnt of a class by trying it (dry_run.py).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from itertools import combinations
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from apoptosis.distributed.sharded import FullTensors, full_tensor, shard_like
from apoptosis.errors import ArgumentError, UnsupportedOptimizerError
from apoptosis.records import TensorEdit
from apoptosis.surgery.nested_optimizers import layers, parameters_of
from apoptosis.surgery.values import apply_edit, merge_like, slice_like, unscaled

Rule = Literal["slice", "square", "first", "value", "row", "column"]
"""slice: step sizes and the like. square: second moments, sliced, which fall by the square of a factor that the
parameter is multiplied by. first: first moments and gradients, by the chain rule for pairwise merges, else sliced.
value: an average of the parameter itself, folded like it. row, column: Adafactor's factored second moments."""
Layout = tuple[int | None, ...]
"""For every dim of a state tensor the dim of its parameter that it runs along; None: of size 1 for another reason."""
Learnt = dict[tuple[str, int], "Layout | Literal['value', 'fixed']"]
"""(key of the state, dims of the parameter) -> how the tensor follows; "fixed": it does not depend on the shape."""

LEARNT: WeakKeyDictionary[Optimizer, Learnt] = WeakKeyDictionary()
"""What dry runs have shown, of optimizers that have no table."""


class StateRules(NamedTuple):
    """How the state of one optimizer class follows an edit.

    rules: by the key of a state tensor. Others go by their shape: the parameter's shape is sliced, one number stays.
    needed: keys that step() reads without asking whether they are there, which a checkpoint must hold.
    """

    rules: Mapping[str, Rule] = {}
    needed: tuple[str, ...] = ()


_FIRST: Mapping[str, Rule] = {"exp_avg": "first"}
_ADAM = StateRules(_FIRST, ("step", "exp_avg", "exp_avg_sq"))
OPTIMIZERS: Mapping[str, StateRules] = {
    "Adadelta": StateRules(needed=("step", "square_avg", "acc_delta")),
    "Adafactor": StateRules({"row_var": "row", "col_var": "column"}),
    "Adagrad": StateRules(needed=("step", "sum")),
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "Adamax": StateRules(_FIRST, ("step", "exp_avg", "exp_inf")),
    "ASGD": StateRules({"ax": "value"}, ("step", "eta", "mu", "ax")),
    "Muon": StateRules({"momentum_buffer": "first"}),
    "NAdam": StateRules(_FIRST, ("step", "mu_product", "exp_avg", "exp_avg_sq")),
    "RAdam": _ADAM,
    # grad_avg is sliced with square_avg: merged, the variance square_avg - grad_avg² could turn negative.
    "RMSprop": StateRules({"momentum_buffer": "first"}, ("step", "square_avg")),
    "Rprop": StateRules({"prev": "first"}, ("step", "prev", "step_size")),
    "SGD": StateRules({"momentum_buffer": "first"}),
    "SparseAdam": _ADAM,
}
"""The classes of torch.optim by their names, those of other packages by their qualified names ("package.module.Class"),
so that nothing is imported; subclasses follow their parent."""
_REGISTERED: dict[type, Mapping[str, Rule]] = {}  # by register_optimizer
_CONVENTION: Mapping[str, Rule] = {"exp_avg": "first", "momentum_buffer": "first"}  # of all other classes
_SQUARES = frozenset(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance"))  # without a rule, of any class
_REFUSED = {
    "LBFGS": (
        "torch.optim",
        "its history is one flat vector over all parameters. Use another optimizer of torch.optim.",
    ),
    "DPOptimizer": (
        "opacus",
        "it steps on per-example gradients, and its privacy rests on noise in every parameter. Train with it without "
        "apoptosis, then shrink_() the trained network.",
    ),
}


class StateChange(NamedTuple):
    """One new value of optimizer state: `state[key] = value`."""

    state: MutableMapping[str, Any]
    key: str
    value: Tensor


def state_changes(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], edits: Mapping[str, TensorEdit]
) -> list[StateChange]:
    """Compute the new state values of the edited parameters that the optimizer holds; write nothing.

    Args:
        optimizer: one optimizer, with what it wraps.
        parameters: name -> parameter before the event.
        edits: name -> edit.

    Returns: the changes. Raises: UnsupportedOptimizerError: as in `check_optimizers`.
    """
    held = {id(p) for p in parameters_of(optimizer)}
    changes: list[StateChange] = []
    for layer in layers(optimizer):
        averages: dict[str, Mapping[str, Tensor]] = {}
        for name, edit in edits.items():
            p = parameters.get(name)
            if p is None or id(p) not in held:
                continue
            check_class(layer)
            state = layer.state.get(p, {})
            for key, value in state.items():
                rule = rule_of(layer, name, p, key, value)
                if rule is None:
                    continue
                full, flat = full_tensor(value), not isinstance(rule, tuple) and value.ndim == 1 < p.ndim
                full = full.reshape(p.shape) if flat else full
                if rule == "value":
                    averages.setdefault(key, FullTensors(_averages(layer, parameters, key)))
                    new = apply_edit(edit, full, averages[key])
                else:
                    new = _changed(rule, edit, state, key, full)
                changes.append(StateChange(state, key, shard_like(new.flatten() if flat else new, value)))
    return changes


def check_class(optimizer: Optimizer) -> None:
    """Refuse classes whose state cannot follow. Raises: UnsupportedOptimizerError: by name, with the reason."""
    for cls in type(optimizer).__mro__:
        package, why = _REFUSED.get(cls.__name__, ("?", ""))
        if cls.__module__.startswith(package):
            raise UnsupportedOptimizerError(f"{type(optimizer).__name__} cannot follow a shrinking network: {why}")


def register_optimizer(
    optimizer_type: type[Optimizer], rules: Mapping[str, Literal["first", "square", "value"]]
) -> None:
    """Say which state of an optimizer is a first or second moment, or an average of the parameter itself.

    Only needed where neither the key nor the values say it: state of the parameter's shape loses the removed positions,
    whatever it is. A first moment follows merges of neurons, too, by the chain rule; a second moment falls by the
    square of a factor that the parameter takes; an average of the parameter is folded as the parameter is. `exp_avg`
    and `momentum_buffer` are taken for first moments in any class.

    Args:
        optimizer_type: the class; its subclasses follow it.
        rules: key of `optimizer.state[parameter]` -> "first", "square" or "value".

    Raises: ArgumentError: no optimizer class, a class that has rules already, or another rule.

    Example:
        >>> class HeavyBall(Optimizer):
        ...     pass
        >>> register_optimizer(HeavyBall, {"velocity": "first"})
        >>> rules_of(HeavyBall([torch.zeros(2)], {}))
        {'velocity': 'first'}
    """
    if not (isinstance(optimizer_type, type) and issubclass(optimizer_type, Optimizer)):
        raise ArgumentError(f"register_optimizer takes a subclass of torch.optim.Optimizer, not {optimizer_type!r}.")
    if optimizer_type in _REGISTERED or _table_of(optimizer_type) is not None:
        raise ArgumentError(f"optimizer {optimizer_type.__qualname__} has rules already.")
    wrong = {key: rule for key, rule in rules.items() if rule not in ("first", "square", "value")}
    if wrong:
        raise ArgumentError(f"register_optimizer: a rule is 'first', 'square' or 'value', not {wrong}.")
    _REGISTERED[optimizer_type] = dict(rules)


def _table_of(cls: type) -> StateRules | None:
    own = cls.__module__.startswith("torch.optim")
    return OPTIMIZERS.get(cls.__name__ if own else f"{cls.__module__}.{cls.__qualname__}")


def rules_of(optimizer: Optimizer) -> Mapping[str, Rule]:
    """Map state keys to rules, for keys with a rule of their own; a subclass follows its parent."""
    for cls in type(optimizer).__mro__:
        if cls in _REGISTERED:
            return _REGISTERED[cls]
        if (table := _table_of(cls)) is not None:
            return table.rules
    return _CONVENTION


def rule_of(
    optimizer: Optimizer, name: str, p: Tensor, key: str, value: object, note: str = ""
) -> Rule | Layout | None:
    """Find the rule of one state entry; None for what stays as it is. note: on the parameter, for the message.

    Raises: UnsupportedOptimizerError: there is none.
    """
    if value is None or isinstance(value, bool | int | float | complex | str):
        return None
    if isinstance(value, Tensor):
        rule = rules_of(optimizer).get(key, "square" if key in _SQUARES else "slice")
        learnt = LEARNT.get(optimizer, {}).get((key, p.ndim))
        expected = tuple(p.shape)
        if rule == "row" and p.ndim > 1:
            expected = (*expected[:-1], 1)
        elif rule == "column" and p.ndim > 1:
            expected = (*expected[:-2], 1, expected[-1])
        if tuple(value.shape) in (expected, (p.numel(),)):  # the second: flattened
            return "value" if learnt == "value" else rule
        if learnt == "fixed" or value.numel() == 1:
            return None
        found = [learnt] if isinstance(learnt, tuple) else layouts(tuple(value.shape), tuple(p.shape))
        fitting = [layout for layout in found if fits(layout, tuple(value.shape), tuple(p.shape))]
        if len(fitting) == 1:
            return fitting[0]
        what = f"a tensor of shape {tuple(value.shape)}"
    else:
        what = f"of type {type(value).__name__}"
    raise UnsupportedOptimizerError(
        f"{type(optimizer).__name__} holds state '{key}' of parameter '{name}' {tuple(p.shape)}{note}, {what}: "
        "there is no rule for slicing it. Use an optimizer whose state has the shape of its parameters."
    )


def layouts(state: tuple[int, ...], shape: tuple[int, ...]) -> list[Layout]:
    """List the ways in which a statistic over some dims of a parameter can have this shape.

    Example:
        >>> layouts((8,), (8, 5)), layouts((1, 5), (8, 5)), layouts((8,), (8, 8))
        ([(0,)], [(None, 1)], [(0,), (1,)])
    """
    if len(state) == len(shape):  # the dims that it is taken over are still there
        kept = tuple(dim if size == full else None for dim, (size, full) in enumerate(zip(state, shape, strict=True)))
        return [kept] if fits(kept, state, shape) else []
    return [dims for dims in combinations(range(len(shape)), len(state)) if fits(dims, state, shape)]


def fits(layout: Layout, state: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a state tensor of this shape is laid out so beside a parameter of that shape."""
    sizes = tuple(1 if dim is None else shape[dim] for dim in layout if dim is None or dim < len(shape))
    return sizes == state and any(dim is not None for dim in layout)


def _averages(optimizer: Optimizer, parameters: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
    found = {}
    for name, p in parameters.items():
        value = optimizer.state.get(p, {}).get(key, p)
        plain = value.ndim < p.ndim or value.numel() == 1  # flattened, or one number that stands for all
        found[name] = (
            value if not plain else value.reshape(p.shape) if value.numel() == p.numel() else value.expand(p.shape)
        )
    return found


def _changed(rule: Rule | Layout, edit: TensorEdit, state: Mapping[str, Any], key: str, value: Tensor) -> Tensor:
    if isinstance(rule, tuple):
        return _statistic(rule, edit, state, key, value)
    if rule == "first":
        return merge_like(edit, value)
    if rule == "row":
        return _factor(edit, value, state.get("col_var"), last=-1, other=-2)
    if rule == "column":
        return _factor(edit, value, state.get("row_var"), last=-2, other=-1)
    return slice_like(edit, unscaled(edit, value, 2) if rule == "square" else value)


def _statistic(layout: Layout, edit: TensorEdit, state: Mapping[str, Any], key: str, value: Tensor) -> Tensor:
    """Slice a statistic along the dims that it has; a factor of a pair as torch's Adafactor's are."""
    other = key.replace("row", "col") if "row" in key else key.replace("col", "row")
    partner = state.get(other) if other != key else None
    kept = [dim for dim in layout if dim is not None]
    if isinstance(partner, Tensor) and len(kept) == len(layout) and len(layout) > 0:
        ndim = len(layout) + 1
        gone = next(dim for dim in range(ndim) if dim not in kept)
        theirs = {ndim - 1: ndim - 2, ndim - 2: ndim - 1}.get(gone)  # the dim that the partner is taken over
        if theirs is not None and partner.ndim == value.ndim:
            wide = _factor(
                edit, value.unsqueeze(gone), partner.unsqueeze(theirs), last=gone - ndim, other=theirs - ndim
            )
            return wide.squeeze(gone)
    keep = {at: edit.keep[dim] for at, dim in enumerate(layout) if dim is not None and dim in edit.keep}
    return slice_like(TensorEdit(tensor=edit.tensor, keep=keep), value)


def _factor(edit: TensorEdit, factor: Tensor, partner: Tensor | None, *, last: int, other: int) -> Tensor:
    """Slice one of Adafactor's factors so that the survivors' second moments stay what they were.

    V_ij = r_i c_j / mean(r) with r_i = mean_j V_ij and c_j = mean_i V_ij. Over the kept columns the mean of V is
    r'_i = r_i mean(c[kept]) / mean(c), and likewise c'; then r'_i c'_j / mean(r') = V_ij.
    """
    ndim = factor.ndim
    averaged = edit.keep.get(ndim + last)
    partner = None if partner is None else full_tensor(partner)
    own = {dim: keep for dim, keep in edit.keep.items() if dim != ndim + last}
    value = factor.detach()
    if averaged is not None and partner is not None:
        kept_mean = partner.index_select(ndim + last, averaged.to(partner.device)).double().mean(last, keepdim=True)
        mean = partner.double().mean(last, keepdim=True)
        ratio = torch.where(mean > 0, kept_mean / mean, torch.ones_like(mean))
        value = (value.double() * ratio).to(factor.dtype)
    return slice_like(TensorEdit(tensor=edit.tensor, keep=own), value)
