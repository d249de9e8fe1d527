"""What an event does to parameters and buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from apoptosis.records.calls import IntArray
from apoptosis.records.structure import FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ColumnFold:
    """Along `dim`, columns of removed channels are added to the kept ones: W'[.., columns[keep]] = W[.., columns] mixᵀ.

    columns: (channels, P); keep: (kept,); mix: (kept, channels). Applied before the slice of TensorEdit.keep.
    plain: every kept channel is reproduced by itself alone; mix has the columns of the removed ones, (kept, removed).
    select: (dim, index) pairs: only this slice of the tensor is folded; () for all of it.
    centred: the mean of each row of W (dim 0) is subtracted first, as the normalisation of the rows does anyway.
    """

    dim: int
    columns: IntArray
    keep: Tensor
    mix: Tensor
    select: tuple[tuple[int, int], ...] = ()
    centred: bool = False
    plain: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OffsetFold:
    """b' = b + sign * sum over columns and taps of W[:, column(c)] offset[c], with W the weight *before* its folds.

    weight, dim, columns: as in Site; offset: (channels,). sign: +1 for a bias, -1 for a BatchNorm running mean.
    select: (dim, index) pairs of W and b, leading dims alone: only that slice of W is read and of b written (one expert
    of a stack, whose biases are stacked alike); () for all of it.
    """

    weight: str
    dim: int
    columns: IntArray
    offset: Tensor
    sign: float = 1.0
    select: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowScale:
    """Along `dim`, the entries at `positions` (any shape, without repeats) are multiplied by `factor`, one or one each.

    follow: gradients, and the optimizer's averages of them, are divided by it.
    """

    dim: int
    positions: IntArray
    factor: float | FloatArray
    follow: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorEdit:
    """Everything that happens to one parameter or buffer in an event; applies unchanged to an averaged copy.

    Order: offsets, column folds and scales, each on the old shape, then the slice `keep` (dim -> kept positions).
    `dropped_variance` (old size): what the variance of a site's outputs loses, subtracted from the running variance.
    `merge`: first moments along (dim): (positions kept, positions) matrix, else sliced.
    """

    tensor: str
    keep: Mapping[int, Tensor]
    folds: tuple[ColumnFold, ...] = ()
    offsets: tuple[OffsetFold, ...] = ()
    scales: tuple[RowScale, ...] = ()
    dropped_variance: Tensor | None = None
    merge: Mapping[int, Tensor] = field(default_factory=dict)
