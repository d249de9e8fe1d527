"""Which sharded models apoptosis works on; the others are refused by name before anything has changed.

Holds: the checks, and the processes that shard a model. Elsewhere: wrappers (distributed.wrappers).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from apoptosis.distributed.fsdp.tensors import has_shards, is_sharded
from apoptosis.distributed.fsdp.units import is_unit, records, reshard
from apoptosis.errors import ArgumentError

_NEEDED = (
    *("_init_sharded_param", "_init_sharded_post_forward_param_metadata", "reset_sharded_param", "_setattr_on_modules"),
    *("sharded_param", "_sharded_param_data", "_orig_size", "_orig_param_uid", "mesh_info", "post_forward_mesh_info"),
    *("all_gather_outputs", "is_dtensor", "offload_to_cpu", "fsdp_placement", "device"),
)  # what `units.reset_fsdp_state` reads and writes of fully_shard's records
_ASKED = ("param", "device", "shard_placement_fn", "mesh_info")
_PLAIN = "Shard with fully_shard alone, on one mesh, or train with DistributedDataParallel."


def check_sharded(model: nn.Module) -> None:
    """Refuse models whose parameters are spread in a way that removal does not reach through; plain models pass.

    Raises: ArgumentError: with the parameter or module, the reason and the remedy.
    """
    reshard(model)
    units = [(name, module) for name, module in model.named_modules() if is_unit(module)]
    if not units and not has_shards(model):
        return
    known = {id(record.sharded_param): record for record in _records(model)}
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            _check_parameter(name, parameter, known.get(id(parameter)))
    meshes = {id(record.mesh_info.mesh): record.mesh_info.mesh for record in known.values()}
    if len(set(meshes.values())) > 1:
        raise ArgumentError(f"the model is sharded over {len(meshes)} device meshes, and an event needs one. {_PLAIN}")
    for name, module in units:
        _check_unit(name, module)
    _group(next(iter(meshes.values())) if meshes else None)


def group_of(model: nn.Module) -> Any:
    """Return the process group over which a model is sharded; None for others."""
    mesh = next((record.mesh_info.mesh for record in _records(model)), None)
    return None if mesh is None else _group(mesh)


def _group(mesh: Any) -> Any:
    import torch.distributed as dist

    if mesh is None or mesh.ndim == 1:
        return None if mesh is None else mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    raise ArgumentError(
        f"the model is sharded over a mesh of {mesh.ndim} dimensions that leaves processes out, and the ranks of an "
        f"event are those of one process group. {_PLAIN}"
    )


def _records(model: nn.Module) -> Iterator[Any]:
    for record in records(model):
        lacking = [name for name in _NEEDED if not hasattr(record, name)]
        if not lacking and tuple(inspect.signature(record._init_sharded_param).parameters) != _ASKED:
            lacking = ["_init_sharded_param"]
        if lacking:
            raise ArgumentError(
                f"fully_shard of torch {torch.__version__} keeps its records in another way than apoptosis knows "
                f"('{lacking[0]}'). Use another release of torch, or train with DistributedDataParallel."
            )
        yield record


def _check_parameter(name: str, parameter: Any, record: Any) -> None:
    who = f"parameter '{name}' is a DTensor"
    if record is None or record.is_dtensor:
        what = "not of fully_shard" if record is None else "of fully_shard on top of another plan"
        raise ArgumentError(
            f"{who} {what} (placements {tuple(parameter.placements)}): in a tensor-parallel plan (parallelize_module) "
            "each process computes with a part of the channels, and removing others on each would leave parts of "
            f"unequal widths. {_PLAIN}"
        )
    if record.fsdp_placement.dim != 0 or any(p.is_partial() for p in parameter.placements):
        raise ArgumentError(
            f"{who} sharded along dimension {record.fsdp_placement.dim}: fully_shard wants that even, which widths "
            "are not after an event. Leave out shard_placement_fn=."
        )
    if record.offload_to_cpu:
        raise ArgumentError(
            f"{who} kept on the CPU (CPUOffloadPolicy), from where it cannot be gathered. Leave it out."
        )
    if type(parameter._local_tensor) is not torch.Tensor:
        kind = type(parameter._local_tensor).__name__
        raise ArgumentError(f"{who} of {kind}, which no channel can be cut out of. Shard plain tensors.")


def _check_unit(name: str, module: nn.Module) -> None:
    who = f"module '{name}'" if name else "the model"
    if isinstance(module, nn.MultiheadAttention):
        raise ArgumentError(
            f"{who} is an nn.MultiheadAttention that fully_shard has wrapped by itself: it gets another class when it "
            "is narrowed. Call fully_shard on the block that holds it."
        )
    odd = [key for key, value in vars(module).items() if "register_fsdp_forward_method" in _code_name(value)]
    if odd:
        raise ArgumentError(
            f"{who} gathers its parameters in '{odd[0]}' (register_fsdp_forward_method), which captures do not follow. "
            "Call the module itself."
        )


def _code_name(value: Any) -> str:
    function = getattr(value, "__func__", None)
    return "" if function is None else str(getattr(getattr(function, "__code__", None), "co_qualname", ""))
