"""Parameters that fully_shard has spread over processes, gathered one unit at a time and set up for new shapes.

Holds: passes of the library's own over a sharded model, parameters gathered by name, fully_shard's own records for new
shapes. Elsewhere: one tensor (tensors.py), what is refused (checks.py), what is cut (surgery).

A unit is what one call of fully_shard wrapped. Everything here is collective: all ranks call it in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from apoptosis.distributed.fsdp.tensors import has_shards, is_sharded, whole
from apoptosis.errors import CaptureError
from apoptosis.interrupts import hooks_on_all_modules, restoring

_FSDP = "torch.distributed.fsdp"
_EXPLICIT = ("unshard", "reshard")


def is_unit(module: nn.Module) -> bool:
    """Whether fully_shard was called on this very module."""
    return any(c.__name__ == "FSDPModule" and c.__module__.startswith("torch.") for c in type(module).__mro__)


class _Loan:
    """A parameter in full that stands in for a sharded one; its memory is there while a unit that holds it runs."""

    def __init__(self, sharded: Tensor) -> None:
        self.sharded = sharded
        full = torch.empty(sharded.shape, dtype=sharded.dtype, device=sharded.device)
        self._bytes = full.untyped_storage().nbytes()
        self.plain = nn.Parameter(full, requires_grad=sharded.requires_grad)
        self._users = 0
        full.untyped_storage().resize_(0)  # the storage keeps its identity, by which a capture knows the parameter

    def begin(self) -> None:
        """Fill it."""
        self._users += 1
        if self._users == 1:
            with torch.no_grad():
                self.plain.untyped_storage().resize_(self._bytes)
                self.plain.copy_(whole(self.sharded))

    def end(self) -> None:
        """Free it."""
        self._users = max(0, self._users - 1)
        if not self._users:
            self.plain.untyped_storage().resize_(0)


def _held(unit: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield (module, leaf, parameter) of a unit's sharded parameters, without those of units inside it."""
    todo, seen = [unit], set()
    while todo:
        module = todo.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for leaf, parameter in module._parameters.items():
            if parameter is not None and is_sharded(parameter):
                yield module, leaf, parameter
        todo += [child for child in module.children() if not is_unit(child)]


def reshard(model: nn.Module) -> None:
    """Let every unit hold its sharded parameters: a pass without a backward pass may leave the outermost in full."""
    for module in model.modules():
        if is_unit(module):
            unit: Any = module
            unit.reshard()


@contextmanager
def unsharded_forward(model: nn.Module) -> Iterator[None]:
    """Let the library's own passes find full, plain parameters, each unit's only while it runs.

    fully_shard's own hooks, which would change dtypes and gather for a backward pass, are off inside. Models without
    sharded parameters are left alone. The passes compute in the dtype of the parameters.
    """
    reshard(model)
    units = [module for module in model.modules() if is_unit(module)]
    if not units or not has_shards(model):
        yield
        return
    loans: dict[int, _Loan] = {}
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    by_unit: dict[int, list[_Loan]] = {}
    for unit in units:
        for module, leaf, parameter in _held(unit):
            loan = loans.setdefault(id(parameter), _Loan(parameter))
            places.append((module, leaf, parameter))
            by_unit.setdefault(id(unit), []).append(loan)

    def enter(module: nn.Module, args: Any) -> None:
        with _unwatched():
            for loan in by_unit.get(id(module), ()):
                loan.begin()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        for loan in by_unit.get(id(module), ()):
            loan.end()

    put_back = _hooks_of(units)

    def undo() -> None:
        for unit in units:
            for key in [key for key, hook in unit._forward_hooks.items() if hook is leave]:
                for table in (unit._forward_hooks_always_called, unit._forward_hooks):
                    table.pop(key, None)
        for module, leaf, parameter in places:
            module._parameters[leaf] = parameter
        put_back()

    with restoring(undo):
        _take_off_hooks(units)
        for module, leaf, parameter in places:
            module._parameters[leaf] = loans[id(parameter)].plain
        with hooks_on_all_modules(enter):  # before all others, which may read weights
            for unit in units:
                unit.register_forward_hook(leave, always_call=True)
            yield


@contextmanager
def _unwatched() -> Iterator[None]:
    """Let what a capture watches pass over what is done inside."""
    # untyped in some releases of torch, typed in others
    with _disable_current_modes(), torch.no_grad():  # type: ignore[no-untyped-call, unused-ignore]
        yield


def _hooks_of(units: Iterable[nn.Module]) -> Callable[[], None]:
    """Take down the hooks of units; return what puts them back, and fully_shard's explicit gathering."""
    units = list(units)
    saved = [(table, dict(table)) for unit in units for table in (unit._forward_pre_hooks, unit._forward_hooks)]

    def put_back() -> None:
        for table, before in saved:
            after = before | {key: hook for key, hook in table.items() if key not in before}
            if list(table) != list(after):
                table.clear()
                table.update(after)
        for unit in units:
            for name in _EXPLICIT:
                if vars(unit).get(name) is _refuse:
                    del vars(unit)[name]

    return put_back


def _take_off_hooks(units: Iterable[nn.Module]) -> None:
    """Take fully_shard's hooks off units, and its explicit gathering."""
    for unit in units:
        for table in (unit._forward_pre_hooks, unit._forward_hooks):
            for key in [k for k, hook in table.items() if str(getattr(hook, "__module__", "")).startswith(_FSDP)]:
                del table[key]
        for name in _EXPLICIT:
            vars(unit)[name] = _refuse


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise CaptureError(
        "the forward pass calls unshard() or reshard() of a module that fully_shard has wrapped, and the passes of a "
        "capture gather parameters by themselves. Leave the calls out, or make them outside of forward()."
    )


@contextmanager
def summon_full_params(model: nn.Module, names: Iterable[str], *, keep: bool = True) -> Iterator[None]:
    """Put full, plain parameters of these names in the place of sharded ones.

    Args: keep: False on ranks that only take part in the gathering, and hold nothing of it.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    wanted = [name for name in dict.fromkeys(names) if name in tensors and is_sharded(tensors[name])]
    places: list[tuple[nn.Module, str, Any]] = []

    def undo() -> None:
        for module, leaf, parameter in places:
            module._parameters[leaf] = parameter

    with restoring(undo):
        for name in wanted:
            path, _, leaf = name.rpartition(".")
            full = whole(tensors[name])
            if keep:
                module = model.get_submodule(path)
                places.append((module, leaf, module._parameters[leaf]))
                module._parameters[leaf] = nn.Parameter(full, requires_grad=False)
            del full
        yield


def records(model: nn.Module) -> Iterator[Any]:
    """Yield what fully_shard keeps of every parameter (FSDPParam), unit by unit."""
    seen: set[int] = set()
    for module in model.modules():
        unit: Any = module
        for group in unit._get_fsdp_state()._fsdp_param_groups if is_unit(module) else ():
            if id(group) not in seen:
                seen.add(id(group))
                yield from group.fsdp_params


def reset_fsdp_state(model: nn.Module) -> None:
    """Let fully_shard set up its records and buffers for what its parameters are now; they keep their identity.

    It is done in its own way of taking over parameters that were on the meta device: sizes are worked out on a stand-in
    without data, then the real one is put in.
    """
    for record in records(model):
        own = record.sharded_param
        local = own._local_tensor
        if tuple(record._orig_size) == tuple(own.shape) and _same_memory(record._sharded_param_data, local):
            continue
        stand_in = nn.Parameter(torch.empty(own.shape, dtype=own.dtype, device="meta"), requires_grad=own.requires_grad)
        number = record._orig_param_uid
        record._init_sharded_param(stand_in, record.device, None, record.mesh_info)
        record._orig_param_uid = number
        record.sharded_param = own
        record._setattr_on_modules(own)
        record.reset_sharded_param()
        if record.post_forward_mesh_info is not None:
            record._init_sharded_post_forward_param_metadata(stand_in)
        record.all_gather_outputs = []
        record._unsharded_inner_tensors = []
        if hasattr(record, "_unsharded_param"):
            del record._unsharded_param  # made anew at the next pass


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return bool(one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr())
