"""fully_shard (FSDP2): parameters spread over processes, gathered one unit at a time and set up for new shapes.

Holds: the kind, which sharded models are refused, the library's own passes over a sharded model, fully_shard's own
records for new shapes. Elsewhere: sharded tensors of any kind (sharded.py), what is cut (surgery).

A unit is what one call of fully_shard wrapped. What gathers or rebuilds is collective: all ranks call it in the same
order.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from apoptosis.distributed.protocol import Layout, Wrapper, is_named, register_wrapper
from apoptosis.distributed.sharded import full_tensor, has_shards
from apoptosis.errors import ArgumentError, CaptureError
from apoptosis.interrupts import hooks_on_all_modules, restoring

_NEEDED = (
    *("_init_sharded_param", "_init_sharded_post_forward_param_metadata", "reset_sharded_param", "_setattr_on_modules"),
    *("sharded_param", "_sharded_param_data", "_orig_size", "_orig_param_uid", "mesh_info", "post_forward_mesh_info"),
    *("all_gather_outputs", "is_dtensor", "offload_to_cpu", "fsdp_placement", "device"),
)  # what `_reset` reads and writes of fully_shard's records
_ASKED = ("param", "device", "shard_placement_fn", "mesh_info")
_PLAIN = "Shard with fully_shard alone, on one mesh, or train with DistributedDataParallel."
_FSDP = "torch.distributed.fsdp"
_EXPLICIT = ("unshard", "reshard")


class _FullyShard(Wrapper):
    """fully_shard, which makes DTensors of a model's parameters in place."""

    name = "fully_shard"
    in_place = True

    def matches(self, candidate: object) -> bool:
        return _is_unit(candidate)

    def check(self, wrapped: Any, name: str) -> None:
        self.reshard(wrapped)
        units = [(name, module) for name, module in wrapped.named_modules() if _is_unit(module)]
        if not units and not has_shards(wrapped):
            return
        known = {id(record.sharded_param): record for record in _checked_records(wrapped)}
        for name, parameter in wrapped.named_parameters():
            if _is_dtensor(parameter):
                _check_parameter(name, parameter, known.get(id(parameter)))
        meshes = {id(record.mesh_info.mesh): record.mesh_info.mesh for record in known.values()}
        if len(set(meshes.values())) > 1:
            raise ArgumentError(
                f"the model is sharded over {len(meshes)} device meshes, and an event needs one. {_PLAIN}"
            )
        for name, module in units:
            _check_unit(name, module)
        _group(next(iter(meshes.values())) if meshes else None)

    def group(self, wrapped: Any) -> Any:
        mesh = next((record.mesh_info.mesh for record in _checked_records(wrapped)), None)
        return None if mesh is None else _group(mesh)

    def is_sharded(self, tensor: object) -> bool:
        return _is_dtensor(tensor)

    def full_tensor(self, tensor: Any) -> Tensor:
        found: Tensor = tensor.full_tensor()
        return found

    def shard_like(self, value: Tensor, like: Any) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

        value = value.detach().contiguous()
        mesh, placements = like.device_mesh, [Replicate() if isinstance(p, Partial) else p for p in like.placements]
        local = distribute_tensor(value, mesh, placements, src_data_rank=None).to_local().clone()
        found: Tensor = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=value.shape, stride=value.stride()
        )
        return found

    def empty_like(self, size: tuple[int, ...], dtype: torch.dtype, like: Any) -> Tensor:
        from torch.distributed.tensor import empty

        found: Tensor = empty(size, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)
        return found

    def swap_local_(self, tensor: Any, value: Any) -> None:
        tensor.data = value  # sizes and strides; the two below are attributes of the Python object
        for name in ("_local_tensor", "_spec"):
            setattr(tensor, name, getattr(value, name))

    def reshard(self, model: nn.Module) -> None:
        for module in model.modules():  # without a backward pass the outermost may be left in full
            if _is_unit(module):
                unit: Any = module
                unit.reshard()

    def unsharded_forward(self, model: nn.Module) -> AbstractContextManager[None]:
        self.reshard(model)
        units = [module for module in model.modules() if _is_unit(module)]
        return _unsharded_forward(units) if units and has_shards(model) else nullcontext()

    def rebuild(self, wrapped: Any, layout: Layout | None = None) -> None:
        for record in _records(wrapped):
            parameter = record.sharded_param
            local, data = parameter._local_tensor.untyped_storage(), record._sharded_param_data.untyped_storage()
            if tuple(record._orig_size) != tuple(parameter.shape) or local.data_ptr() != data.data_ptr():
                _reset(record, parameter)


def _is_unit(candidate: object) -> bool:
    return is_named(candidate, "FSDPModule", "torch.")


def _is_dtensor(tensor: object) -> bool:
    return type(tensor).__name__ == "DTensor"


def _reset(record: Any, parameter: Any) -> None:
    """Let fully_shard set up one record and its buffers for what a parameter is now; it keeps its identity.

    fully_shard does so for parameters that were on the meta device: sizes are worked out on a stand-in without data,
    then the real one is put in.
    """
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    stand_in = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    number = record._orig_param_uid
    record._init_sharded_param(stand_in, record.device, None, record.mesh_info)
    record._orig_param_uid = number
    record.sharded_param = parameter
    record._setattr_on_modules(parameter)
    record.reset_sharded_param()
    if record.post_forward_mesh_info is not None:
        record._init_sharded_post_forward_param_metadata(stand_in)
    record.all_gather_outputs = []
    record._unsharded_inner_tensors = []
    if hasattr(record, "_unsharded_param"):
        del record._unsharded_param  # made anew at the next pass


def _records(model: nn.Module) -> Iterator[Any]:
    """Yield what fully_shard keeps of every parameter (FSDPParam), unit by unit."""
    seen: set[int] = set()
    for module in model.modules():
        unit: Any = module
        for group in unit._get_fsdp_state()._fsdp_param_groups if _is_unit(module) else ():
            if id(group) not in seen:
                seen.add(id(group))
                yield from group.fsdp_params


def _checked_records(model: nn.Module) -> Iterator[Any]:
    for record in _records(model):
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


class _FullParameter:
    """A plain parameter in the place of a sharded one; it has memory only while a unit that uses it runs."""

    def __init__(self, sharded: Tensor) -> None:
        self.sharded = sharded
        full = torch.empty(sharded.shape, dtype=sharded.dtype, device=sharded.device)
        self._bytes = full.untyped_storage().nbytes()
        self.plain = nn.Parameter(full, requires_grad=sharded.requires_grad)
        self._users = 0  # units that run now
        full.untyped_storage().resize_(0)  # the storage keeps its identity, by which a capture knows the parameter

    def begin(self) -> None:
        """Fill it."""
        self._users += 1
        if self._users == 1:
            with torch.no_grad():
                self.plain.untyped_storage().resize_(self._bytes)
                self.plain.copy_(full_tensor(self.sharded))

    def end(self) -> None:
        """Free it."""
        self._users = max(0, self._users - 1)
        if not self._users:
            self.plain.untyped_storage().resize_(0)


def _own_parameters(unit: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield (module, leaf, parameter) of a unit's sharded parameters, without those of units inside it."""
    todo, seen = [unit], set()
    while todo:
        module = todo.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for leaf, parameter in module._parameters.items():
            if parameter is not None and _is_dtensor(parameter):
                yield module, leaf, parameter
        todo += [child for child in module.children() if not _is_unit(child)]


@contextmanager
def _unsharded_forward(units: list[nn.Module]) -> Iterator[None]:
    """Let passes inside find full, plain parameters, those of each unit only while it runs.

    fully_shard's own hooks, which would change dtypes and gather for a backward pass, are off inside. The passes
    compute in the dtype of the parameters.
    """
    stand_ins: dict[int, _FullParameter] = {}
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    by_unit: dict[int, list[_FullParameter]] = {}
    for unit in units:
        for module, leaf, parameter in _own_parameters(unit):
            stand_in = stand_ins.setdefault(id(parameter), _FullParameter(parameter))
            places.append((module, leaf, parameter))
            by_unit.setdefault(id(unit), []).append(stand_in)

    def enter(module: nn.Module, args: Any) -> None:
        with _unwatched():
            for stand_in in by_unit.get(id(module), ()):
                stand_in.begin()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        for stand_in in by_unit.get(id(module), ()):
            stand_in.end()

    hooks = [(table, dict(table)) for unit in units for table in (unit._forward_pre_hooks, unit._forward_hooks)]

    def undo() -> None:
        for unit in units:
            for key in [key for key, hook in unit._forward_hooks.items() if hook is leave]:
                for table in (unit._forward_hooks_always_called, unit._forward_hooks):
                    table.pop(key, None)
        for module, leaf, parameter in places:
            module._parameters[leaf] = parameter
        _put_back(units, hooks)

    with restoring(undo):
        _take_off(units, hooks)
        for module, leaf, parameter in places:
            module._parameters[leaf] = stand_ins[id(parameter)].plain
        with hooks_on_all_modules(enter):  # before all others, which may read weights
            for unit in units:
                unit.register_forward_hook(leave, always_call=True)
            yield


@contextmanager
def _unwatched() -> Iterator[None]:
    """Hide the operators inside from a capture."""
    with _disable_current_modes(), torch.no_grad():
        yield


_Hooks = list[tuple[dict[int, Any], dict[int, Any]]]  # (table of hooks, its content)


def _take_off(units: Iterable[nn.Module], hooks: _Hooks) -> None:
    """Take fully_shard's hooks off units, and refuse its explicit gathering."""
    for table, before in hooks:
        for key, hook in before.items():
            if str(getattr(hook, "__module__", "")).startswith(_FSDP):
                del table[key]
    for unit in units:
        vars(unit).update(dict.fromkeys(_EXPLICIT, _refuse))


def _put_back(units: Iterable[nn.Module], hooks: _Hooks) -> None:
    """Undo `_take_off`; hooks that were added since stay."""
    for table, before in hooks:
        after = before | {key: hook for key, hook in table.items() if key not in before}
        if list(table) != list(after):
            table.clear()
            table.update(after)
    for unit in units:
        for name in _EXPLICIT:
            if vars(unit).get(name) is _refuse:
                del vars(unit)[name]


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise CaptureError(
        "the forward pass calls unshard() or reshard() of a module that fully_shard has wrapped, and the passes of a "
        "capture gather parameters by themselves. Leave the calls out, or make them outside of forward()."
    )


register_wrapper(_FullyShard())
