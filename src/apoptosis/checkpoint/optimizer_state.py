"""The optimizers' part of a checkpoint: hyperparameters per group and state per parameter, by name.

Holds: what is saved of one optimizer and how it is checked and taken up again. Elsewhere: how state
follows an edit (surgery.optimizers), and the checkpoint as a whole (checkpoint/save_load.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apoptosis.checkpoint.tensors import PREFIX
from apoptosis.checkpoint.tree import pack, unpack
from apoptosis.distributed.protocol import kind_of
from apoptosis.distributed.wrappers import inner_optimizer
from apoptosis.errors import CheckpointError
from apoptosis.surgery.nested_optimizers import layers
from apoptosis.surgery.optimizers import OPTIMIZERS, StateRules, rules_of
from apoptosis.surgery.undo_log import UndoLog


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedOptimizer:
    """Checked state of one optimizer, not yet written, by group and by parameter."""

    optimizer: Optimizer
    groups: list[dict[str, Any]]
    state: dict[Tensor, dict[str, Any]]

    def write(self, journal: UndoLog) -> None:
        """Write hyperparameters and state through a journal."""
        for group, stored in zip(self.optimizer.param_groups, self.groups, strict=True):
            journal.replace_items(group, {**group, **stored})
        holder = inner_optimizer(self.optimizer)
        held = {id(p) for group in holder.param_groups for p in group["params"]}
        journal.replace_items(holder.state, {p: state for p, state in self.state.items() if id(p) in held})


def pack_optimizer(optimizer: Optimizer, model: nn.Module, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Describe one optimizer, with those that it wraps, as JSON plus tensors.

    Raises: CheckpointError: a hyperparameter or state entry that a checkpoint cannot hold.
    """
    wrapped = [_pack_one(o, model, f"{name}.wrapped.{i}", tensors) for i, o in enumerate(_wrapped(optimizer))]
    return _pack_one(optimizer, model, name, tensors) | ({"wrapped": wrapped} if wrapped else {})


def _wrapped(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizers in another one that have a state of their own."""
    return [layer for layer in layers(optimizer) if layer.state is not inner_optimizer(optimizer).state]


def _pack_one(optimizer: Optimizer, model: nn.Module, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    names = _names(optimizer, model)
    by_id = {id(p): known for group in names for known, p in group}
    groups = []
    for i, (group, members) in enumerate(zip(optimizer.param_groups, names, strict=True)):
        settings = {key: value for key, value in group.items() if key != "params"}
        packed = pack(settings, f"{name}.groups.{i}", tensors)
        groups.append({"parameters": [known for known, _ in members], "settings": packed})
    state: dict[str, Any] = {}
    for p, entries in kind_of(optimizer).full_state(optimizer).items():
        if id(p) not in by_id:
            raise CheckpointError(f"cannot save {type(optimizer).__name__}: it holds state of no parameter of its own.")
        known = by_id[id(p)]
        state[known] = pack(dict(entries), f"{name}.state.{known}", tensors)
    return {"class": type(inner_optimizer(optimizer)).__qualname__, "groups": groups, "state": state}


def unpack_optimizer(
    stored: Mapping[str, Any], optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> list[LoadedOptimizer]:
    """Check one optimizer's entry against the given optimizer, and those that it wraps; writes nothing.

    Raises: CheckpointError: another class, other groups or other parameters, or others that it wraps.
    """
    wrapped, entries = _wrapped(optimizer), stored.get("wrapped", [])
    if len(wrapped) != len(entries):
        raise CheckpointError(
            f"it holds {len(entries)} optimizers wrapped in {stored['class']}, the given "
            f"{type(optimizer).__qualname__} wraps {len(wrapped)}."
        )
    pairs = zip((stored, *entries), (optimizer, *wrapped), strict=True)
    return [_unpack_one(entry, o, model, tensors) for entry, o in pairs]


def _unpack_one(
    stored: Mapping[str, Any], optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> LoadedOptimizer:
    kind = type(inner_optimizer(optimizer)).__qualname__
    if stored["class"] != kind:
        raise CheckpointError(f"it holds the state of {stored['class']}, the optimizer given is {kind}.")
    names = _names(optimizer, model)
    there = [list(group["parameters"]) for group in stored["groups"]]
    here = [[known for known, _ in group] for group in names]
    if there != here:
        sizes = [len(group) for group in there], [len(group) for group in here]
        raise CheckpointError(
            f"{kind} has other parameter groups: {sizes[0]} parameters per group there, {sizes[1]} here"
            + (", of other names or order." if sizes[0] == sizes[1] else ".")
        )
    by_name = {
        known: (p, group) for members, group in zip(names, stored["groups"], strict=True) for known, p in members
    }
    groups = [unpack(group["settings"], tensors) for group in stored["groups"]]
    for own, found in zip(optimizer.param_groups, groups, strict=True):
        _check_settings(kind, own, found, optimizer.defaults)
    settings = {id(group): found for group, found in zip(stored["groups"], groups, strict=True)}
    state: dict[Tensor, dict[str, Any]] = {}
    for known, entries in stored["state"].items():
        if known not in by_name:
            raise CheckpointError(f"it is damaged: it holds state of '{known}', which {kind} was not given.")
        p, group = by_name[known]
        _check_numbers(kind, known, entries)
        state[p] = {key: _placed(key, value, p, settings[id(group)]) for key, value in unpack(entries, tensors).items()}
    return LoadedOptimizer(optimizer=optimizer, groups=groups, state=state)


_NEVER_NEGATIVE = frozenset(("lr", "eps", "weight_decay", "momentum", "initial_lr", "max_lr", "min_lr"))


def check_state_shapes(
    stored: Mapping[str, Any], optimizer: Optimizer, model: nn.Module, shapes: Mapping[str, Sequence[int]]
) -> None:
    """Check the state of one of torch's own optimizers by its shapes, before it is read.

    Args: shapes: of the stored tensors, by their names in the checkpoint.

    Raises: CheckpointError: state that its parameter, as it is stored, cannot have.
    """
    for entry, inner in zip(stored.get("wrapped", ()), _wrapped(optimizer), strict=False):
        check_state_shapes(entry, inner, model, shapes)
    holder = inner_optimizer(optimizer)
    kind = type(holder).__qualname__
    if not type(holder).__module__.startswith("torch.optim") or stored["class"] != kind:
        return
    needed = OPTIMIZERS.get(kind, StateRules()).needed
    ranks = {known: p.ndim for group in _names(optimizer, model) for known, p in group}
    for known, entries in stored["state"].items():
        missing = [key for key in needed if entries and key not in entries]
        if missing:
            raise CheckpointError(f"it lacks '{missing[0]}' of the state that {kind} keeps of '{known}'.")
        for key, entry in entries.items():
            if not isinstance(entry, dict) or entry.get("$") != "tensor" or PREFIX + known not in shapes:
                continue
            found, own = tuple(shapes[entry["name"]]), tuple(shapes[PREFIX + known])
            rule = rules_of(holder).get(key)
            expected = own
            if rule in ("row", "column") and ranks.get(known, 0) > 1:
                expected = (*own[:-1], 1) if rule == "row" else (*own[:-2], 1, own[-1])
            if found != expected and not (len(found) <= 1 and math.prod(found) == 1):
                raise CheckpointError(f"its '{key}' of '{known}' has shape {found}, and the parameter {own}.")


def _check_settings(kind: str, own: Mapping[str, Any], stored: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check hyperparameters: those that this optimizer has are of their kind, and its numbers are there and finite."""
    for key, value in defaults.items():
        if key not in stored and key in own and isinstance(value, int | float | tuple) and not isinstance(value, bool):
            raise CheckpointError(f"it lacks the hyperparameter '{key}' of {kind}.")
    betas = stored.get("betas", ())
    if "betas" in own and isinstance(betas, tuple) and any(_is_finite(b) and not 0 <= b <= 1 for b in betas):
        raise CheckpointError(f"{kind} cannot have betas = {str(betas)[:60]}.")
    for key, value in stored.items():
        negative = isinstance(value, int | float) and value < 0 and key in _NEVER_NEGATIVE
        if key == "params" or negative or (key in own and not _is_like(value, own[key])):
            raise CheckpointError(f"{kind} cannot have {key} = {str(value)[:60]}.")


def _is_like(value: Any, own: Any) -> bool:
    """Whether a stored hyperparameter is of the kind that the optimizer's own is."""
    if isinstance(own, bool) or own is None:  # None: not set; torch then decides
        return value is None or isinstance(value, bool) or (own is None and _is_finite(value))
    if isinstance(own, int | float | torch.Tensor):
        infinite = isinstance(own, float) and not math.isfinite(own)
        return _is_finite(value) or (infinite and isinstance(value, float))
    if isinstance(own, list | tuple):
        return isinstance(value, list | tuple) and len(value) == len(own) and all(map(_is_like, value, own))
    return isinstance(value, type(own))


def _is_finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and bool(torch.isfinite(value).all())
    if isinstance(value, int) and not isinstance(value, bool):
        return -(2**63) <= value < 2**63  # what a kernel takes
    return isinstance(value, float) and math.isfinite(value)


def _check_numbers(kind: str, known: str, entries: Mapping[str, Any]) -> None:
    for key, value in entries.items():
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        if plain and not (_is_finite(value) and (key != "step" or value >= 0)):
            raise CheckpointError(f"{kind} cannot have {key} = {str(value)[:60]} for '{known}'.")


def _names(optimizer: Optimizer, model: nn.Module) -> list[list[tuple[str, Tensor]]]:
    """Per group (name, parameter); a parameter that is not the model's goes by its place."""
    known = {id(p): name for name, p in model.named_parameters()}
    return [
        [(known.get(id(p), f"@{i}.{j}"), p) for j, p in enumerate(group["params"])]
        for i, group in enumerate(optimizer.param_groups)
    ]


def _placed(key: str, value: Any, p: Tensor, settings: Mapping[str, Any]) -> Any:
    """State goes to its parameter's device, but a step count stays on the CPU unless a kernel reads it."""
    if not isinstance(value, torch.Tensor):
        return value
    if key == "step" and not (settings.get("capturable") or settings.get("fused")):
        return value
    return value.to(p.device)
