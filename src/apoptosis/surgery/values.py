"""What an edit makes of a tensor, of a second moment and of a first moment: pure functions of tensors.

Holds: `apply_edit`, `slice_like`, `merge_like`. Elsewhere: how edits come about (build.py), where the
values go (transaction.py) and which rule an optimizer's state follows (optimizers.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from apoptosis.errors import ShapeError
from apoptosis.numerics.decompose import complement, stands_for_itself
from apoptosis.records import ColumnFold, OffsetFold, RowScale, TensorEdit

_ROWS = 256  # of a tensor that are folded in float64 at once
VARIANCE_FLOOR = 1e-3
"""Smallest ratio by which one event may scale a running variance: it stays positive whatever the estimate says."""


def apply_edit(edit: TensorEdit, old: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Compute a tensor after its edit: offsets, dropped variance, folds, scales, then the slice.

    Offsets come before folds: a bias whose rows are folded into one another (a product's right operand) takes the
    offsets of what its layer reads along. All is computed in float64 and cast back; what nothing touches stays bitwise.

    Args:
        edit: the edit.
        old: the tensor before, of the shape that the edit is for.
        tensors: name -> tensor before the event, for the weights that the edit's offsets name.

    Returns: a new tensor in the dtype, on the device and in the memory format of `old`, without gradient history.

    Raises: ShapeError: the edit does not fit the tensor.

    Example:
        >>> import numpy as np
        >>> mix = torch.tensor([[3.0, 1.0]])
        >>> fold = ColumnFold(dim=1, columns=np.array([[0], [1]]), keep=torch.tensor([1]), mix=mix)
        >>> edit = TensorEdit(tensor="w", keep={1: torch.tensor([1])}, folds=(fold,))
        >>> apply_edit(edit, torch.tensor([[1.0, 2.0], [10.0, 20.0]]), {})
        tensor([[ 5.],
                [50.]])
    """
    _check_fits(edit, old)
    with torch.no_grad():
        value, todo = old.detach(), dict(edit.keep)
        if edit.offsets or edit.dropped_variance is not None:
            value = _shifted(edit, value, tensors)
        elif edit.folds or edit.scales:
            busy = {fold.dim for fold in edit.folds} | {scale.dim for scale in edit.scales}
            busy |= {dim for fold in edit.folds for dim, _ in fold.select}
            # what goes along the other dims need not be folded first
            value = _sliced(value, {dim: todo.pop(dim) for dim in edit.keep if dim not in busy}, old)
        if any(fold.centred for fold in edit.folds):
            value -= value.double().mean(tuple(range(1, value.ndim)), keepdim=True).to(value.dtype)
        for fold in edit.folds:
            _fold_(value, fold)
        for scale in edit.scales:
            _scale_(value, scale)
        return _sliced(value.to(old.dtype), todo, old)


def slice_like(edit: TensorEdit, tensor: Tensor) -> Tensor:
    """Slice a tensor of the edited tensor's shape: second moments, step sizes, consumers' momenta.

    Returns: a new tensor in the memory format of `tensor`. Raises: ShapeError: the edit does not fit the tensor.
    """
    _check_fits(edit, tensor)
    with torch.no_grad():
        return _sliced(tensor.detach(), edit.keep, tensor)


def merge_like(edit: TensorEdit, tensor: Tensor) -> Tensor:
    """Compute a first moment or gradient after the edit: by the chain rule m'_k = sum_j merge[k, j] m_j, else sliced.

    Factors that gradients follow divide them. Sparse gradients are sliced.

    Returns: a new tensor in the memory format of `tensor`.

    Raises: ShapeError: the edit does not fit the tensor.
    """
    _check_fits(edit, tensor)
    if not tensor.is_sparse:
        tensor = unscaled(edit, tensor)
    if not edit.merge or tensor.is_sparse:
        return slice_like(edit, tensor)
    with torch.no_grad():
        value = tensor.detach()
        for dim, matrix in edit.merge.items():
            wide = _wide(value.movedim(dim, -1))
            wide = wide @ matrix.to(wide).T
            value = wide.movedim(-1, dim).to(tensor.dtype)
        return _sliced(value, {dim: keep for dim, keep in edit.keep.items() if dim not in edit.merge}, tensor)


def unscaled(edit: TensorEdit, tensor: Tensor, power: int = 1) -> Tensor:
    """Divide by the factors that gradients follow, to a power: 1 for gradients, 2 for their squares.

    Returns: a new tensor, or the tensor itself where nothing is scaled.
    """
    scales = [scale for scale in edit.scales if scale.follow]
    if not scales:
        return tensor
    value = tensor.detach().clone()
    for scale in scales:
        _scale_(value, scale, divide_by_power=power)
    return value


def _scale_(value: Tensor, scale: RowScale, *, divide_by_power: int = 0) -> None:
    """Multiply the positions of a scale by its factor in place, or divide them by a power of it."""
    along, positions = value.movedim(scale.dim, -1), torch.from_numpy(scale.positions.reshape(-1)).to(value.device)
    factor, wide = torch.as_tensor(scale.factor, dtype=torch.float64, device=value.device), _wide(along[..., positions])
    along[..., positions] = (wide / factor**divide_by_power if divide_by_power else wide * factor).to(value.dtype)


def _check_fits(edit: TensorEdit, tensor: Tensor) -> None:
    needed = [(dim, int(keep.max())) for dim, keep in edit.keep.items()]
    needed += [(fold.dim, int(fold.columns.max())) for fold in edit.folds]
    needed += [place for fold in edit.folds for place in fold.select]
    needed += [(scale.dim, int(scale.positions.max())) for scale in edit.scales]
    for dim, last in needed:
        if dim >= tensor.ndim or last >= tensor.shape[dim]:
            raise ShapeError(f"the edit of '{edit.tensor}' does not fit a tensor of shape {tuple(tensor.shape)}.")


def _shifted(edit: TensorEdit, old: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Add the offsets and take off the dropped variance, in a float64 copy."""
    wide = old.to(torch.float64, copy=True)
    for offset in edit.offsets:
        target, _ = _selected(wide, 0, offset.select)
        target += offset.sign * offset_delta(offset, tensors[offset.weight].detach(), target.numel())
    if edit.dropped_variance is not None:
        dropped = edit.dropped_variance.to(wide.device).double()  # negative where the outputs vary more
        wide = torch.maximum(wide - dropped, VARIANCE_FLOOR * wide)
    return wide


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def _selected(tensor: Tensor, dim: int, select: Sequence[tuple[int, int]]) -> tuple[Tensor, int]:
    """Return the slice as a view, and what `dim` is called in it."""
    for axis, index in sorted(select, reverse=True):
        tensor = tensor.select(axis, index)
    return tensor, dim - sum(axis < dim for axis, _ in select)


def _fold_(value: Tensor, fold: ColumnFold) -> None:
    """Write W[.., columns[keep]] = W[.., columns] mixᵀ into `value`; touches the kept columns only."""
    device = value.device
    value, dim = _selected(value, fold.dim, fold.select)
    along = value.movedim(dim, -1)
    columns = torch.from_numpy(fold.columns).to(device)
    keep, mix = fold.keep.to(device), fold.mix.to(device).double()
    taps = columns.shape[1]
    targets = columns[keep].T.reshape(-1)
    # the usual case: what is kept passes through as it is, so only the removed columns are multiplied
    plain = fold.plain or stands_for_itself(mix, keep)
    sources = complement(keep, columns.shape[0]) if plain else torch.arange(columns.shape[0], device=device)
    mix = mix if fold.plain or not plain else mix[:, sources]
    read_at = columns[sources].T.reshape(-1)
    for part in torch.split(along, _ROWS) if along.dim() > 1 else (along,):
        read = _wide(part[..., read_at])
        new = (read.reshape(*read.shape[:-1], taps, sources.numel()) @ mix.to(read).T).flatten(-2)
        if plain:
            new += _wide(part[..., targets])
        part[..., targets] = new.to(value.dtype)


def offset_delta(fold: OffsetFold, weight: Tensor, num_outputs: int) -> Tensor:
    """W @ offset summed over taps, (out,) float64; convolution groups of a transposed weight stay apart."""
    weight, dim = _selected(weight, fold.dim, fold.select)
    wide = weight.flatten(2).sum(-1, dtype=torch.float64) if weight.ndim > 2 else weight
    vector = torch.zeros(wide.shape[dim], dtype=torch.float64, device=weight.device)
    columns = torch.from_numpy(fold.columns).to(weight.device)
    vector[columns] = fold.offset.to(weight.device).double()[:, None].expand(columns.shape)
    if dim == 1:
        delta = torch.cat([part.double() @ vector for part in torch.split(wide, _ROWS)])
    else:
        num_groups = num_outputs // wide.shape[1]
        delta = (wide.double() * vector[:, None]).reshape(num_groups, -1, wide.shape[1]).sum(1).flatten()
    if delta.numel() != num_outputs:
        raise ShapeError(f"an offset through '{fold.weight}' has {delta.numel()} outputs, its target {num_outputs}.")
    return delta


def _sliced(value: Tensor, keep: Mapping[int, Tensor], like: Tensor) -> Tensor:
    """Make a new tensor of the kept positions along every dim, laid out like `like`."""
    if not any(index.numel() < value.shape[dim] for dim, index in keep.items()):
        return value.clone() if value.is_sparse else value.clone(memory_format=memory_format(like))
    for dim, index in sorted(keep.items()):  # rows first: columns of a smaller tensor are quicker to gather
        value = value.index_select(dim, index.to(value.device))
    return value if value.is_sparse else value.contiguous(memory_format=memory_format(like))


def memory_format(tensor: Tensor) -> torch.memory_format:
    """Choose the memory format of a tensor's successor: channels-last where the tensor is that alone."""
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if tensor.ndim == 5 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format
