"""A shrunk model gets the widths that it was built with again, before it takes over an earlier checkpoint.

Holds: putting emptied branches together again, and giving tensors, numbers and classes back what they were. Elsewhere:
what a model was built with (model.built), what is loaded then (checkpoint). Every Parameter keeps its identity.

Numbers in channels that come back are zeros: they mean nothing until values are loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apoptosis.distributed.sharded import has_shards
from apoptosis.errors import ArgumentError
from apoptosis.model.built import built_numbers, built_shapes, built_values
from apoptosis.modules.attention import ShrunkMultiheadAttention
from apoptosis.modules.emptied import MARK, OUTLINE, Outline, stand_in_of
from apoptosis.modules.norms import is_shrunk
from apoptosis.surgery.attributes import attributes_of
from apoptosis.surgery.averaged_models import named_tensors
from apoptosis.surgery.branches import release
from apoptosis.surgery.numbers import MARK as NUMBERS
from apoptosis.surgery.undo_log import UndoLog
from apoptosis.surgery.values import memory_format

Orders = Sequence[Sequence[Sequence[str]]]
"""By optimizer and group, the names of the parameters in order."""


def may_widen(model: nn.Module) -> bool:
    """Whether a model has lost channels or branches in this process, and can have them again."""
    if has_shards(model):
        return False
    now = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    stand_ins = [module for module in model.modules() if stand_in_of(module) is not None]
    if any(not isinstance(vars(module).get(OUTLINE), Outline) for module in stand_ins):
        return False
    return bool(stand_ins) or built_shapes(model, now) != now


def widen(log: UndoLog, model: nn.Module, optimizers: Sequence[Optimizer] = (), orders: Orders = ()) -> None:
    """Give a model the widths that it was built with.

    Args:
        log: written through.
        model: without its wrappers, see `may_widen`.
        optimizers: of it; those of their states whose parameters change are dropped.
        orders: of the optimizers as they have to be; needed where parameters come back that groups could differ in.

    Raises: ArgumentError: which group of an optimizer a parameter belongs to cannot be told.
    """
    before = dict(model.named_parameters())
    _restore_branches(log, model)
    _hand_over(log, model, before, optimizers, orders)
    tensors = named_tensors(model)
    built = built_shapes(model, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    values = built_values(model)
    for name, tensor in tensors.items():
        if built[name] != tuple(tensor.shape):
            own = values.get(name)
            known = own is not None and tuple(own.shape) == built[name]
            log.set_tensor(tensor, own.to(tensor) if known and own is not None else resized(tensor, built[name]))
            drop_state(log, tensor, optimizers)
    for name, module in model.named_modules():
        _restore_numbers(log, module, built_numbers(model, name))


def resized(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the leading part of a tensor in a shape, with zeros where it has nothing.

    Example:
        >>> resized(torch.ones(2, 2), (1, 3))
        tensor([[1., 1., 0.]])
    """
    options: dict[str, Any] = {"dtype": tensor.dtype, "device": tensor.device}
    new = torch.empty(tuple(shape), memory_format=memory_format(tensor), **options).zero_()
    part = tuple(slice(min(a, b)) for a, b in zip(tensor.shape, shape, strict=True))
    new[part] = tensor.detach()[part]
    return new


def drop_state(log: UndoLog, tensor: Tensor, optimizers: Sequence[Optimizer]) -> None:
    """Take what optimizers know of a parameter out of them: it is of another shape."""
    for optimizer in optimizers:
        if tensor in optimizer.state:
            log.replace_items(optimizer.state, {p: s for p, s in optimizer.state.items() if p is not tensor})


# ---------------------------------------------------------------------- branches


def _restore_branches(log: UndoLog, model: nn.Module) -> None:
    """Put emptied modules together again, outer ones first: they may hold others."""
    while True:
        found = next((m for m in model.modules() if isinstance(vars(m).get(OUTLINE), Outline)), None)
        if found is None:
            return
        device = next((t.device for t in named_tensors(model).values()), torch.device("cpu"))
        _restore(log, found, vars(found)[OUTLINE], device, {})


def _restore(log: UndoLog, module: nn.Module, outline: Outline, device: torch.device, made: dict[int, Tensor]) -> None:
    """Give a module back what its outline has, with the tensors that it still holds."""
    for name in [key for key in vars(module) if key in (MARK, OUTLINE) or key.startswith("stand_in_")]:
        log.remove_attribute(module, name)
    for name, value in outline.others.items():
        log.set_attribute(module, name, value)
    if type(module) is not type(outline.shell):
        log.set_attribute(module, "__class__", type(outline.shell))
    parameters = {n: _kept(module._parameters.get(n), p, device, made) for n, p in outline.parameters.items()}
    buffers = {n: _kept(module._buffers.get(n), b, device, made) for n, b in outline.buffers.items()}
    log.replace_items(module._parameters, parameters)
    log.replace_items(module._buffers, buffers)
    children: dict[str, nn.Module | None] = {}
    for name, inner in outline.children.items():
        child = module._modules.get(name)
        if inner is not None:
            child = _empty_copy(inner.shell) if child is None else child
            _restore(log, child, inner, device, made)
        children[name] = child
    log.replace_items(module._modules, children)


def _kept(own: Tensor | None, outlined: Tensor | None, device: torch.device, made: dict[int, Tensor]) -> Any:
    """Return the tensor that is there, or zeros in its place; a tied one is made once."""
    if outlined is None or own is not None:
        return None if outlined is None else own
    if not outlined.is_meta:
        return outlined.to(device)
    if id(outlined) not in made:
        zeros = torch.zeros_like(outlined, device=device)
        made[id(outlined)] = nn.Parameter(zeros, outlined.requires_grad) if _is_parameter(outlined) else zeros
    return made[id(outlined)]


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _empty_copy(shell: nn.Module) -> nn.Module:
    """Return a module of its own with what a shell holds beside tensors and modules."""
    new = copy.copy(shell)
    vars(new).update(_parameters={}, _buffers={}, _modules={})
    return new


def _hand_over(
    log: UndoLog, model: nn.Module, before: Mapping[str, Tensor], optimizers: Sequence[Optimizer], orders: Orders
) -> None:
    """Take the parameters that are gone out of the optimizers, and put those that came back into their groups."""
    after = dict(model.named_parameters())
    here, there = {id(p) for p in after.values()}, {id(p) for p in before.values()}
    gone = [p for p in before.values() if id(p) not in here]
    new = {name: p for name, p in after.items() if id(p) not in there}
    if not gone and not new:
        return
    for number, optimizer in enumerate(optimizers):
        order = orders[number] if number < len(orders) else None
        made = _members(optimizer, {id(p): name for name, p in before.items()}, new, order)
        places = {id(after[name]): i for names in order or () for i, name in enumerate(names) if name in after}
        release(log, optimizer, gone, made, order=places if order is not None else None)


def _members(
    optimizer: Optimizer, names: Mapping[int, str], new: Mapping[str, Tensor], order: Sequence[Sequence[str]] | None
) -> list[tuple[Tensor, nn.Parameter]]:
    """Return each parameter that joins a group behind one that is in it.

    Raises: ArgumentError: several groups could take it.
    """
    groups = [[p for p in group["params"] if id(p) in names] for group in optimizer.param_groups]
    found: list[tuple[Tensor, nn.Parameter]] = []
    for name, p in new.items():
        if not isinstance(p, nn.Parameter):
            continue
        if order is not None:
            holders = [members for members, known in zip(groups, order, strict=False) if name in known and members]
            if not holders:
                continue  # of another optimizer, or frozen
        else:
            holders = [members for members in groups if members]
            kin = [m for m in holders if any(_alike(names[id(q)], q, name, p) for q in m)]
            holders = holders if len(holders) == 1 else kin
        if len(holders) != 1:
            raise ArgumentError(
                f"'{name}' comes back, and which of the {len(groups)} groups of {type(optimizer).__name__} it belongs "
                "to cannot be told. Leave the optimizer out, and make it anew afterwards."
            )
        found.append((holders[0][0], p))
    return found


def _alike(name: str, p: Tensor, other: str, q: Tensor) -> bool:
    """Whether two parameters are of one kind: the same last name, number of dims and training."""
    same = name.rpartition(".")[2] == other.rpartition(".")[2]
    return same and p.ndim == q.ndim and p.requires_grad == q.requires_grad


# ---------------------------------------------------------------------- numbers


def _restore_numbers(log: UndoLog, module: nn.Module, built: Mapping[str, Any]) -> None:
    """Give a module back the class and the numbers that events have changed."""
    if not built:
        return
    now = attributes_of(module)
    for name in now:
        if name in built and name != "__class__" and built[name] != vars(module).get(name):
            log.set_attribute(module, name, copy.copy(built[name]))
    if NUMBERS in vars(module):
        log.remove_attribute(module, NUMBERS)
    if is_shrunk(module) or type(module) is ShrunkMultiheadAttention:
        for name in now:
            if name not in built and name != "__class__":
                log.remove_attribute(module, name)
        log.set_attribute(module, "__class__", built["__class__"])
