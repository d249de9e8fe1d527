"""Widths from the shapes in a state_dict alone.

Holds: whether shapes are those of a model after removals, and what numbers of modules follow from them. Elsewhere: the
record of widths (widths.py), which says all of it where it was kept.

Shapes do not tell everything: of 8 heads of 16 channels, 96 are left as 6 heads or as 12 channels each. What they do
not tell is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from apoptosis.checkpoint.tensors import fits, non_persistent, tensors_of
from apoptosis.errors import CheckpointError, ShapeError
from apoptosis.modules.attention import is_attention
from apoptosis.modules.norms import SHRUNK, eps_name, response_of
from apoptosis.surgery.attributes import attribute_changes, attributes_of, groups_name, tensors_with_rows
from apoptosis.surgery.splits import vocabulary_of

Shapes = Mapping[str, tuple[int, ...]]
_PREFIXES = ("module.", "_orig_mod.")
_KEEP = "Keep apo.widths beside the state_dict, which says it, and give that to set_widths_."


def shapes_for(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that the model saves.

    Args:
        model: at full width.
        state_dict: of the shrunk network.

    Raises: CheckpointError: names or shapes of another network.
    """
    names = list(state_dict)
    while names and (prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in names)), "")):
        state_dict = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
        names = list(state_dict)
    own, optional = tensors_of(model), non_persistent(model)
    needed = [name for name in own if name not in optional]
    every = {*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers(remove_duplicate=False))}
    missing, unknown = (
        [n for n in needed if n not in state_dict],
        [n for n in names if n not in every and not n.endswith("_extra_state")],
    )
    if missing or unknown:
        _refuse_names(model, state_dict, missing, unknown)
    found = {name: tuple(state_dict[name].shape) for name in needed}
    for name, shape in found.items():
        if not fits(model, name, shape, own[name]):
            raise CheckpointError(
                f"'{name}' has shape {shape} in the state_dict and {tuple(own[name].shape)} in this model at full "
                "width: it is of another network."
            )
    return found


def _refuse_names(
    model: nn.Module, state_dict: Mapping[str, Tensor], missing: list[str], unknown: list[str]
) -> NoReturn:
    module = missing[0].rpartition(".")[0] if missing else ""
    if (
        missing
        and not unknown
        and not any(name.startswith(f"{module}.") and name != f"{module}.bias" for name in state_dict)
    ):
        raise CheckpointError(
            f"the state_dict has nothing of '{module}' but perhaps a constant: a branch of the network is empty, and "
            f"shapes do not tell what stands in its place. {_KEEP}"
        )
    have = f"the model has '{missing[0]}', it has not" if missing else f"it has '{unknown[0]}', the model has not"
    raise CheckpointError(f"the state_dict is of another network: {have} ({len(missing) + len(unknown)} names differ).")


def attributes_for(model: nn.Module, shapes: Shapes) -> dict[str, dict[str, Any]]:
    """Say what the attributes of all modules become with these shapes.

    Raises: CheckpointError: shapes that do not tell an attribute, with the module's name.
    """
    new = {id(tensor): shapes.get(name, tuple(tensor.shape)) for name, tensor in tensors_of(model).items()}
    changed = {
        before
        for name, tensor in tensors_of(model).items()
        for before, after in zip(tensor.shape, shapes.get(name, tensor.shape), strict=True)
        if before != after
    }
    found = {}
    for name, module in model.named_modules():
        own = attributes_of(module)
        if math.prod(own.get("unflattened_size", ())) in changed:  # which layer it stands behind is not known here
            _refuse(name, module, "unflattened_size")
        own |= _of_rows(name, module, new)
        own |= _of_vocabulary(name, module, new)
        if own:
            found[name] = own
    return found


def _of_rows(name: str, module: nn.Module, new: Mapping[int, tuple[int, ...]]) -> dict[str, Any]:
    """Return the attributes that follow one tensor's shape."""
    tensors = {leaf: t for leaf, t in tensors_with_rows(module).items() if new.get(id(t), t.shape) != tuple(t.shape)}
    if not tensors:
        return {}
    _check_groups(name, module, new)
    _check_norm(name, module)
    found: dict[str, Any] = {}
    for leaf, tensor in tensors.items():
        sizes = enumerate(zip(tensor.shape, new[id(tensor)], strict=True))
        keep = {dim: torch.arange(after, device="cpu") for dim, (before, after) in sizes if after != before}
        try:
            found |= attribute_changes(module, leaf, keep, tuple(tensor.shape))
        except ShapeError as error:
            raise CheckpointError(f"'{name}' has lost channels: {error} {_KEEP}") from error
    return found


def _check_groups(name: str, module: nn.Module, new: Mapping[int, tuple[int, ...]]) -> None:
    """Refuse modules that have lost channels of several groups, but for convolutions of one input channel each."""
    attribute = groups_name(module)
    if attribute is None or getattr(module, attribute) == 1:
        return
    weight = module._parameters.get("weight")
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd) and weight is not None:
        before, after = tuple(weight.shape), new[id(weight)]
        whole = after[0] % (before[0] // module.groups) == 0
        if before[1] == after[1] == 1 and module.groups == module.in_channels and whole:
            return
    _refuse(name, module, attribute)


def _check_norm(name: str, module: nn.Module) -> None:
    if isinstance(module, _NormBase):
        return
    if type(module) in SHRUNK or eps_name(module) is not None or response_of(module) is not None:
        raise CheckpointError(
            f"'{name}' ({type(module).__name__}) has lost channels, and shapes do not tell what it makes up for. "
            f"{_KEEP}"
        )


def _of_vocabulary(name: str, module: nn.Module, new: Mapping[int, tuple[int, ...]]) -> dict[str, int]:
    """Return numbers of known names that a forward pass may split channels by, where shapes tell them."""
    changed: dict[int, set[int]] = {}
    near = [t for inner in (module, *module.children()) for t in inner._parameters.values() if t is not None]
    for tensor in near:
        for before, after in zip(tensor.shape, new.get(id(tensor), tensor.shape), strict=True):
            if before != after:
                changed.setdefault(before, set()).add(after)
    if not changed:
        return {}
    if is_attention(module):
        _refuse(name, module, "num_heads")
    for leaf in sorted(module._non_persistent_buffers_set):
        buffer = module._buffers.get(leaf)
        if buffer is not None and changed.keys() & set(buffer.shape):
            _refuse(name, module, f"buffer {leaf}, which no state_dict holds,")
    own = vocabulary_of(module)
    heads = {
        key: value for key, value in own.items() if 1 < value < min(changed) and any(c % value == 0 for c in changed)
    }
    if heads:
        _refuse(name, module, next(iter(heads)))
    found = {}
    for key, value in own.items():
        if value in changed:
            if len(changed[value]) > 1:
                _refuse(name, module, key)
            found[key] = next(iter(changed[value]))
    return found


def _refuse(name: str, module: nn.Module, attribute: str) -> NoReturn:
    value = f" ({getattr(module, attribute)})" if hasattr(module, attribute) else ""
    raise CheckpointError(
        f"'{name}' ({type(module).__name__}) has lost channels, and shapes do not tell what its {attribute}{value} has "
        f"become. {_KEEP}"
    )
