"""The table of plain module attributes that must stay true to the tensors' shapes.

Lives here: one literal table, and what it says of one module. Does not live here: any writing (modules.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from apoptosis.errors import ShapeError

# module type, tensor, dim, attribute, whether the attribute counts all convolution groups while the dim counts one.
# The first type of a module's method resolution order that has rows is used, so subclasses need no row of their own.
ATTRIBUTES: tuple[tuple[type[nn.Module], str, int, str, bool], ...] = (
    (nn.Linear, "weight", 0, "out_features", False),
    (nn.Linear, "weight", 1, "in_features", False),
    (nn.Bilinear, "weight", 0, "out_features", False),
    (nn.Bilinear, "weight", 1, "in1_features", False),
    (nn.Bilinear, "weight", 2, "in2_features", False),
    (_ConvNd, "weight", 0, "out_channels", False),
    (_ConvNd, "weight", 1, "in_channels", True),
    (_ConvTransposeNd, "weight", 0, "in_channels", False),
    (_ConvTransposeNd, "weight", 1, "out_channels", True),
    (_NormBase, "weight", 0, "num_features", False),
    (_NormBase, "running_mean", 0, "num_features", False),
    (nn.GroupNorm, "weight", 0, "num_channels", False),
    (nn.LayerNorm, "weight", 0, "normalized_shape", False),
    (nn.LayerNorm, "weight", 1, "normalized_shape", False),
    (nn.LayerNorm, "weight", 2, "normalized_shape", False),
    (nn.RMSNorm, "weight", 0, "normalized_shape", False),
    (nn.RMSNorm, "weight", 1, "normalized_shape", False),
    (nn.RMSNorm, "weight", 2, "normalized_shape", False),
    (nn.PReLU, "weight", 0, "num_parameters", False),
    (nn.Embedding, "weight", 0, "num_embeddings", False),
    (nn.Embedding, "weight", 1, "embedding_dim", False),
    (nn.EmbeddingBag, "weight", 0, "num_embeddings", False),
    (nn.EmbeddingBag, "weight", 1, "embedding_dim", False),
)

_TYPES = frozenset(row[0] for row in ATTRIBUTES)


def rows_of(module: nn.Module) -> tuple[tuple[str, int, str, bool], ...]:
    """Look up a module's rows: (tensor, dim, attribute, times groups); none for a type that the table lacks."""
    kind = next((cls for cls in type(module).__mro__ if cls in _TYPES), None)
    return tuple(row[1:] for row in ATTRIBUTES if row[0] is kind)


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Read the attributes that follow tensor shapes, convolution groups included.

    Example:
        >>> attributes_of(nn.Linear(3, 5))
        {'out_features': 5, 'in_features': 3}
    """
    names = [attribute for _, _, attribute, _ in rows_of(module)]
    if isinstance(module, _ConvNd):
        names.append("groups")
    return {name: getattr(module, name) for name in dict.fromkeys(names)}


def attribute_changes(
    module: nn.Module, leaf: str, keep: Mapping[int, Tensor], old_shape: tuple[int, ...]
) -> dict[str, Any]:
    """Say what the module's attributes become when tensor `leaf` keeps these positions.

    Args:
        module: the owner of the tensor.
        leaf: the tensor's name in it.
        keep: dim -> kept positions.
        old_shape: the tensor's shape before.

    Returns: attribute -> new value, for those that change.

    Raises: ShapeError: a grouped convolution whose groups would have different sizes.
    """
    rows = [row for row in rows_of(module) if row[0] == leaf]
    if not rows or not keep:
        return {}
    shape = [keep[dim].numel() if dim in keep else size for dim, size in enumerate(old_shape)]
    changes: dict[str, Any] = {}
    groups = _kept_groups(module, keep, old_shape[0]) if isinstance(module, _ConvNd) else 1
    if isinstance(module, _ConvNd) and groups != module.groups:
        changes["groups"] = groups
    for _, dim, attribute, times_groups in rows:
        if dim not in keep and not (times_groups and "groups" in changes):
            continue
        old: Any = getattr(module, attribute)
        new: Any = shape[dim] * (groups if times_groups else 1)
        if isinstance(old, tuple):
            new = (*old[:dim], new, *old[dim + 1 :])
        if new != old:
            changes[attribute] = new
    return changes


def _kept_groups(module: _ConvNd, keep: Mapping[int, Tensor], num_rows: int) -> int:
    """Convolution groups that are left: whole groups may go, and the rest may be thinned if all alike."""
    if module.groups == 1 or 0 not in keep:
        return module.groups
    block = num_rows // module.groups
    counts = torch.bincount(keep[0].cpu() // block, minlength=module.groups)
    left = counts[counts > 0]
    if not bool((left == left[0]).all()):
        raise ShapeError(f"a convolution with {module.groups} groups would be left with groups of different sizes.")
    return int(left.numel())
