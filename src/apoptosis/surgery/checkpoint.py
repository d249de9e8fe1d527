"""Checkpoints of shrunk networks: saved by name with their widths, loaded into a freshly built full-width model.

Lives here: what a checkpoint holds, the checks before anything is loaded, and the loading. Does not live here: the
file (container.py), nested values (tree.py), and the optimizers' part (optimizer_state.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from apoptosis.errors import CheckpointError, ShapeError
from apoptosis.norms import is_shrunk
from apoptosis.surgery.attention import ShrunkMultiheadAttention, shrunk_attributes
from apoptosis.surgery.attributes import attributes_of
from apoptosis.surgery.container import read_file, write_file
from apoptosis.surgery.journal import Journal
from apoptosis.surgery.norms import shrunk_norm
from apoptosis.surgery.optimizer_state import LoadedOptimizer, pack_optimizer, unpack_optimizer
from apoptosis.surgery.splits import VOCABULARY
from apoptosis.surgery.tree import pack, unpack
from apoptosis.surgery.values import memory_format
from apoptosis.unwrap import bare, parallel_in, rebuild

_PREFIX = "model."


class Resumable(Protocol):
    """What takes part in a checkpoint beside model and optimizer: `Apoptosis`."""

    def state_dict(self) -> dict[str, Any]:
        """Nested plain values and tensors."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them over, or raise and change nothing."""


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    apo: Resumable | None = None,
    **extra: object,
) -> None:
    """Save a (shrunk) network, its optimizer and apoptosis state to one safetensors file, atomically.

    Args:
        path: the file; an old one is replaced only when the new one is complete.
        model: parameters and buffers are saved by name, with the attributes that follow their widths. Of a compiled or
            data-parallel model the module inside is saved.
        optimizer: one or several; state is saved by parameter name.
        apo: the `Apoptosis` of the run.
        extra: anything made of tensors, numbers, strings, None, lists, tuples and dictionaries: epoch, scheduler, RNG.

    Raises: CheckpointError: the file cannot be written, or a value is of another type. An old file is as it was.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/net.safetensors", net, epoch=3)
        ...     wide = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        ...     load(f"{folder}/net.safetensors", wide)
        {'epoch': 3}
        >>> wide[0].out_features
        3
    """
    model = bare(model)
    tensors: dict[str, Tensor] = {}
    names: list[str] = []
    for name, tensor in _tensors_of(model).items():
        names.append(name)
        pack(tensor, f"{_PREFIX}{name}", tensors)
    attributes = {name: attributes_of(module) for name, module in model.named_modules()}
    manifest = {
        "model": {
            "names": names,
            "optional": sorted(_non_persistent(model)),
            "attributes": pack({name: found for name, found in attributes.items() if found}, "attributes", tensors),
            "states": {
                name: pack(module.get_extra_state(), f"extra_state.{name}", tensors)
                for name, module in _with_extra_state(model).items()
            },
            "full": {name: list(shape) for name, shape in getattr(apo, "full_shapes", {}).items()},
        },
        "optimizers": None
        if optimizer is None
        else [pack_optimizer(o, model, f"optimizer.{i}", tensors) for i, o in enumerate(_several(optimizer))],
        "apoptosis": None if apo is None else {"state": pack(apo.state_dict(), "apoptosis", tensors)},
        "extra": pack(extra, "extra", tensors),
    }
    write_file(path, tensors, manifest)


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    apo: Resumable | None = None,
) -> dict[str, Any]:
    """Load a checkpoint into a freshly built full-width model, which gets the stored widths first.

    Parameters keep their identity, so an optimizer made before stays valid. Values take the model's dtype and device.
    A model that already has the stored widths is loaded as well.

    Args:
        path: a file that `save` wrote.
        model: the network as the user's code builds it.
        optimizer: one or several, of the classes and groups that were saved; None leaves their part unread.
        apo: the `Apoptosis` of the run that goes on; None leaves its part unread.

    Returns: the extras that were saved; tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, foreign, newer, of another network, or lacks what was asked for.
            Model and optimizer are as before the call.
    """
    manifest, tensors = read_file(path)
    wrappers, model = parallel_in(model), bare(model)
    try:
        stored = manifest["model"]
        values = _check_tensors(model, stored, tensors)
        attributes = _check_attributes(model, unpack(stored["attributes"], tensors))
        states = _check_states(model, unpack(stored["states"], tensors))
        loaded = _check_optimizers(manifest["optimizers"], optimizer, model, tensors)
        if apo is not None and manifest["apoptosis"] is None:
            raise CheckpointError("it holds no apoptosis state; it was saved without apo=.")
        extra: dict[str, Any] = unpack(manifest["extra"], tensors)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint '{path}' cannot be loaded: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise CheckpointError(f"checkpoint '{path}' is damaged: its manifest lacks or misstates {error}.") from error
    journal = Journal()
    reshaped = any(tensor.shape != value.shape for tensor, value in values)
    try:
        for tensor, value in values:
            journal.set_tensor(tensor, value)  # gradients belong to the old values and go
        for module, name, attribute in attributes:
            journal.set_attribute(module, name, attribute)
        for part in loaded:
            part.write(journal)
        for owner, state in states:
            journal.call(owner.set_extra_state, owner.get_extra_state(), state)
        torch.clear_autocast_cache()
        if apo is not None:
            apo.load_state_dict(unpack(manifest["apoptosis"]["state"], tensors))
        for wrapper in wrappers if reshaped else ():
            rebuild(wrapper)
    except BaseException:
        journal.undo()
        raise
    return extra


def _several(optimizer: Optimizer | Sequence[Optimizer]) -> tuple[Optimizer, ...]:
    return (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, non-persistent ones too (they may have lost channels); tied ones by their first name."""
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            raise CheckpointError(f"'{name}' has no shape yet: run the model once before.")
    return tensors


def _non_persistent(model: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }


def _with_extra_state(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that keep more than tensors, by the protocol of `nn.Module.get_extra_state`."""
    default = nn.Module.get_extra_state
    found = {name: m for name, m in model.named_modules() if type(m).get_extra_state is not default}
    return {name: m for name, m in found.items() if not is_shrunk(m)}  # whose statistics are among the attributes


def _check_states(model: nn.Module, stored: Mapping[str, Any]) -> list[tuple[nn.Module, Any]]:
    mine = _with_extra_state(model)
    if set(mine) != set(stored):
        raise CheckpointError(f"it is of another network: extra state of {sorted(stored)} there, {sorted(mine)} here.")
    return [(mine[name], state) for name, state in stored.items()]


def _check_tensors(
    model: nn.Module, stored: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of (the model's tensor, its new value), or an error that says how the networks differ."""
    mine = _tensors_of(model)
    optional = set(stored["optional"]) | _non_persistent(model)
    missing = [name for name in stored["names"] if name not in mine and name not in optional]
    unknown = [name for name in mine if name not in set(stored["names"]) and name not in optional]
    if missing or unknown:
        have = f"it has '{missing[0]}', this model has not" if missing else f"this model has '{unknown[0]}', it has not"
        raise CheckpointError(f"it is of another network: {have} ({len(missing) + len(unknown)} names differ).")
    pairs = []
    for name in stored["names"]:
        value = tensors[f"{_PREFIX}{name}"]
        if name not in mine or (name in optional and not _fits(model, name, value, mine[name])):
            continue
        tensor = mine[name]
        if not _fits(model, name, value, tensor):
            raise CheckpointError(
                f"it is of another network: '{name}' has shape {tuple(value.shape)} there and {tuple(tensor.shape)} in "
                "this model, whose widths must be those before any removal."
            )
        full = stored["full"].get(name)
        if full is not None and list(tensor.shape) not in (full, list(value.shape)):
            raise CheckpointError(
                f"it is of another network: '{name}' was built with shape {tuple(full)}, here {tuple(tensor.shape)}."
            )
        fresh = torch.empty(
            value.shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format(tensor)
        ).copy_(value)
        pairs.append((tensor, fresh))
    return pairs


def _fits(model: nn.Module, name: str, value: Tensor, tensor: Tensor) -> bool:
    """Whether the stored value can be the model's tensor after removals: no dim is larger, and kernels are the same."""
    if value.ndim != tensor.ndim or value.is_complex() != tensor.is_complex():
        return False
    owner, _, leaf = name.rpartition(".")
    kernel = leaf == "weight" and isinstance(model.get_submodule(owner), _ConvNd)
    shrinkable = range(2 if kernel else tensor.ndim)
    return all(
        new == old or (0 < new < old and dim in shrinkable)
        for dim, (new, old) in enumerate(zip(value.shape, tensor.shape, strict=True))
    )


def _check_attributes(model: nn.Module, stored: Mapping[str, Mapping[str, Any]]) -> list[tuple[nn.Module, str, Any]]:
    modules = dict(model.named_modules())
    changes = []
    for name, attributes in stored.items():
        module = modules.get(name)
        own = {} if module is None else attributes_of(module)
        if module is not None and "__class__" in attributes:
            changes += _exchanged_class(name, module, attributes)
            continue
        for attribute, value in attributes.items():
            if module is not None and attribute in VOCABULARY and attribute not in own:
                continue  # set by a forward pass, which has not run here
            if module is None or attribute not in own or type(own[attribute]) is not type(value):
                raise CheckpointError(f"it is of another network: module '{name}' has no attribute '{attribute}' here.")
            if value != own[attribute]:
                changes.append((module, attribute, value))
    return changes


def _exchanged_class(name: str, module: nn.Module, stored: Mapping[str, Any]) -> list[tuple[nn.Module, str, Any]]:
    """Say what makes a stock nn.MultiheadAttention, nn.LayerNorm or nn.RMSNorm the narrowed one that was saved.

    A checkpoint names a class, but never chooses one: only these are restored, each in the place of its own.
    """
    try:
        norm = shrunk_norm(module, stored)
    except ShapeError as error:
        raise CheckpointError(f"module '{name}': {error}") from error
    if norm is not None:
        return [(module, key, value) for key, value in norm.items()]
    if stored["__class__"] != ShrunkMultiheadAttention.__name__ or not isinstance(module, nn.MultiheadAttention):
        there = str(stored["__class__"])[:80]
        raise CheckpointError(f"it is of another network: '{name}' is {there} there and {type(module).__name__} here.")
    try:
        known = shrunk_attributes(module)
    except ShapeError as error:
        raise CheckpointError(f"it is of another network: module '{name}': {error}") from error
    odd = [key for key, value in stored.items() if key != "__class__" and type(known.get(key)) is not type(value)]
    if odd or len(stored) < len(known):
        raise CheckpointError(f"the attributes of module '{name}' are damaged.")
    return [(module, key, known[key] if key == "__class__" else value) for key, value in stored.items()]


def _check_optimizers(
    stored: Sequence[Mapping[str, Any]] | None,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
) -> list[LoadedOptimizer]:
    if optimizer is None:
        return []
    mine = _several(optimizer)
    if stored is None:
        raise CheckpointError("it holds no optimizer state; it was saved without optimizer=.")
    if len(stored) != len(mine):
        raise CheckpointError(f"it holds {len(stored)} optimizers, {len(mine)} were given.")
    return [unpack_optimizer(entry, o, model, tensors) for entry, o in zip(stored, mine, strict=True)]
