"""A checkpoint's module attributes beside the modules that are to have them.

Holds: whether stored attributes can be those of a module after removals, and what is to be set.
Elsewhere: which attributes there are (attributes.py, attention.py, norms.py), and the tensors (checkpoint/tensors.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from apoptosis.errors import CheckpointError, ShapeError
from apoptosis.modules.attention import ShrunkMultiheadAttention, shrunk_attributes
from apoptosis.modules.norms import gain_of
from apoptosis.surgery.attributes import Row, attributes_of, groups_name, rows_of, tensors_with_rows
from apoptosis.surgery.norms import shrunk_norm
from apoptosis.surgery.numbers import stored_numbers
from apoptosis.surgery.splits import VOCABULARY

Change = tuple[nn.Module, str, Any]


def check_attributes(
    model: nn.Module, stored: Mapping[str, Mapping[str, Any]], pairs: Sequence[tuple[Tensor, Tensor]]
) -> list[Change]:
    """Return (module, attribute, value) of all that is to be set.

    Args:
        model: as built, or as shrunk as the stored one.
        stored: module name -> attribute -> value.
        pairs: the model's tensors with their new values, whose shapes the attributes have to agree with.

    Raises: CheckpointError: attributes of another network, or that contradict the shapes.
    """
    modules = dict(model.named_modules())
    shapes = {id(tensor): tuple(value.shape) for tensor, value in pairs}
    changes: list[Change] = []
    for name, attributes in stored.items():
        module = modules.get(name)
        own = {} if module is None else attributes_of(module)
        if module is not None and "__class__" in attributes:
            changes += _exchanged_class(name, module, attributes, shapes)
            continue
        numbers = {} if module is None else stored_numbers(module, attributes)
        changes += [(module, key, value) for key, value in numbers.items() if module is not None]
        for attribute, value in attributes.items():
            if attribute in numbers:
                continue
            if module is not None and attribute in VOCABULARY and attribute not in own:
                continue  # set by a forward pass, which has not run here
            if module is None or attribute not in own or type(own[attribute]) is not type(value):
                raise CheckpointError(f"it is of another network: module '{name}' has no attribute '{attribute}' here.")
            if value != own[attribute]:
                changes.append((module, attribute, value))
    for name, module in modules.items():
        if "__class__" not in stored.get(name, {}):
            _check_values(name, module, stored.get(name, {}), shapes)
    return changes


def _check_values(
    name: str, module: nn.Module, stored: Mapping[str, Any], shapes: Mapping[int, tuple[int, ...]]
) -> None:
    """Check that stored attributes are possible: none grows or comes to nothing, and all agree with the tensors."""
    own, numbers = attributes_of(module), stored_numbers(module, stored)
    values = {**own, **{key: value for key, value in stored.items() if key in own}}
    for key, value in values.items():
        if key not in numbers and value != own[key] and not _possible(value, own[key]):
            raise CheckpointError(f"module '{name}' cannot have {key} = {str(value)[:40]}, it has {own[key]} here.")
    parts = groups_name(module)
    groups = 1 if parts is None else values[parts]
    found = tensors_with_rows(module)
    for row in rows_of(module):
        tensor = found.get(row.tensor)
        if row.attribute not in values or tensor is None or row.dim >= tensor.ndim:
            continue
        old, new = tuple(tensor.shape), shapes.get(id(tensor), tuple(tensor.shape))
        if not _agrees(row, old, new, own[row.attribute], values[row.attribute], groups):
            raise CheckpointError(
                f"module '{name}' cannot have {row.attribute} = {str(values[row.attribute])[:40]} with a {row.tensor} "
                f"of shape {new}."
            )
    tensors = [tensor for tensor in module._parameters.values() if tensor is not None]
    after = [shapes.get(id(tensor), tuple(tensor.shape)) for tensor in tensors]
    if any(shape[0] % groups for shape in after if shape):
        raise CheckpointError(f"module '{name}' cannot have {parts} = {groups} with {after[0][0]} channels.")
    if isinstance(module, nn.MultiheadAttention) and after != [tuple(tensor.shape) for tensor in tensors]:
        raise CheckpointError(f"the attributes of module '{name}' are missing, whose tensors have lost channels.")


def _possible(value: Any, own: Any) -> bool:
    """Whether an attribute that changes may change to this: sizes fall and stay above 0, other numbers are finite."""
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return bool(0 < value < own)
    if isinstance(value, float):
        return math.isfinite(value) and value >= 0
    if isinstance(value, tuple):
        return len(value) == len(own) and all(
            type(new) is type(old) and (new == old or _possible(new, old)) for new, old in zip(value, own, strict=True)
        )
    return False


def _agrees(row: Row, old: tuple[int, ...], new: tuple[int, ...], own: Any, value: Any, groups: int) -> bool:
    """Whether an attribute is to the new size of a dim what it was to the old one."""
    if len(new) != len(old):
        return True  # a tensor of another layout is checked where it gets that
    before, after = old[row.dim], new[row.dim]
    if row.times_groups:
        return own == value if before == after and own == value else bool(value == after * groups)
    if isinstance(own, tuple):
        return row.dim >= len(own) or bool(value[row.dim] * before == own[row.dim] * after)
    return bool(value * before == own * after)


def _exchanged_class(
    name: str, module: nn.Module, stored: Mapping[str, Any], shapes: Mapping[int, tuple[int, ...]]
) -> list[Change]:
    """Say what makes an nn.MultiheadAttention or a norm the narrowed one that was saved.

    A checkpoint names a class, but never chooses one: only these are restored, each in the place of its own.
    """
    try:
        norm = shrunk_norm(module, stored, {row.attribute for row in rows_of(module)})
    except ShapeError as error:
        raise CheckpointError(f"module '{name}': {error}") from error
    if norm is not None:
        weight, width = gain_of(module), tuple(norm["mean_weights"].shape)
        shape = () if weight is None else shapes.get(id(weight), tuple(weight.shape))
        if weight is not None and math.prod(shape) != math.prod(width):
            raise CheckpointError(f"module '{name}' cannot be a norm over {width}: its weight has another shape.")
        return [(module, key, value) for key, value in norm.items()]
    if stored["__class__"] != ShrunkMultiheadAttention.__name__ or not isinstance(module, nn.MultiheadAttention):
        there = str(stored["__class__"])[:80]
        raise CheckpointError(f"it is of another network: '{name}' is {there} there and {type(module).__name__} here.")
    try:
        known = shrunk_attributes(module)
    except ShapeError as error:
        raise CheckpointError(f"it is of another network: module '{name}': {error}") from error
    odd = [key for key, value in stored.items() if key != "__class__" and type(known.get(key)) is not type(value)]
    if odd or len(stored) < len(known) or not _attention_fits(module, stored, shapes):
        raise CheckpointError(f"the attributes of module '{name}' are damaged.")
    return [(module, key, known[key] if key == "__class__" else value) for key, value in stored.items()]


def _attention_fits(module: nn.MultiheadAttention, stored: Mapping[str, Any], shapes: Mapping[int, Any]) -> bool:
    """Whether the widths of a narrowed attention are those of its projections."""
    heads, queries, values = stored["num_heads"], stored["query_width"], stored["value_width"]
    scale, positive = stored["head_scale"], (stored[key] for key in ("embed_dim", "kdim", "vdim", "head_dim"))
    if not (math.isfinite(scale) and scale > 0 and min(heads, queries, values, *positive) > 0):
        return False

    def shape(name: str) -> tuple[int, ...]:
        tensor = module._parameters[name]
        return () if tensor is None else tuple(shapes.get(id(tensor), tuple(tensor.shape)))

    packed = shape("in_proj_weight")
    if packed:
        rows = packed[0] == 2 * queries + values and packed[1] == stored["embed_dim"]
    else:
        q, k, v = (shape(f"{x}_proj_weight") for x in "qkv")
        rows = (q[0], k[0], v[0]) == (queries, queries, values)
        rows = rows and (q[1], k[1], v[1]) == (stored["embed_dim"], stored["kdim"], stored["vdim"])
    out = module.out_proj.weight
    columns = tuple(shapes.get(id(out), tuple(out.shape)))[1]
    return bool(rows and columns == values and queries % heads == 0 and values % heads == 0)
