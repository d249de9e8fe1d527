"""What an event does at a product of activations: queries times keys, pair by pair.

Holds: the fold into the right operand's producer, the scale of the left one's. Elsewhere: the rows that
both lose, which are members of the group (build.py).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from apoptosis.errors import ShapeError
from apoptosis.records import ColumnFold, Group, ProductSite, Reduction, RowScale, Structure
from apoptosis.surgery.builder import (
    EditBuilder,
    check_positions,
    first_name,
    is_new,
    removed,
    rows_of_channels,
    unique_columns,
)


def add_product(
    drafts: dict[str, EditBuilder], structure: Structure, group: Group, site: ProductSite, reduction: Reduction
) -> None:
    """Fold the right operand's producer and scale the left one's; both lose their rows as members of the group."""
    who, found, keep = f"site '{site.key}'", reduction.sites[site.key], reduction.keep
    if found.offset is not None and bool(found.offset.count_nonzero()):
        raise ShapeError(f"{who}: an offset cannot be folded into a product of activations.")
    mix = found.mix
    row_of = torch.from_numpy(rows_of_channels(group)).to(mix.device)
    if bool(mix[row_of[keep.to(row_of.device)][:, None] != row_of].any()):
        raise ShapeError(f"{who}: its mix blends channels of different rows, which are summed apart.")
    if site.weight:
        fold = ColumnFold(dim=site.dim, columns=unique_columns(site.columns), keep=keep, mix=mix)
        for tensor, dim in ((site.weight, site.dim), *(((site.bias, 0),) if site.bias is not None else ())):
            name = first_name(structure, tensor)
            check_positions(site.columns, group.num_channels, structure.shapes[name][dim], who)
            draft, own = drafts.setdefault(name, EditBuilder()), replace(fold, dim=dim)
            if is_new(draft, own, site):
                draft.folds.append(own)
                draft.taken_over.append((dim, own.columns))
    elif bool(mix[:, torch.from_numpy(removed(keep, group.num_channels)).to(mix.device)].any()):
        raise ShapeError(f"{who}: nothing may be folded into its right operand, so that its mix must drop channels.")
    factor = _rescale(site, keep)
    for tensor, dim, positions in site.rescale if factor != 1.0 else ():
        name = first_name(structure, tensor)
        check_positions(positions, group.num_channels, structure.shapes[name][dim], who)
        _add_scale(
            drafts.setdefault(name, EditBuilder()),
            RowScale(dim=dim, positions=np.unique(positions), factor=factor),
            site,
        )


def _rescale(site: ProductSite, keep: Tensor) -> float:
    """sqrt(k'/k) for an operator that divides by the root of the number of pairs it sums, k before and k' after."""
    num_channels = site.input_columns.shape[0]
    if not site.rescale or not site.per_sum:
        return math.sqrt(keep.numel() / num_channels)
    sums = site.input_columns // site.per_sum
    before = np.bincount(sums.reshape(-1))
    after = np.bincount(sums[keep.cpu().numpy()].reshape(-1), minlength=before.size)[before > 0]
    if bool((before[before > 0] != site.per_sum).any()) or bool((after != after[0]).any()):
        raise ShapeError(
            f"site '{site.key}': its sums run over channels of other groups, or would be of different lengths."
        )
    return math.sqrt(int(after[0]) / site.per_sum)


def _add_scale(draft: EditBuilder, scale: RowScale, site: ProductSite) -> None:
    """Operators that share an operand share its scale, which has to be the same one."""
    for other in draft.scales:
        if other.dim != scale.dim or not np.intersect1d(other.positions, scale.positions).size:
            continue
        if np.array_equal(other.positions, scale.positions) and other.factor == scale.factor:
            return
        raise ShapeError(f"site '{site.key}': its left operand is shared, and would be scaled in two ways.")
    draft.scales.append(scale)
