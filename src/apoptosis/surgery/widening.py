"""A shrunk model gets the widths that it was built with again, before it takes over an earlier checkpoint.

Holds: putting emptied branches together again, and giving tensors, numbers and classes back what they were. Elsewhere:
what a model was built with (model.built), what is loaded then (checkpoint). Every Parameter keeps its identity.

Numbers in channels that come back are zeros: they mean nothing until values are loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apoptosis.distributed.sharded import has_shards
from apoptosis.errors import ArgumentError
from apoptosis.model.built import built_numbers, built_ties, built_values, seen_shapes, take_place
from apoptosis.modules.attention import ShrunkMultiheadAttention
from apoptosis.modules.emptied import MARK, OUTLINE, Outline, empty_copy_of, filled, stand_in_of
from apoptosis.modules.norms import is_shrunk
from apoptosis.surgery.attributes import attributes_of
from apoptosis.surgery.averaged_models import named_tensors
from apoptosis.surgery.branches import known_order, release
from apoptosis.surgery.nested_optimizers import layers
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
    return bool(stand_ins) or seen_shapes(model, now) != now


def widen(log: UndoLog, model: nn.Module, optimizers: Sequence[Optimizer] = (), orders: Orders = ()) -> None:
    """Give a model the widths that it was built with.

    Args:
        log: written through.
        model: without its wrappers, see `may_widen`.
        optimizers: of it; those of their states whose parameters change are dropped.
        orders: of the optimizers as they have to be; without them parameters go back to the places that they had in
            this process.

    Raises: ArgumentError: which group of an optimizer a parameter belongs to cannot be told.
    """
    before = dict(model.named_parameters())
    _restore_branches(log, model, {id(p) for p in before.values()})
    _hand_over(log, model, before, optimizers, orders)
    tensors = named_tensors(model)
    built = seen_shapes(model, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
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
    layout, dtype, device = memory_format(tensor), tensor.dtype, tensor.device
    new = torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=layout).zero_()
    part = tuple(slice(min(a, b)) for a, b in zip(tensor.shape, shape, strict=True))
    new[part] = tensor.detach()[part]
    return new


def drop_state(log: UndoLog, tensor: Tensor, optimizers: Sequence[Optimizer]) -> None:
    """Take what optimizers know of a parameter out of them: it is of another shape."""
    for optimizer in optimizers:
        for each in (optimizer, *layers(optimizer)):
            if tensor in each.state:
                log.replace_items(each.state, {p: s for p, s in each.state.items() if p is not tensor})


# ---------------------------------------------------------------------- branches


class _Making:
    """What all branches that are put together again share. options: dtype and device now, by dtype in an outline."""

    def __init__(self, model: nn.Module) -> None:
        tensors = named_tensors(model)
        self.device = next((t.device for t in tensors.values()), torch.device("cpu"))
        self.dtypes: dict[torch.dtype, torch.dtype] = {}
        self.modules: list[nn.Module] = []
        for module in model.modules():
            if isinstance(outline := vars(module).get(OUTLINE), Outline):
                self._compare(module, outline)

    def _compare(self, module: nn.Module, outline: Outline) -> None:
        """See by the tensors that are left what a model has been converted to since."""
        then = {**outline.buffers, **outline.parameters}
        stand_in = next((t for t in outline.parameters.values() if t is not None), None)
        for name, own in (*module._parameters.items(), *module._buffers.items()):
            old = then.get(name) if then.get(name) is not None else stand_in
            if own is not None and old is not None and own.is_floating_point():
                self.dtypes.setdefault(old.dtype, own.dtype)
        for name, inner in outline.children.items():
            child = module._modules.get(name)
            if child is not None and inner is not None:
                self._compare(child, inner)

    def tensor(self, own: Tensor | None, outlined: Tensor | None) -> Any:
        """Return the tensor that is there, or zeros in its place."""
        if outlined is None or own is not None:
            return None if outlined is None else own
        dtype = self.dtypes.get(outlined.dtype, outlined.dtype)
        if not outlined.is_meta:
            return outlined.to(self.device, dtype)
        zeros = torch.zeros_like(outlined, device=self.device, dtype=dtype)
        return nn.Parameter(zeros, outlined.requires_grad) if isinstance(outlined, nn.Parameter) else zeros


def _restore_branches(log: UndoLog, model: nn.Module, before: set[int]) -> None:
    """Put emptied modules together again, outer ones first: they may hold others."""
    making, found = _Making(model), [model]
    while found:
        found = [m for m in model.modules() if isinstance(vars(m).get(OUTLINE), Outline)][:1]
        for module in found:
            _restore(log, module, vars(module)[OUTLINE], making)
    _tie(log, model, before, making.modules)
    take_place(model, making.modules)
    for module in model.modules():
        for name, value in filled(module).items():
            log.set_attribute(module, name, value)


def _restore(log: UndoLog, module: nn.Module, outline: Outline, making: _Making) -> None:
    """Give a module back what its outline has, with the tensors that it still holds."""
    for name in [key for key in vars(module) if key in (MARK, OUTLINE) or key.startswith("stand_in_")]:
        log.remove_attribute(module, name)
    for name, value in outline.others.items():
        log.set_attribute(module, name, value)
    if type(module) is not type(outline.shell):
        log.set_attribute(module, "__class__", type(outline.shell))
    log.replace_items(
        module._parameters, {n: making.tensor(module._parameters.get(n), p) for n, p in outline.parameters.items()}
    )
    log.replace_items(
        module._buffers, {n: making.tensor(module._buffers.get(n), b) for n, b in outline.buffers.items()}
    )
    children: dict[str, nn.Module | None] = {}
    for name, inner in outline.children.items():
        child = module._modules.get(name)
        if inner is not None:
            if child is None:
                child = empty_copy_of(inner.shell)
                same = inner.shell.training == outline.shell.training
                child.training = module.training if same else inner.shell.training
                making.modules.append(child)
            _restore(log, child, inner, making)
        children[name] = child
    log.replace_items(module._modules, children)


def _tie(log: UndoLog, model: nn.Module, before: set[int], made: Sequence[nn.Module]) -> None:
    """Make one again what was one module, or one parameter, under several names."""
    new = {id(module) for module in made}
    for names in built_ties(model):
        modules = dict(model.named_modules(remove_duplicate=False))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        store: dict[str, Any] = modules if names[0] in modules else parameters
        here = [name for name in names if name in store]
        old = [n for n in here if (id(store[n]) not in new if store is modules else id(store[n]) in before)]
        one = store[(old or here)[0]] if here else None
        for name in here:
            if store[name] is not one and name not in old:
                path, _, leaf = name.rpartition(".")
                holder = modules[path]
                held: dict[str, Any] = holder._modules if store is modules else holder._parameters
                log.replace_items(held, {**held, leaf: one})


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
        order = orders[number] if number < len(orders) else known_order(optimizer, model) or None
        made = _members(optimizer, {id(p): name for name, p in before.items()}, new, order)
        places = {id(after[name]): i for i, name in enumerate(chain.from_iterable(order or ())) if name in after}
        _fill_empty(log, optimizer, [(group, p) for group, old, p in made if old is None])
        behind = [(old, p) for _, old, p in made if old is not None]
        release(log, optimizer, gone, behind, order=places if order is not None else None)


def _fill_empty(log: UndoLog, optimizer: Optimizer, made: Sequence[tuple[int, nn.Parameter]]) -> None:
    """Put parameters into groups of which nothing was left."""
    groups = [each.param_groups for each in (optimizer, *layers(optimizer))]
    for number, p in made:
        lists = {id(found[number]["params"]): found[number] for found in groups if number < len(found)}
        for group in lists.values():
            members = group["params"]
            log.call(partial(members.__setitem__, slice(None)), list(members), [*members, p])


def _members(
    optimizer: Optimizer, names: Mapping[int, str], new: Mapping[str, Tensor], order: Sequence[Sequence[str]] | None
) -> list[tuple[int, Tensor | None, nn.Parameter]]:
    """Return each parameter that joins a group: the group's number, one that is in it (None: it is empty), and itself.

    Raises: ArgumentError: several groups could take it.
    """
    groups = [[p for p in group["params"] if id(p) in names] for group in optimizer.param_groups]
    kinds = [{_kind(names[id(q)], q) for q in members} for members in groups]
    apart = sum(map(len, kinds)) == len(set().union(*kinds))  # as weights and biases are, where groups are made by kind
    found: list[tuple[int, Tensor | None, nn.Parameter]] = []
    for name, p in new.items():
        if not isinstance(p, nn.Parameter):
            continue
        if order is not None:
            holders = [i for i, known in enumerate(order) if name in known and i < len(groups)]
            if not holders:
                continue  # of another optimizer, or frozen
        elif len(groups) == 1:
            holders = [0] if groups[0] else []
        else:
            holders = [i for i, own in enumerate(kinds) if apart and _kind(name, p) in own]
        if len(holders) != 1:
            raise ArgumentError(
                f"'{name}' comes back, and which of the {len(groups)} groups of {type(optimizer).__name__} it belongs "
                "to cannot be told. Leave the optimizer out, and make it anew afterwards."
            )
        found.append((holders[0], next(iter(groups[holders[0]]), None), p))
    return found


def _kind(name: str, p: Tensor) -> tuple[str, int, bool]:
    """Say what groups of an optimizer are made by: the last name, the number of dims, and whether it is trained."""
    return name.rpartition(".")[2], p.ndim, p.requires_grad


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
