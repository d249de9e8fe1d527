"""Widths as a value: what a network shrank to, apart from its numbers, as plain JSON.

Holds: the record, reading it off a model or off the shapes of a state_dict, and giving it to a model. Elsewhere: what
a whole checkpoint holds (save_load.py), the numbers of modules that shapes tell (shapes.py), widening (surgery).

A trainer that keeps checkpoints of its own keeps this record beside the state_dict, and hands it to `set_widths_`
before it loads the state_dict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from apoptosis.checkpoint.arguments import Optimizers, check_given, several
from apoptosis.checkpoint.attributes import check_attributes
from apoptosis.checkpoint.emptied import empty_for_load, pack_emptied, read_emptied
from apoptosis.checkpoint.manifest import DAMAGES, check_schema, check_shape
from apoptosis.checkpoint.shapes import attributes_for, shapes_for
from apoptosis.checkpoint.tensors import PREFIX, check_names, is_wider, non_persistent, shapes_of, tensors_of
from apoptosis.checkpoint.tree import pack, unpack
from apoptosis.distributed.sharded import has_shards
from apoptosis.distributed.wrappers import rebuild_wrappers, unwrapped, wrappers_of
from apoptosis.errors import ArgumentError, CheckpointError
from apoptosis.interrupts import restoring
from apoptosis.model.built import built_shapes, is_known, note_built
from apoptosis.model.passes import check_not_inference
from apoptosis.storage.files import reason
from apoptosis.surgery.attributes import attributes_of
from apoptosis.surgery.undo_log import UndoLog
from apoptosis.surgery.widening import drop_state, may_widen, resized, widen

FORMAT = "torch-apoptosis widths"
VERSION = 1
Widths = dict[str, Any]
"""Plain JSON: format, version, groups (name -> channels), shapes (tensor -> sizes), and what else follows widths."""
_SCHEMA = {
    "format": str,
    "version": int,
    "groups": {"*": int},
    "shapes": {"*": list},
    "full": {"*": list},
    "optional": [str],
    "attributes": {"*": dict},
    "emptied": {"*": dict},
    "buffers": {"*": dict},
    "tensors": {"*": dict},
}


def current_widths(model: nn.Module) -> Widths:
    """Return the widths that a model has now, with the shapes that it was built with where they are known.

    Args: model: with or without its wrappers.
    """
    model = unwrapped(model)
    return record_of(model, {}, full_shapes(model))


def full_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a model was built with.

    Where it never shrank in this process nothing is known: it may have been built narrow, or cut by other means.
    """
    return built_shapes(model, shapes_of(model)) if is_known(model) else {}


def has_shrunk(model: nn.Module) -> bool:
    """Whether a model lost channels or branches, or took over such widths, in this process.

    Args: model: with or without its wrappers.
    """
    model = unwrapped(model)
    now, full = shapes_of(model), full_shapes(model)
    return bool(full) and (any(full[name] != shape for name, shape in now.items()) or bool(pack_emptied(model)))


def record_of(model: nn.Module, groups: Mapping[str, int], full: Mapping[str, tuple[int, ...]]) -> Widths:
    """Return the widths that a model has now.

    Args:
        model: with or without its wrappers.
        groups: channels by name of a group, where they are known.
        full: shapes by name of a tensor at full width, where they are known.

    Returns: plain values that `json.dumps` takes.
    """
    model = unwrapped(model)
    tensors = tensors_of(model)
    own = {name: found for name, module in model.named_modules() if (found := attributes_of(module))}
    shapes = shapes_of(model)
    cut = {
        name: tensors[name] for name in non_persistent(model) if shapes.get(name) != full.get(name, shapes.get(name))
    }
    return _record(model, shapes, own, groups=groups, full=full, emptied=pack_emptied(model), buffers=cut)


def _record(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    attributes: Mapping[str, Mapping[str, Any]],
    *,
    full: Mapping[str, tuple[int, ...]],
    groups: Mapping[str, int],
    emptied: Mapping[str, Any],
    buffers: Mapping[str, Tensor],
) -> Widths:
    inside: dict[str, Tensor] = {}
    return {
        "format": FORMAT,
        "version": VERSION,
        "groups": dict(groups),
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "full": {name: list(full[name]) for name in shapes if name in full},
        "optional": sorted(non_persistent(model)),
        "attributes": pack(dict(attributes), "attributes", inside),
        "emptied": pack(dict(emptied), "emptied", inside),
        "buffers": pack(dict(buffers), "buffers", inside),  # no state_dict holds these
        "tensors": {
            name: {"dtype": str(tensor.dtype).removeprefix("torch."), "values": pack(_values(tensor), name, {})}
            for name, tensor in inside.items()
        },
    }


def _values(tensor: Tensor) -> Any:
    tensor = tensor.detach()
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).tolist()


def widths_of(state_dict: Mapping[str, Any], model: nn.Module) -> Widths:
    """Read widths off the shapes in a state_dict, where they were not kept beside it.

    Args:
        state_dict: of the shrunk network; prefixes of wrappers ("module.", "_orig_mod.") are passed over.
        model: the network as built, or as it has shrunk since in this process; it is not changed.

    Returns: what `set_widths_` takes; `groups` is empty.

    Raises: CheckpointError: the shapes are not those of this network, or do not tell its widths: heads of attention
        that lost channels, norms that make up for lost ones, and emptied branches need `apo.widths`. So do numbers of
        your own modules by which their forward pass splits channels: they stay, and the pass then fails.

    Example:
        >>> small = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> set_widths_(net, widths_of(small.state_dict(), net))
        >>> net.load_state_dict(small.state_dict())
        <All keys matched successfully>
    """
    check_given("widths_of", "", model, None, None)
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(f"widths_of takes a state_dict, not a {type(state_dict).__name__}.")
    model, log = unwrapped(model), UndoLog()
    with restoring(log.undo):
        if may_widen(model):
            widen(log, model)
        try:
            shapes = shapes_for(model, {name: v for name, v in state_dict.items() if isinstance(v, Tensor)})
            attributes = attributes_for(model, shapes)
            return _record(model, shapes, attributes, full=shapes_of(model), groups={}, emptied={}, buffers={})
        finally:
            log.undo()


def set_widths_(model: nn.Module, widths: Mapping[str, Any], optimizer: Optimizers = None) -> None:
    """Give a model the widths of a record, before a state_dict of these widths is loaded into it.

    Channels are cut or added at the end, without regard to what they hold: what the network computes means something
    again once values are loaded. Parameters keep their identity, so an optimizer made before stays valid.

    Args:
        model: as built, or as it has shrunk in this process; wider than the record or narrower. An AveragedModel of it,
            too.
        widths: `apo.widths`, as it is or read from JSON, or what `widths_of` returned.
        optimizer: one or several; what they know of parameters whose shapes change is dropped, parameters of branches
            that go or come leave or join. Their state comes from their own load_state_dict.

    Raises: CheckpointError: the record is damaged, newer, or of another network; the model is sharded. ArgumentError:
        arguments of other types, or a parameter that comes back and several groups of the optimizer could take.
        Model and optimizer are as before the call.

    Example:
        >>> from apoptosis import Apoptosis
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> widths = Apoptosis(net, torch.optim.SGD(net.parameters(), lr=0.1), torch.ones(4, 2)).widths
        >>> widths["groups"]
        {'0': 8}
        >>> set_widths_(net, widths)
    """
    check_given("set_widths_", "", model, optimizer, None)
    if has_shards(model):
        raise CheckpointError("set_widths_: the model's parameters are spread over processes. Call it before.")
    check_not_inference(model, "set_widths_")
    record, inside = check_record(widths)
    model = model.module if isinstance(model, AveragedModel) else model
    wrappers, inner, optimizers = wrappers_of(model), unwrapped(model), several(optimizer)
    log, todo, written = UndoLog(), [True], list[bool]()
    built = built_shapes(inner, shapes_of(inner))

    def undo() -> None:
        if todo:
            written.extend([True] * bool(log))  # wrappers on other ranks are as before: where nothing was, these stay
            log.undo()
            note_built(inner, built)
            if written:
                rebuild_wrappers(wrappers, inner, optimizers)
            todo.clear()

    with restoring(undo):
        try:
            _take_over(log, inner, record, inside, optimizers)
        except CheckpointError as error:
            raise CheckpointError(f"the widths cannot be set: {error}") from error
        except ArgumentError:  # a ValueError, too
            raise
        except DAMAGES as error:
            raise CheckpointError(f"the widths are damaged: they lack or misstate {reason(error)[:200]}.") from error
        torch.clear_autocast_cache()
        if log:
            rebuild_wrappers(wrappers, inner, optimizers)
        log.forget()
        todo.clear()


def _take_over(
    log: UndoLog, model: nn.Module, record: Widths, inside: Mapping[str, Tensor], optimizers: tuple[Any, ...]
) -> None:
    shapes = {f"{PREFIX}{name}": shape for name, shape in record["shapes"].items()}
    emptied, buffers = unpack(record["emptied"], inside), unpack(record["buffers"], inside)
    stored = {**record, "names": list(record["shapes"]), "emptied": emptied}
    stand_ins = read_emptied(emptied)
    if is_wider(model, stored, shapes) and may_widen(model):
        widen(log, model, optimizers)
    empty_for_load(log, model, optimizers, stand_ins, ())
    pairs = check_names(model, stored, shapes)
    values = [(tensor, _value(tensor, record["shapes"][name], buffers.get(name))) for name, tensor in pairs]
    attributes = check_attributes(model, unpack(record["attributes"], inside), values)
    known = {id(tensor) for name, tensor in pairs if name in buffers}  # of other channels, perhaps, at the same shape
    for tensor, value in values:
        if value.shape != tensor.shape:
            log.set_tensor(tensor, value)
            drop_state(log, tensor, optimizers)
        elif id(tensor) in known and not torch.equal(value, tensor):
            log.set_tensor(tensor, value)
    for module, name, attribute in attributes:
        log.set_attribute(module, name, attribute)
    built = built_shapes(model, shapes_of(model))
    note_built(model, {name: tuple(record["full"].get(name, shape)) for name, shape in built.items()})


def _value(tensor: Tensor, shape: list[int], known: Tensor | None) -> Tensor:
    """Return a tensor's content in another shape. known: that of a buffer that no state_dict holds."""
    if known is None:
        return resized(tensor, shape)
    if list(known.shape) != shape or known.is_complex() != tensor.is_complex():
        raise CheckpointError("they are damaged: a buffer has another shape than they say.")
    return known.to(tensor)


def check_record(widths: object) -> tuple[Widths, dict[str, Tensor]]:
    """Check a record of widths; return it with its tensors.

    Raises: CheckpointError: it is damaged, newer, or no such record.
    """
    if not isinstance(widths, Mapping) or widths.get("format") != FORMAT:
        raise CheckpointError(
            "these are no widths: give apo.widths, or what widths_of read off a state_dict, "
            f"not {type(widths).__name__} {str(widths)[:60]!r}."
        )
    version = widths.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"the widths have format version {str(version)[:40]}; this release reads up to {VERSION}. Update it."
        )
    try:
        record = json.loads(json.dumps(dict(widths)))  # a copy of plain values
    except DAMAGES as error:
        raise CheckpointError(f"the widths are damaged: they are no plain JSON ({reason(error)[:200]}).") from error
    check_schema(record, _SCHEMA)
    for place in ("shapes", "full"):
        for name, shape in record[place].items():
            check_shape(shape, f"{place}.{name}")
    return record, {name: _tensor(name, entry) for name, entry in record["tensors"].items()}


def _tensor(name: str, entry: Mapping[str, Any]) -> Tensor:
    """Read a tensor of a record. Raises: CheckpointError: it is none."""
    try:
        dtype = getattr(torch, entry["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise TypeError(entry["dtype"])
        wide = torch.float64 if dtype.is_floating_point or dtype.is_complex else dtype  # as JSON has numbers
        values = torch.tensor(unpack(entry["values"], {}), dtype=wide, device="cpu")
        return (torch.view_as_complex(values) if dtype.is_complex else values).to(dtype)
    except (*DAMAGES, RuntimeError, CheckpointError) as error:
        raise CheckpointError(f"the widths are damaged: '{name[:80]}' is no tensor.") from error
