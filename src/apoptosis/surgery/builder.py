"""Builds the edit of one tensor, group by group.

Holds: the builder, checks that its parts agree, and the finished edit. Elsewhere: which parts a reduction has
(build.py, products.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from apoptosis.errors import ShapeError
from apoptosis.records import ColumnFold, Group, IntArray, OffsetFold, RowScale, Site, Structure, TensorEdit


@dataclass(slots=True)
class EditBuilder:
    """One tensor's edit while it is being gathered."""

    removed: dict[int, list[IntArray]] = field(default_factory=dict)
    folds: list[ColumnFold] = field(default_factory=list)
    offsets: list[OffsetFold] = field(default_factory=list)
    scales: list[RowScale] = field(default_factory=list)
    taken_over: list[tuple[int, IntArray]] = field(default_factory=list)  # (dim, positions): rows folded at a product
    dropped_variance: Tensor | None = None
    merges: dict[int, list[tuple[IntArray, Tensor, Tensor]]] = field(default_factory=dict)
    order: dict[int, IntArray] = field(default_factory=dict)  # dim -> what kept positions are sorted by


def first_name(structure: Structure, name: str) -> str:
    """Return the name that a tied tensor goes by. Raises: ShapeError: the capture did not meet it."""
    first = structure.aliases.get(name, name)
    if first not in structure.shapes:
        raise ShapeError(f"tensor '{name}' is not part of the captured model.")
    return first


def rows_of_channels(group: Group) -> IntArray:
    """Row of every channel."""
    if group.num_channels % group.rows:
        raise ShapeError(f"group '{group.name}': {group.num_channels} channels in {group.rows} rows of equal length.")
    return np.arange(group.num_channels, dtype=np.int64) // (group.num_channels // group.rows)


def removed(keep: Tensor, num_channels: int) -> IntArray:
    """List the channels that are not kept."""
    mask = np.ones(num_channels, dtype=bool)
    mask[keep.cpu().numpy()] = False
    return np.flatnonzero(mask).astype(np.int64)


def note_order(draft: EditBuilder, dim: int, positions: IntArray, keep: Tensor, rows: int, size: int) -> None:
    """Note where kept channels of a group of several rows will stand along an axis of `size` entries.

    A shuffle lays the rows out in turn (a0 b0 a1 b1 ...): the first kept channel of every row comes first then, from
    whatever place of its row. The i-th kept channel of a row stands where the row's i-th channel stood.
    """
    if rows > 1:
        length = positions.shape[0] // rows
        kept = keep.cpu().numpy()
        first = np.arange(positions.shape[0]).reshape(rows, length)[:, : kept.size // rows].reshape(-1)
        draft.order.setdefault(dim, np.arange(size))[positions[kept]] = positions[first]


def check_positions(positions: IntArray, num_channels: int, size: int, where: str) -> None:
    """Refuse positions that are not one row per channel, or outside an axis of `size` entries, with a ShapeError."""
    if positions.ndim != 2 or positions.shape[0] != num_channels:
        raise ShapeError(f"{where}: positions of shape {positions.shape} for {num_channels} channels.")
    if positions.size and (int(positions.min()) < 0 or int(positions.max()) >= size):
        raise ShapeError(f"{where}: positions outside its {size} entries.")


def unique_columns(columns: IntArray) -> IntArray:
    """Drop repeats: with grouped convolutions one weight column may stand for several input positions."""
    unique: list[IntArray] = []
    for column in columns.T:
        if not any(np.array_equal(column, other) for other in unique):
            unique.append(column)
    stacked = np.stack(unique, axis=1)
    if np.unique(stacked).size != stacked.size:
        raise ShapeError("a column of a consumer weight belongs to two channels.")
    return stacked


def is_new(draft: EditBuilder, fold: ColumnFold, site: Site) -> bool:
    """Whether the fold is the first of its columns; modules that share a weight must agree on how it is folded."""
    for other in draft.folds:
        if other.dim != fold.dim or not np.intersect1d(other.columns, fold.columns).size:
            continue
        mine = dict(fold.select)
        if any(index != mine.get(dim, index) for dim, index in other.select):
            continue  # another slice
        alike = other.select == fold.select and np.array_equal(other.columns, fold.columns)
        if alike and torch.equal(other.mix, fold.mix):
            return False
        raise ShapeError(f"site '{site.key}': its weight is shared, and its columns are folded in two ways.")
    return True


def finished(name: str, draft: EditBuilder, shape: tuple[int, ...]) -> TensorEdit:
    """Return the edit of a tensor of this shape. Raises: ShapeError: nothing would be left of it."""
    keep: dict[int, Tensor] = {}
    for dim, gone in draft.removed.items():
        mask = np.ones(shape[dim], dtype=bool)
        mask[np.concatenate(gone)] = False
        if not mask.any():
            raise ShapeError(f"tensor '{name}' would lose every entry along dim {dim}.")
        if not mask.all():
            kept = np.flatnonzero(mask)
            if dim in draft.order:
                kept = kept[np.argsort(draft.order[dim][kept], kind="stable")]
            keep[dim] = torch.from_numpy(kept)
    merge = {
        dim: _merge_matrix(shape[dim], keep[dim], parts, [taken for along, taken in draft.taken_over if along == dim])
        for dim, parts in draft.merges.items()
        if dim in keep
    }
    return TensorEdit(
        tensor=name,
        keep=keep,
        folds=tuple(draft.folds),
        offsets=tuple(draft.offsets),
        scales=tuple(draft.scales),
        dropped_variance=draft.dropped_variance,
        merge=merge,
    )


def _merge_matrix(
    size: int, keep: Tensor, parts: Sequence[tuple[IntArray, Tensor, Tensor]], taken_over: Sequence[IntArray]
) -> Tensor:
    """Chain rule of the kept positions. Rows that are folded as a consumer's columns are keep their own gradient."""
    matrix = torch.eye(size, dtype=torch.float64, device="cpu")
    taken = np.concatenate([positions.reshape(-1) for positions in taken_over]) if taken_over else None
    for positions, kept, merge in parts:
        for position in positions.T:
            if taken is not None and bool(np.isin(position, taken).any()):
                continue
            index = torch.from_numpy(position)
            matrix[index[kept.cpu()][:, None], index[None, :]] = merge.double().cpu()
    return matrix[keep]
