"""A checkpoint's emptied branches, and the model that is to have them.

Holds: which modules of a model are stand-ins, whether stored ones can be those of a freshly built model, and the
exchange before the rest is loaded. Elsewhere: their classes (modules.emptied), the surgery itself (surgery.branches).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from apoptosis.distributed.sharded import has_shards
from apoptosis.errors import ArgumentError, CheckpointError, ShapeError
from apoptosis.modules.emptied import stand_in_of
from apoptosis.records import StandIn, StandInKind
from apoptosis.surgery.branches import exchange_all, made_biases, note_order, release
from apoptosis.surgery.undo_log import UndoLog

_FIELDS = {"kind": str, "axis": int, "anchor": tuple, "extras": int, "holder": str, "after": tuple, "dense": bool}


def pack_emptied(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return by name of a module what it stands in for; plain values."""
    found = {name: stand_in_of(module) for name, module in model.named_modules()}
    return {name: _values(stand_in) for name, stand_in in found.items() if stand_in is not None}


def _values(stand_in: StandIn) -> dict[str, Any]:
    return {name: value for name, value in asdict(stand_in).items() if name in _FIELDS}


def read_emptied(stored: Any) -> tuple[StandIn, ...]:
    """Read what `pack_emptied` returned. Raises: CheckpointError: it is damaged."""
    found = []
    for name, values in (stored or {}).items():
        good = isinstance(values, Mapping) and set(values) == set(_FIELDS)
        if not good or any(type(values[key]) is not kind for key, kind in _FIELDS.items()):
            raise CheckpointError(f"its manifest is damaged: the stand-in '{str(name)[:80]}' is not laid out as one.")
        anchor, after = values["anchor"], values["after"]
        plain = [type(x) for x in anchor] == [int, str] and all(type(x) is str for x in after)
        if not plain or values["kind"] not in get_args(StandInKind):
            raise CheckpointError(f"its manifest is damaged: the stand-in '{str(name)[:80]}' is not laid out as one.")
        found.append(StandIn(module=name, **values))
    return tuple(found)


def todo(model: nn.Module, stand_ins: Sequence[StandIn]) -> list[StandIn]:
    """Return the stand-ins that the model has not got yet.

    Raises: CheckpointError: the model lacks such a module, or has emptied branches that the checkpoint has not.
    """
    modules = dict(model.named_modules())
    wanted = {stand_in.module: stand_in for stand_in in stand_ins}
    for name, module in modules.items():
        own = stand_in_of(module)
        if own is not None and (name not in wanted or wanted[name].kind != own.kind):
            raise CheckpointError(
                f"it was saved before a branch went that this model has lost ('{name}'). Load it into a freshly built "
                "model of full width."
            )
    left = [stand_in for name, stand_in in wanted.items() if name not in modules or stand_in_of(modules[name]) is None]
    for stand_in in left:
        if stand_in.module not in modules:
            raise CheckpointError(f"it is of another network: this model has no module '{stand_in.module}'.")
        inside = [path for path in (stand_in.holder, *stand_in.after) if path]
        if any(f"{stand_in.module}.{path}" not in modules for path in inside):
            raise CheckpointError(f"it is of another network: '{stand_in.module}' has no module '{inside[0]}' here.")
    if left and has_shards(model):
        raise CheckpointError("branches of its network are empty: load it before the model is sharded.")
    return left


def names_after(model: nn.Module, stand_ins: Sequence[StandIn]) -> tuple[set[str], set[str]]:
    """Return the names of tensors that go when the model gets these stand-ins, and of those that are made."""
    left = todo(model, stand_ins)
    holders = {stand_in.module for stand_in in left if stand_in.kind == "constant"}
    kept = {f"{name}.bias" for name in holders}
    outer = {stand_in.module for stand_in in left if stand_in.kind != "written_out"}
    kept_inside = tuple(
        f"{stand_in.module}.{path}." for stand_in in left if stand_in.kind == "branch" for path in stand_in.after
    )
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    gone = {
        name
        for name in own
        if name not in kept
        and not name.startswith(kept_inside or ("\0",))
        and any(name.startswith(f"{module}.") for module in outer)
    }
    return gone, kept - own


def empty_for_load(
    log: UndoLog,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    stand_ins: Sequence[StandIn],
    stored: Sequence[Mapping[str, Any]],
) -> None:
    """Give a model the stand-ins of a checkpoint, and take what goes out of its optimizers.

    Args:
        log: written through.
        model: that is loaded into.
        optimizers: of it.
        stand_ins: of the checkpoint.
        stored: the checkpoint's entries of the optimizers, in order.

    Raises: CheckpointError: a module cannot have its stand-in.
    """
    left = todo(model, stand_ins)
    if not left:
        return
    before: dict[str, Tensor] = dict(model.named_parameters())
    for optimizer in optimizers:
        note_order(optimizer, model)
    try:
        made = made_biases(log, model, left)
        exchange_all(log, model, left, [new for _, new in made])
    except (ShapeError, ArgumentError, AttributeError) as error:
        raise CheckpointError(f"it is of another network: {error}") from error
    after = {id(p) for p in model.parameters()}
    gone = [p for p in before.values() if id(p) not in after]
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer, entry in zip(optimizers, stored, strict=False):
        order = [name for group in entry["groups"] for name in group["parameters"]]
        release(log, optimizer, gone, made, order={id_: order.index(n) for id_, n in names.items() if n in order})
    for optimizer in optimizers[len(stored) :]:
        release(log, optimizer, gone, made)
