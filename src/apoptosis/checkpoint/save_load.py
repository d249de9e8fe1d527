"""Checkpoints of shrunk networks: saved by name with their widths, loaded into a freshly built full-width model.

Holds: what a checkpoint holds, the checks before anything is loaded, and the loading. Elsewhere: the
file (file.py), nested values (tree.py), the tensors' checks (checkpoint/tensors.py), and the optimizers' part
(optimizer_state.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from apoptosis.checkpoint.arguments import Optimizers, check_given, several
from apoptosis.checkpoint.attributes import check_attributes
from apoptosis.checkpoint.emptied import empty_for_load, pack_emptied, read_emptied
from apoptosis.checkpoint.file import read_file, write_file
from apoptosis.checkpoint.manifest import Shapes, check_manifest, check_saved, loading
from apoptosis.checkpoint.optimizer_state import LoadedOptimizer, check_state_shapes, pack_optimizer, unpack_optimizer
from apoptosis.checkpoint.tensors import (
    PREFIX,
    check_names,
    check_tensors,
    is_wider,
    non_persistent,
    shapes_of,
    tensors_of,
)
from apoptosis.checkpoint.tree import pack, unpack
from apoptosis.checkpoint.widths import full_shapes
from apoptosis.distributed.sharded import has_shards, reshard
from apoptosis.distributed.wrappers import layouts_of, rebuild_wrappers, unwrapped, wrappers_of
from apoptosis.errors import CheckpointError
from apoptosis.interrupts import restoring
from apoptosis.model.built import built_shapes, note_built
from apoptosis.model.passes import check_not_inference
from apoptosis.modules.norms import is_shrunk
from apoptosis.surgery.attributes import attributes_of
from apoptosis.surgery.undo_log import UndoLog
from apoptosis.surgery.widening import may_widen, widen


class Resumable(Protocol):
    """What takes part in a checkpoint beside model and optimizer: `Apoptosis`."""

    def state_dict(self) -> dict[str, Any]:
        """Nested plain values and tensors."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them over, or raise and change nothing."""


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizers = None,
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
    check_given("save", path, model, optimizer, apo)
    if has_shards(model):
        raise CheckpointError(
            f"'{path}' cannot be written: the model's parameters are spread over processes, and one file would "
            "take all of them on one. Use save_sharded on every rank."
        )
    tensors, manifest = packed(unwrapped(model), optimizer, apo, extra)
    write_file(path, tensors, manifest)


def packed(
    model: nn.Module, optimizer: Optimizers, apo: Resumable | None, extra: Mapping[str, object]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what a checkpoint holds, as `save` writes it: tensors by name, and a JSON-able manifest.

    Raises: CheckpointError: a value that a checkpoint cannot hold.
    """
    tensors: dict[str, Tensor] = {}
    own = tensors_of(model)
    for name, tensor in own.items():
        pack(tensor, f"{PREFIX}{name}", tensors)
    known = getattr(apo, "full_shapes", None)
    full = full_shapes(model) if known is None else known
    try:
        attributes = {name: attributes_of(module) for name, module in model.named_modules()}
        manifest = {
            "model": {
                "names": list(own),
                "optional": sorted(non_persistent(model)),
                "attributes": pack({name: found for name, found in attributes.items() if found}, "attributes", tensors),
                "states": {
                    name: pack(module.get_extra_state(), f"extra_state.{name}", tensors)
                    for name, module in _with_extra_state(model).items()
                },
                "emptied": pack(pack_emptied(model), "emptied", tensors),
                "full": {name: list(shape) for name, shape in full.items()},
            },
            "optimizers": None
            if optimizer is None
            else [pack_optimizer(o, model, f"optimizer.{i}", tensors) for i, o in enumerate(several(optimizer))],
            "apoptosis": None if apo is None else {"state": pack(apo.state_dict(), "apoptosis", tensors)},
            "extra": pack(extra, "extra", tensors),
        }
    except RecursionError as error:
        raise CheckpointError("what is to be saved is nested too deeply, or holds itself.") from error
    check_saved(manifest)
    return tensors, manifest


def load(
    path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizers = None, apo: Resumable | None = None
) -> dict[str, Any]:
    """Load a checkpoint into a freshly built full-width model, which gets the stored widths first.

    Parameters keep their identity, so an optimizer made before stays valid. Values take the model's dtype and device.
    A model that already has the stored widths is loaded as well, and one that has shrunk further since, in this
    process: it gets the widths back that it was built with.

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
    check_given("load", path, model, optimizer, apo)
    if has_shards(model):
        raise CheckpointError(
            f"checkpoint '{path}' cannot be loaded: the model's parameters are spread over processes. Load it before "
            "fully_shard is called, or use save_sharded and load_sharded."
        )
    check_not_inference(model, "loading")
    manifest, tensors = read_file(path, lambda manifest, shapes: check_shapes(manifest, shapes, model, optimizer))
    return apply_checkpoint(path, manifest, tensors, model, optimizer, apo)


def check_shapes(manifest: Mapping[str, Any], shapes: Shapes, model: nn.Module, optimizer: Optimizers) -> None:
    """Check what can be checked of a checkpoint before its tensors are read: names, shapes, entries of the manifest.

    Raises: CheckpointError: it is damaged, or of another network or other optimizers.
    """
    model = unwrapped(model)
    check_manifest(manifest, frozenset(shapes))
    stored = {**manifest["model"], "emptied": unpack(manifest["model"].get("emptied"), {})}
    if is_wider(model, stored, shapes) and may_widen(model):
        return  # it gets its full width first, and is checked then
    check_names(model, stored, shapes)
    for entry, given in zip(manifest["optimizers"] or (), several(optimizer), strict=False):
        check_state_shapes(entry, given, model, shapes)


def apply_checkpoint(
    path: str | os.PathLike[str],
    manifest: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimizer: Optimizers,
    apo: Resumable | None,
) -> dict[str, Any]:
    """Check a checkpoint that was read and take it over, as `load` says."""
    wrappers, model = wrappers_of(model), unwrapped(model)
    layouts = layouts_of(wrappers)
    reshard(model)
    journal, todo, stored = UndoLog(), [True], manifest["model"]
    built = built_shapes(model, shapes_of(model))

    def undo() -> None:
        if todo:
            journal.undo()
            note_built(model, built)
            rebuild_wrappers(wrappers, model, several(optimizer), layouts)
            todo.clear()

    with restoring(undo):
        with loading(path):
            emptied = unpack(stored.get("emptied"), tensors)
            stand_ins = read_emptied(emptied)
            shapes = {name: tensor.shape for name, tensor in tensors.items()}
            if is_wider(model, {**stored, "emptied": emptied}, shapes) and may_widen(model):
                known = several(optimizer) if manifest["optimizers"] else ()  # else they are refused below
                widen(journal, model, known, _orders(manifest))
            empty_for_load(journal, model, several(optimizer), stand_ins, manifest["optimizers"] or ())
            values = check_tensors(model, {**stored, "emptied": emptied}, tensors)
            attributes = check_attributes(model, unpack(stored["attributes"], tensors), values)
            states = _check_states(model, unpack(stored["states"], tensors))
            loaded = _check_optimizers(manifest["optimizers"], optimizer, model, tensors)
            if apo is not None and manifest["apoptosis"] is None:
                raise CheckpointError("it holds no apoptosis state; it was saved without apo=. Leave apo= out.")
            extra: dict[str, Any] = unpack(manifest["extra"], tensors)
        for tensor, value in values:
            journal.set_tensor(tensor, value)  # gradients belong to the old values and go
        for module, name, attribute in attributes:
            journal.set_attribute(module, name, attribute)
        for state in loaded:
            state.write(journal)
        for module, extra_state in states:
            journal.call(module.set_extra_state, module.get_extra_state(), extra_state)
        torch.clear_autocast_cache()
        note_built(model, {name: stored["full"].get(name, shape) for name, shape in built.items()})
        rebuild_wrappers(wrappers, model, several(optimizer))
        if apo is not None:  # the last: it sets its wrappers up with the buckets that the run had
            apo.load_state_dict(unpack(manifest["apoptosis"]["state"], tensors))
        journal.forget()
        todo.clear()
    return extra


def _orders(manifest: Mapping[str, Any]) -> list[list[list[str]]]:
    """Return by optimizer and group the names of the parameters that were saved, in order."""
    return [[list(group["parameters"]) for group in entry["groups"]] for entry in manifest["optimizers"] or ()]


def _with_extra_state(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that keep more than tensors, by the protocol of `nn.Module.get_extra_state`."""
    default = nn.Module.get_extra_state
    found = {name: m for name, m in model.named_modules() if type(m).get_extra_state is not default}
    return {name: m for name, m in found.items() if not is_shrunk(m)}  # whose statistics are among the attributes


def _check_states(model: nn.Module, stored: Mapping[str, Any]) -> list[tuple[nn.Module, Any]]:
    modules = _with_extra_state(model)
    if set(modules) != set(stored):
        there, here = sorted(stored), sorted(modules)
        raise CheckpointError(f"it is of another network: extra state of {there} there, {here} here.")
    return [(modules[name], state) for name, state in stored.items()]


def _check_optimizers(
    stored: Sequence[Mapping[str, Any]] | None, optimizer: Optimizers, model: nn.Module, tensors: Mapping[str, Tensor]
) -> list[LoadedOptimizer]:
    if optimizer is None:
        return []
    given = several(optimizer)
    if stored is None:
        raise CheckpointError("it holds no optimizer state; it was saved without optimizer=. Leave optimizer= out.")
    if len(stored) != len(given):
        raise CheckpointError(
            f"it holds {len(stored)} optimizers, {len(given)} were given. Give those that were saved."
        )
    pairs = zip(stored, given, strict=True)
    return [loaded for entry, o in pairs for loaded in unpack_optimizer(entry, o, model, tensors)]
