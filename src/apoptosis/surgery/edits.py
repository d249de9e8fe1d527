"""Reductions become edits of tensors: pure, nothing of the user's is touched.

Lives here: how the reductions of one event combine per tensor (`build_edits`).
Does not live here: what an edit makes of a tensor (values.py), the exchange of values inside modules (modules.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from apoptosis.errors import ArgumentError, PinnedGroupError, ShapeError
from apoptosis.records import (
    ColumnFold,
    Group,
    IntArray,
    Member,
    OffsetFold,
    Reduction,
    Site,
    SiteReduction,
    Structure,
    TensorEdit,
)


@dataclass(slots=True)
class _Draft:
    """One tensor's edit while it is being gathered."""

    removed: dict[int, list[IntArray]] = field(default_factory=dict)
    folds: list[ColumnFold] = field(default_factory=list)
    offsets: list[OffsetFold] = field(default_factory=list)
    dropped_variance: Tensor | None = None
    merges: dict[int, list[tuple[IntArray, Tensor, Tensor]]] = field(default_factory=dict)


def build_edits(
    structure: Structure,
    reductions: Sequence[Reduction],
    dropped_variance: Mapping[str, Tensor] | None = None,
) -> tuple[TensorEdit, ...]:
    """Combine all reductions of one event into one edit per tensor.

    All positions speak of the widths before the event. Columns that different groups own of one weight are disjoint,
    so their folds and offsets add up; a tensor that loses rows to one group and columns to another loses both.

    Args:
        structure: the structure that the reductions speak of.
        reductions: at most one per group; a reduction that keeps every channel is passed over.
        dropped_variance: site key -> (out,), diag(W R Wᵀ): the variance that the site's outputs lose. Where a BatchNorm
            reads the site, its running variance falls by that much. Sites that lose nothing may be named.

    Returns: the edits, in the order in which tensors are first met.

    Raises:
        ArgumentError: an unknown group, two reductions of one group.
        PinnedGroupError: a reduction of a pinned group.
        ShapeError: sizes that disagree, a group that would lose every channel, an offset that cannot be folded.
    """
    groups = {group.name: group for group in structure.groups}
    drafts: dict[str, _Draft] = {}
    seen: set[str] = set()
    scaled: set[str] = set()
    for reduction in reductions:
        group = groups.get(reduction.group)
        if group is None:
            raise ArgumentError(f"no group is called '{reduction.group}'; there are: {', '.join(groups) or 'none'}.")
        if group.name in seen:
            raise ArgumentError(f"group '{group.name}' has two reductions in one event.")
        seen.add(group.name)
        _check_keep(group, reduction)
        if reduction.keep.numel() == group.num_channels:
            continue
        for member in group.members:
            _add_member(drafts, structure, member, reduction)
        for site in group.sites:
            key = site.key
            if key not in reduction.sites:
                raise ShapeError(f"the reduction of group '{group.name}' says nothing about its site '{key}'.")
            _add_site(drafts, structure, site, reduction.keep, reduction.sites[key])
            if key not in scaled and dropped_variance is not None and key in dropped_variance:
                scaled.add(key)
                _add_variance(drafts, structure, site, dropped_variance[key])
    return tuple(_finish(name, draft, structure.shapes[name]) for name, draft in drafts.items())


def _first_name(structure: Structure, name: str) -> str:
    first = structure.aliases.get(name, name)
    if first not in structure.shapes:
        raise ShapeError(f"tensor '{name}' is not part of the captured model.")
    return first


def _check_keep(group: Group, reduction: Reduction) -> None:
    if group.pin is not None:
        raise PinnedGroupError(f"group {group.pin}")
    keep, num_channels = reduction.keep, group.num_channels
    who = f"the reduction of group '{group.name}' ({num_channels} channels)"
    if keep.ndim != 1 or keep.numel() == 0:
        raise ShapeError(f"{who} must keep at least one channel: keep has shape {tuple(keep.shape)}.")
    if int(keep.min()) < 0 or int(keep.max()) >= num_channels or bool((keep.diff() <= 0).any()):
        raise ShapeError(f"{who} must keep ascending, different channels below {num_channels}.")
    expected = (keep.numel(), num_channels)
    matrices = [("merge", reduction.merge)] if reduction.merge is not None else []
    matrices += [(f"mix at site '{key}'", site.mix) for key, site in reduction.sites.items()]
    for what, matrix in matrices:
        if matrix is not None and tuple(matrix.shape) != expected:
            raise ShapeError(f"{who}: {what} has shape {tuple(matrix.shape)} instead of {expected}.")
    for key, site in reduction.sites.items():
        if site.offset is not None and tuple(site.offset.shape) != (num_channels,):
            raise ShapeError(f"{who}: offset at site '{key}' has shape {tuple(site.offset.shape)}.")


def _removed(keep: Tensor, num_channels: int) -> IntArray:
    mask = np.ones(num_channels, dtype=bool)
    mask[keep.cpu().numpy()] = False
    return np.flatnonzero(mask).astype(np.int64)


def _check_positions(positions: IntArray, num_channels: int, size: int, where: str) -> None:
    if positions.ndim != 2 or positions.shape[0] != num_channels:
        raise ShapeError(f"{where}: positions of shape {positions.shape} for {num_channels} channels.")
    if positions.size and (int(positions.min()) < 0 or int(positions.max()) >= size):
        raise ShapeError(f"{where}: positions outside its {size} entries.")


def _add_member(drafts: dict[str, _Draft], structure: Structure, member: Member, reduction: Reduction) -> None:
    name = _first_name(structure, member.tensor)
    num_channels = next(g.num_channels for g in structure.groups if g.name == reduction.group)
    size = structure.shapes[name][member.dim]
    _check_positions(member.positions, num_channels, size, f"tensor '{name}', dim {member.dim}")
    draft = drafts.setdefault(name, _Draft())
    draft.removed.setdefault(member.dim, []).append(
        member.positions[_removed(reduction.keep, num_channels)].reshape(-1)
    )
    if reduction.merge is not None and member.role in ("producer", "bias"):
        draft.merges.setdefault(member.dim, []).append((member.positions, reduction.keep, reduction.merge))


def _unique_columns(columns: IntArray) -> IntArray:
    """Drop repeats: with grouped convolutions one weight column may stand for several input positions."""
    unique: list[IntArray] = []
    for column in columns.T:
        if not any(np.array_equal(column, other) for other in unique):
            unique.append(column)
    stacked = np.stack(unique, axis=1)
    if np.unique(stacked).size != stacked.size:
        raise ShapeError("a column of a consumer weight belongs to two channels.")
    return stacked


def _add_site(
    drafts: dict[str, _Draft], structure: Structure, site: Site, keep: Tensor, reduction: SiteReduction
) -> None:
    name = _first_name(structure, site.weight)
    num_channels = reduction.mix.shape[1]
    _check_positions(site.columns, num_channels, structure.shapes[name][site.dim], f"site '{site.key}'")
    columns = _unique_columns(site.columns)
    draft = drafts.setdefault(name, _Draft())
    fold = ColumnFold(dim=site.dim, columns=columns, keep=keep, mix=reduction.mix)
    if _is_new(draft, fold, site):
        draft.folds.append(fold)
        draft.removed.setdefault(site.dim, []).append(columns[_removed(keep, num_channels)].reshape(-1))
    if reduction.offset is None or not bool(reduction.offset.count_nonzero()):
        return
    where = _offset_target(structure, site)
    if where is not None:
        target, sign = where
        offset = OffsetFold(weight=name, dim=site.dim, columns=columns, offset=reduction.offset, sign=sign)
        held = drafts.setdefault(target, _Draft()).offsets
        if not any(o.weight == name and o.dim == site.dim and np.array_equal(o.columns, columns) for o in held):
            held.append(offset)


def _is_new(draft: _Draft, fold: ColumnFold, site: Site) -> bool:
    """Whether the fold is the first of its columns; modules that share a weight must agree on how it is folded."""
    for other in draft.folds:
        if other.dim != fold.dim or not np.intersect1d(other.columns, fold.columns).size:
            continue
        if np.array_equal(other.columns, fold.columns) and torch.equal(other.mix, fold.mix):
            return False
        raise ShapeError(f"site '{site.key}': its weight is shared, and its columns are folded in two ways.")
    return True


def _offset_target(structure: Structure, site: Site) -> tuple[str, float] | None:
    """Where a constant at the site's input goes: (tensor, sign), or None where batch statistics absorb it."""
    who = f"site '{site.key}'"
    if site.zero_padded or (site.kind == "conv_transpose" and site.taps > 1):
        raise ShapeError(f"{who}: an offset cannot be folded where positions at the border read fewer taps.")
    if site.bias is not None:
        return _first_name(structure, site.bias), 1.0
    if site.norm is None:
        raise ShapeError(f"{who}: an offset has nowhere to go: the module has no bias and no BatchNorm reads it.")
    mean = f"{site.norm}.running_mean"
    mean = structure.aliases.get(mean, mean)
    return (mean, -1.0) if mean in structure.shapes else None


def _add_variance(drafts: dict[str, _Draft], structure: Structure, site: Site, dropped: Tensor) -> None:
    if site.norm is None:
        return
    name = f"{site.norm}.running_var"
    name = structure.aliases.get(name, name)
    if name not in structure.shapes:
        return
    if tuple(dropped.shape) != structure.shapes[name]:
        raise ShapeError(f"'{name}' has shape {structure.shapes[name]}, the dropped variance {tuple(dropped.shape)}.")
    draft = drafts.setdefault(name, _Draft())
    draft.dropped_variance = dropped if draft.dropped_variance is None else draft.dropped_variance + dropped


def _finish(name: str, draft: _Draft, shape: tuple[int, ...]) -> TensorEdit:
    keep: dict[int, Tensor] = {}
    for dim, removed in draft.removed.items():
        mask = np.ones(shape[dim], dtype=bool)
        mask[np.concatenate(removed)] = False
        if not mask.any():
            raise ShapeError(f"tensor '{name}' would lose every entry along dim {dim}.")
        if not mask.all():
            keep[dim] = torch.from_numpy(np.flatnonzero(mask))
    merge = {dim: _merge_matrix(shape[dim], keep[dim], parts) for dim, parts in draft.merges.items() if dim in keep}
    return TensorEdit(
        tensor=name,
        keep=keep,
        folds=tuple(draft.folds),
        offsets=tuple(draft.offsets),
        dropped_variance=draft.dropped_variance,
        merge=merge,
    )


def _merge_matrix(size: int, keep: Tensor, parts: Sequence[tuple[IntArray, Tensor, Tensor]]) -> Tensor:
    matrix = torch.eye(size, dtype=torch.float64)
    for positions, kept, merge in parts:
        index = torch.from_numpy(positions)
        for position in index.T:
            matrix[position[kept.cpu()][:, None], position[None, :]] = merge.double().cpu()
    return matrix[keep]
