"""A checkpoint's tensors beside those of the model that is to have them.

Holds: the model's tensors by name, whether stored ones can be those of the model after removals, and their new values.
Elsewhere: files (file.py, checkpoint/sharded.py), the rest of a checkpoint (checkpoint/save_load.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from apoptosis.checkpoint.emptied import names_after, read_emptied
from apoptosis.distributed.sharded import is_sharded
from apoptosis.errors import CheckpointError
from apoptosis.modules.emptied import stand_in_of
from apoptosis.surgery.values import memory_format

PREFIX = "model."


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, non-persistent ones too (they may have lost channels); tied ones by their first name."""
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            raise CheckpointError(f"'{name}' has no shape yet: run the model once before.")
    return tensors


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of `tensors_of`."""
    return {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}


def non_persistent(model: nn.Module) -> set[str]:
    """Return the names of buffers that a state_dict leaves out."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }


def check_names(
    model: nn.Module, stored: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> list[tuple[str, Tensor]]:
    """Return (name, the model's tensor) of all that is to be read, or an error that says how the networks differ.

    Args: shapes: of the tensors that were stored, by their names in the checkpoint.
    """
    here = tensors_of(model)
    optional = set(stored["optional"]) | non_persistent(model)
    gone, made = names_after(model, read_emptied(stored.get("emptied")))
    here = {name: tensor for name, tensor in here.items() if name not in gone}
    optional |= made
    missing = [name for name in stored["names"] if name not in here and name not in optional]
    unknown = [name for name in here if name not in set(stored["names"]) and name not in optional]
    if missing or unknown:
        have = f"it has '{missing[0]}', this model has not" if missing else f"this model has '{unknown[0]}', it has not"
        raise CheckpointError(f"it is of another network: {have} ({len(missing) + len(unknown)} names differ).")
    found = []
    for name in stored["names"]:
        shape = tuple(shapes[f"{PREFIX}{name}"])
        if name not in here or (name in optional and not fits(model, name, shape, here[name])):
            continue
        tensor = here[name]
        if not fits(model, name, shape, tensor):
            if _narrower(tuple(tensor.shape), shape, stored["full"].get(name)):
                raise CheckpointError(
                    f"it was saved before channels went that this model has lost: '{name}' has shape {shape} there and "
                    f"{tuple(tensor.shape)} here. Load it into a freshly built model of full width."
                )
            raise CheckpointError(
                f"it is of another network: '{name}' has shape {shape} there and {tuple(tensor.shape)} in "
                "this model, whose widths must be those before any removal."
            )
        full = stored["full"].get(name)
        if full is not None and (len(full) != len(shape) or any(map(int.__lt__, full, shape))):
            raise CheckpointError(f"its manifest is damaged: '{name}' has shape {shape}, and was built with {full}.")
        if full is not None and list(tensor.shape) not in (full, list(shape)):
            raise CheckpointError(
                f"it is of another network: '{name}' was built with shape {tuple(full)}, here {tuple(tensor.shape)}."
            )
        found.append((name, tensor))
    return found


def is_wider(model: nn.Module, stored: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a checkpoint has channels or branches that the model has not.

    Args: stored: the manifest's part of the model, `emptied` unpacked. shapes: as for `check_names`.
    """
    here, emptied = tensors_of(model), stored.get("emptied") or {}
    if any(stand_in_of(module) is not None and name not in emptied for name, module in model.named_modules()):
        return True
    found = [(tuple(shapes[f"{PREFIX}{name}"]), here[name]) for name in stored["names"] if name in here]
    return any(len(s) == t.ndim and any(map(int.__gt__, s, t.shape)) for s, t in found)


def check_tensors(
    model: nn.Module, stored: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of (the model's tensor, its new value), or an error that says how the networks differ."""
    pairs = []
    for name, tensor in check_names(model, stored, {key: value.shape for key, value in tensors.items()}):
        value = tensors[f"{PREFIX}{name}"]
        if (value.is_complex(), value.is_floating_point()) != (tensor.is_complex(), tensor.is_floating_point()):
            raise CheckpointError(f"it is of another network: '{name}' is {value.dtype} there, {tensor.dtype} here.")
        if is_sharded(tensor):
            new = value.to(tensor.dtype)
        else:
            layout = memory_format(tensor)
            new = torch.empty(value.shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout).copy_(value)
        pairs.append((tensor, new))
    return pairs


def _narrower(now: Sequence[int], there: Sequence[int], full: Sequence[int] | None) -> bool:
    """Whether a model is at most as wide as a checkpoint that knows which widths it was built with."""
    if full is None or len(now) != len(there) or len(full) != len(there):
        return False
    return all(a <= b <= c for a, b, c in zip(now, there, full, strict=True))


def fits(model: nn.Module, name: str, shape: Sequence[int], tensor: Tensor) -> bool:
    """Whether a stored shape can be that of the model's tensor after removals: no dim larger, and the same kernels."""
    if len(shape) != tensor.ndim:
        return False
    path, _, leaf = name.rpartition(".")
    kernel = leaf == "weight" and isinstance(model.get_submodule(path), _ConvNd)
    shrinkable = range(2 if kernel else tensor.ndim)
    return all(
        new == old or (0 < new < old and dim in shrinkable)
        for dim, (new, old) in enumerate(zip(shape, tensor.shape, strict=True))
    )
