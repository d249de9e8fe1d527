"""Emptying residual branches in place: the constant, the stand-ins, and what goes from optimizers and averaged copies.

Holds: what an event does for one branch, written through a log that can undo it. Elsewhere: which branches there are
(graph), the classes of the stand-ins (modules.emptied), the transaction (transaction.py), trying it (branch_trials.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apoptosis.errors import ArgumentError
from apoptosis.modules.emptied import OUTLINE, attributes_of_stand_in, class_of, held_of, outline_of
from apoptosis.records import Branch, LinearSite, OffsetFold, Reduction, StandIn, Structure
from apoptosis.surgery.averaged_models import Tensors, copy_of, named_tensors
from apoptosis.surgery.builder import unique_columns
from apoptosis.surgery.nested_optimizers import layers
from apoptosis.surgery.undo_log import UndoLog
from apoptosis.surgery.values import offset_delta

_ORDERS: WeakKeyDictionary[Optimizer, WeakKeyDictionary[nn.Module, list[list[str]]]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmptyEdit:
    """What an event does to one branch. weight: of its layer. dim: contracted axis. offsets: means that are kept."""

    branch: Branch
    weight: str
    dim: int
    offsets: tuple[OffsetFold, ...] = ()


def is_empty(reduction: Reduction) -> bool:
    """Whether a reduction keeps nothing, so that it empties a branch."""
    return reduction.keep.numel() == 0


def empty_edits(structure: Structure, reductions: Iterable[Reduction]) -> tuple[EmptyEdit, ...]:
    """Return the edit of every branch that reductions empty, those that keep nothing.

    Raises: ArgumentError: a group has no branch, one that its layer reads is missing, or a group of a branch has
        another reduction.
    """
    groups = {group.name: group for group in structure.groups}
    every = list(reductions)
    found: dict[str, Branch] = {}
    offsets: dict[str, list[OffsetFold]] = {}
    sites: dict[str, LinearSite] = {}
    for reduction in filter(is_empty, every):
        group = groups.get(reduction.group)
        branch = None if group is None else group.branch
        if group is None or branch is None or reduction.group not in branch.read:
            why = "" if group is None or not group.unbranched else f": {group.unbranched}"
            raise ArgumentError(f"group '{reduction.group}' cannot lose all its channels{why}.")
        site = next(s for s in group.sites if isinstance(s, LinearSite) and s.key == branch.site)
        found[branch.name], sites[branch.name] = branch, site
        own = reduction.sites[branch.site]
        if own.offset is not None:
            columns = unique_columns(site.columns)
            fold = OffsetFold(weight=site.weight, dim=site.dim, columns=columns, offset=own.offset)
            offsets.setdefault(branch.name, []).append(fold)
    for branch in found.values():
        _check_whole(branch, every)
    return tuple(
        EmptyEdit(branch=branch, weight=sites[name].weight, dim=sites[name].dim, offsets=tuple(offsets.get(name, ())))
        for name, branch in found.items()
    )


def _check_whole(branch: Branch, reductions: Sequence[Reduction]) -> None:
    emptied = {reduction.group for reduction in reductions if is_empty(reduction)}
    missing = [name for name in branch.read if name not in emptied]
    if missing:
        raise ArgumentError(f"branch '{branch.name}' is emptied with all of its groups: '{missing[0]}' is missing.")
    other = [r.group for r in reductions if not is_empty(r) and r.group in branch.groups]
    if other:
        raise ArgumentError(f"group '{other[0]}' goes with branch '{branch.name}', and has a reduction of its own.")


# ---------------------------------------------------------------------- one model


def empty_branch(
    log: UndoLog, model: nn.Module, edit: EmptyEdit, others: Mapping[str, Tensor] | None = None
) -> nn.Parameter | None:
    """Replace a branch of one model, or averaged copy, by its constant.

    Args:
        log: written through.
        model: that has the branch.
        edit: of the branch.
        others: tensors by name that the model itself lacks.

    Returns: the parameter that was made for the constant, None where there was one.

    Raises: ShapeError: a module's forward pass was replaced.
    """
    branch, named = edit.branch, {**(others or {}), **named_tensors(model)}
    value = constant_of(edit, named)
    holder = model.get_submodule(branch.bias.rpartition(".")[0])
    made = _set_bias(log, holder, value, named[edit.weight])
    exchange_all(log, model, branch.stand_ins, () if made is None else (made,))
    return made


def exchange_all(
    log: UndoLog, model: nn.Module, stand_ins: Sequence[StandIn], made: Sequence[nn.Parameter] = ()
) -> None:
    """Give modules their stand-ins.

    Args: made: parameters that they have got for the constants, and had not before.

    Raises: ShapeError: a module's forward pass was replaced.
    """
    modules = [model.get_submodule(stand_in.module) for stand_in in stand_ins]  # before any is taken apart
    classes = [class_of(stand_in, module) for stand_in, module in zip(stand_ins, modules, strict=True)]
    for stand_in, module, cls in zip(stand_ins, modules, classes, strict=True):
        _exchange(log, module, stand_in, cls, made)


def made_biases(log: UndoLog, model: nn.Module, stand_ins: Sequence[StandIn]) -> list[tuple[Tensor, nn.Parameter]]:
    """Make the biases that modules lack which hold constants; return each behind the weight that it stands for."""
    found: list[tuple[Tensor, nn.Parameter]] = []
    for stand_in in stand_ins:
        holder = model.get_submodule(stand_in.module)
        weight = holder._parameters.get("weight")
        if stand_in.kind == "constant" and weight is not None and holder._parameters.get("bias") is None:
            rows = 1 if type(holder).__qualname__ == "Conv1D" else 0
            made = _set_bias(log, holder, weight.detach().new_zeros(weight.shape[rows]), weight)
            found += [] if made is None else [(weight, made)]
    return found


def constant_of(edit: EmptyEdit, named: Mapping[str, Tensor]) -> Tensor:
    """Return what the branch's last module returns once its layer reads the means of its channels and nothing else."""
    branch, weight = edit.branch, named[edit.weight].detach()
    bias = named.get(f"{edit.weight.rpartition('.')[0]}.bias")
    num_outputs = weight.shape[1 - edit.dim]
    wide = torch.zeros(num_outputs, dtype=torch.float64, device=weight.device)
    if bias is not None:
        wide += bias.detach().double()
    for fold in edit.offsets:
        wide += offset_delta(fold, weight, num_outputs)
    if branch.norm is None:
        return wide.to(weight.dtype)
    mean, variance, gain, shift = (
        named[f"{branch.norm}.{leaf}"].detach().double() for leaf in ("running_mean", "running_var", "weight", "bias")
    )
    return (shift + gain * (wide - mean) / (variance + branch.norm_eps).sqrt()).to(named[f"{branch.norm}.bias"].dtype)


def _set_bias(log: UndoLog, holder: nn.Module, value: Tensor, weight: Tensor) -> nn.Parameter | None:
    """Give the module that holds the constant its value; return the parameter if it is a new one."""
    old: Any = holder._parameters.get("bias", holder._buffers.get("bias"))
    if old is not None:
        log.set_tensor(old, value, old.grad if old.is_leaf else None)
        return None
    if "bias" in holder._buffers or not isinstance(weight, nn.Parameter):
        log.replace_items(holder._buffers, {**holder._buffers, "bias": value})
        return None
    made = nn.Parameter(value, requires_grad=weight.requires_grad)
    log.replace_items(holder._parameters, {**holder._parameters, "bias": made})
    return made


def _exchange(
    log: UndoLog, module: nn.Module, stand_in: StandIn, cls: type[nn.Module] | None, made: Sequence[nn.Parameter]
) -> None:
    changed = attributes_of_stand_in(stand_in, module)
    log.set_attribute(module, OUTLINE, outline_of(module, changed, made))
    if cls is not None:
        paths = [stand_in.holder, *stand_in.after] if stand_in.kind == "branch" else []
        for name, value in held_of(module).items():  # or what goes would stay in memory
            log.set_attribute(module, name, value)
        _strip(log, module, paths, bias=stand_in.kind == "constant")
    for name, value in changed.items():
        log.set_attribute(module, name, value)
    if cls is not None:
        log.set_attribute(module, "__class__", cls)


def _strip(log: UndoLog, module: nn.Module, paths: Sequence[str], *, bias: bool) -> None:
    """Take everything out of a module but its bias, and the modules inside that these paths lead to.

    Names of its own tensors stay, without a tensor: a module around it may ask whether there is one.
    """
    kept = {path.split(".")[0] for path in paths if path}
    for store in (module._parameters, module._buffers):
        own: MutableMapping[str, Any] = {n: t if bias and n == "bias" else None for n, t in store.items()}
        log.replace_items(store, own)
    for name in kept:
        inner = module._modules[name]
        further = [path.partition(".")[2] for path in paths if path.split(".")[0] == name]
        if inner is not None and any(further):
            _strip(log, inner, [path for path in further if path], bias=False)
    log.replace_items(module._modules, {name: inner for name, inner in module._modules.items() if name in kept})


# ---------------------------------------------------------------------- what follows


def empty_copy(log: UndoLog, averaged: nn.Module, model: nn.Module, edit: EmptyEdit) -> None:
    """Replace a branch of an averaged copy by the constant of its own values."""
    if not isinstance(averaged, Tensors):
        empty_branch(log, copy_of(averaged), edit, named_tensors(model))
        return
    named = averaged.named()
    value = constant_of(edit, {**named_tensors(model), **named})
    bias, gone = edit.branch.bias, frozenset(edit.branch.removed)
    if bias in named:
        log.set_tensor(named[bias], value)
    averaged.keep_(partial(_kept_of, log), gone, {} if bias in named else {bias: value})


def _kept_of(log: UndoLog, holder: Any, contents: Any) -> None:
    if isinstance(holder, MutableMapping):
        log.replace_items(holder, contents)
    else:
        log.call(partial(_fill, holder), list(holder), contents)


def _fill(target: list[Any], contents: Sequence[Any]) -> None:
    target[:] = contents


def release(
    log: UndoLog,
    optimizer: Optimizer,
    gone: Sequence[Tensor],
    made: Sequence[tuple[Tensor, nn.Parameter]],
    *,
    order: Mapping[int, int] | None = None,
) -> None:
    """Take parameters out of an optimizer, with all that it wraps, and hand it new ones.

    Args:
        log: written through.
        optimizer: that may hold them.
        gone: the parameters that go, with their state.
        made: (a parameter that goes, the new one that joins its group) each.
        order: by id of a parameter, its place, by which those of a group that have one are sorted.
    """
    away = {id(p) for p in gone}
    lists: dict[int, list[Any]] = {}
    for each in (optimizer, *layers(optimizer)):
        for group in each.param_groups:
            lists[id(group["params"])] = group["params"]
        if any(id(p) in away for p in each.state):
            log.replace_items(each.state, {p: state for p, state in each.state.items() if id(p) not in away})
    for members in lists.values():
        held = {id(p) for p in members}
        new = []
        for p in members:  # what is made takes the place of what goes: optimizers' state_dicts go by places
            new += ([] if id(p) in away else [p]) + [q for old, q in made if old is p and id(q) not in held]
        if order is not None:
            known = iter(sorted((p for p in new if id(p) in order), key=lambda p: order[id(p)]))
            new = [next(known) if id(p) in order else p for p in new]
        if len(new) != len(members) or any(a is not b for a, b in zip(new, members, strict=True)):
            log.call(partial(_fill, members), list(members), new)


def note_order(optimizer: Optimizer, model: nn.Module) -> None:
    """Note the names of the model's parameters in an optimizer's groups; those that went before keep their places."""
    names = {id(p): name for name, p in model.named_parameters()}
    now = [[names[id(p)] for p in group["params"] if id(p) in names] for group in optimizer.param_groups]
    here = {name for group in now for name in group}
    for i, (old, new) in enumerate(zip(known_order(optimizer, model), now, strict=False)):
        own, last, behind = set(new), "", dict[str, list[str]]()
        for name in old:
            if name in own:
                last = name
            elif name not in here:
                behind.setdefault(last, []).append(name)
        now[i] = [name for other in ("", *new) for name in (other, *behind.get(other, ())) if name]
    _ORDERS.setdefault(optimizer, WeakKeyDictionary())[model] = now


def known_order(optimizer: Optimizer, model: nn.Module) -> list[list[str]]:
    """Return the names of the parameters in every group, those included that went with branches; [] if unknown."""
    known = _ORDERS.get(optimizer)
    return [] if known is None else known.get(model, [])
