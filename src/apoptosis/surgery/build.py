"""Reductions become edits of tensors: pure, nothing of the user's is touched.

Holds: how the reductions of one event combine per tensor (`build_edits`). Elsewhere: the edit of one
tensor (builder.py), products of activations (products.py), what an edit makes of a tensor (values.py), the exchange
of values inside modules (transaction.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from apoptosis.errors import ArgumentError, PinnedGroupError, ShapeError
from apoptosis.numerics.mixes import CompactReduction, mix_shape
from apoptosis.records import (
    ColumnFold,
    Group,
    LinearSite,
    Member,
    NormSite,
    OffsetFold,
    ProductSite,
    Reduction,
    Structure,
    TensorEdit,
)
from apoptosis.surgery.builder import (
    EditBuilder,
    check_positions,
    finished,
    first_name,
    is_new,
    note_order,
    removed,
    rows_of_channels,
    unique_columns,
)
from apoptosis.surgery.norms import add_norm
from apoptosis.surgery.products import add_product


def build_edits(
    structure: Structure,
    reductions: Sequence[Reduction],
    dropped_variance: Mapping[str, Tensor] | None = None,
) -> tuple[TensorEdit, ...]:
    """Combine all reductions of one event into one edit per tensor.

    Positions are those of the widths before the event. Columns that different groups own of one weight are disjoint,
    so their folds and offsets add up; a tensor that loses rows to one group and columns to another loses both.
    At a product of activations the right operand's producer is folded, y = sum l_c r_c with l_c = sum_k mix[k, c] l_k
    being sum_k l_k (sum_c mix[k, c] r_c), and an operator that divides by the root of the width is made up for.

    Args:
        structure: the structure that the reductions are for.
        reductions: at most one per group; a reduction that keeps every channel is passed over. Those that keep none
            are for `empty_edits`.
        dropped_variance: site key -> (out,), diag(W R Wᵀ): the variance that the site's outputs lose. Where a BatchNorm
            reads the site, its running variance falls by that much. Sites that lose nothing may be named.

    Returns: the edits, in the order in which tensors are first met.

    Raises:
        ArgumentError: an unknown group, two reductions of one group or of the same channels at two scales (heads).
        PinnedGroupError: a reduction of a pinned group.
        ShapeError: sizes that disagree, a group that would lose every channel or more of one row than of another, an
            offset or a mix that cannot be folded.
    """
    groups = {group.name: group for group in structure.groups}
    drafts: dict[str, EditBuilder] = {}
    seen: set[str] = set()
    scaled: set[str] = set()
    changed: set[str] = set()
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
        for name in changed:
            if name in group.conflicts_with or group.name in groups[name].conflicts_with:
                raise ArgumentError(
                    f"groups '{name}' and '{group.name}' share channels: one event changes one of them."
                )
        changed.add(group.name)
        for member in group.members:
            _add_member(drafts, structure, group, member, reduction)
        for site in group.sites:
            key = site.key
            if key not in reduction.sites:
                raise ShapeError(f"the reduction of group '{group.name}' says nothing about its site '{key}'.")
            match site:
                case NormSite():
                    add_norm(drafts, structure, site, reduction)
                case ProductSite():
                    add_product(drafts, structure, group, site, reduction)
                case LinearSite():
                    _add_site(drafts, structure, group, site, reduction)
                    if key not in scaled and dropped_variance is not None and key in dropped_variance:
                        scaled.add(key)
                        _add_variance(drafts, structure, site, dropped_variance[key])
    return tuple(finished(name, draft, structure.shapes[name]) for name, draft in drafts.items())


def _check_keep(group: Group, reduction: Reduction) -> None:
    if group.pin is not None:
        raise PinnedGroupError(f"group {group.pin}")
    keep, num_channels = reduction.keep, group.num_channels
    who = f"the reduction of group '{group.name}' ({num_channels} channels)"
    if keep.ndim != 1 or keep.numel() == 0:
        raise ShapeError(f"{who} must keep at least one channel: keep has shape {tuple(keep.shape)}.")
    if int(keep.min()) < 0 or int(keep.max()) >= num_channels or bool((keep.diff() <= 0).any()):
        raise ShapeError(f"{who} must keep ascending, different channels below {num_channels}.")
    if group.rows > 1:
        kept = np.bincount(rows_of_channels(group)[keep.cpu().numpy()], minlength=group.rows)
        if bool((kept != kept[0]).any()):
            raise ShapeError(f"{who} must keep equally many of each of its {group.rows} rows, not {kept.tolist()}.")
    expected = (keep.numel(), num_channels)
    shapes = [("merge", tuple(reduction.merge.shape))] if reduction.merge is not None else []
    shapes += [(f"mix at site '{key}'", mix_shape(site)) for key, site in reduction.sites.items()]
    for what, shape in shapes:
        if shape != expected:
            raise ShapeError(f"{who}: {what} has shape {shape} instead of {expected}.")
    for key, site in reduction.sites.items():
        if site.offset is not None and tuple(site.offset.shape) != (num_channels,):
            raise ShapeError(f"{who}: offset at site '{key}' has shape {tuple(site.offset.shape)}.")


def _add_member(
    drafts: dict[str, EditBuilder], structure: Structure, group: Group, member: Member, reduction: Reduction
) -> None:
    name = first_name(structure, member.tensor)
    num_channels = group.num_channels
    size = structure.shapes[name][member.dim]
    check_positions(member.positions, num_channels, size, f"tensor '{name}', dim {member.dim}")
    draft = drafts.setdefault(name, EditBuilder())
    note_order(draft, member.dim, member.positions, reduction.keep, group.rows, size)
    draft.removed.setdefault(member.dim, []).append(member.positions[removed(reduction.keep, num_channels)].reshape(-1))
    if reduction.merge is not None and member.role in ("producer", "bias"):
        draft.merges.setdefault(member.dim, []).append((member.positions, reduction.keep, reduction.merge))


def _add_site(
    drafts: dict[str, EditBuilder], structure: Structure, group: Group, site: LinearSite, made: Reduction
) -> None:
    name, keep, reduction = first_name(structure, site.weight), made.keep, made.sites[site.key]
    num_channels = mix_shape(reduction)[1]
    check_positions(site.columns, num_channels, structure.shapes[name][site.dim], f"site '{site.key}'")
    columns = unique_columns(site.columns)
    draft = drafts.setdefault(name, EditBuilder())
    centred = site.normal is not None and site.normal.centred
    fold = ColumnFold(
        dim=site.dim,
        columns=columns,
        keep=keep,
        mix=reduction.part if isinstance(reduction, CompactReduction) else reduction.mix,
        select=site.select,
        centred=centred,
        plain=isinstance(reduction, CompactReduction),
    )
    if is_new(draft, fold, site):
        draft.folds.append(fold)
        draft.removed.setdefault(site.dim, []).append(columns[removed(keep, num_channels)].reshape(-1))
        note_order(draft, site.dim, columns, keep, group.rows, structure.shapes[name][site.dim])
    if reduction.offset is None or not bool(reduction.offset.count_nonzero()):
        return
    where = _offset_target(structure, site)
    if where is not None:
        target, sign = where
        offset = OffsetFold(
            weight=name, dim=site.dim, columns=columns, offset=reduction.offset, sign=sign, select=site.select
        )
        held = drafts.setdefault(target, EditBuilder()).offsets
        known = ((o.weight, o.dim, o.select) for o in held if np.array_equal(o.columns, columns))
        if (name, site.dim, site.select) not in known:
            held.append(offset)


def _offset_target(structure: Structure, site: LinearSite) -> tuple[str, float] | None:
    """Where a constant at the site's input goes: (tensor, sign), or None where batch statistics absorb it."""
    who = f"site '{site.key}'"
    if site.zero_padded or (site.kind == "conv_transpose" and site.taps > 1):
        raise ShapeError(f"{who}: an offset cannot be folded where positions at the border read fewer taps.")
    if site.functional and site.conv is None:
        _check_functional_offset(structure, site)
    if site.bias is not None:
        return first_name(structure, site.bias), site.factors[0] / site.factors[1]
    if site.norm is None:
        raise ShapeError(f"{who}: an offset has nowhere to go: the module has no bias and no BatchNorm reads it.")
    mean = f"{site.norm}.running_mean"
    mean = structure.aliases.get(mean, mean)
    return (mean, -site.factors[0]) if mean in structure.shapes else None


def _check_functional_offset(structure: Structure, site: LinearSite) -> None:
    """Refuse a slice of a stack unless the biases are stacked alike: else it has none of its own."""
    weight = structure.shapes[first_name(structure, site.weight)]
    num_stacked = len(site.select)
    if len(weight) - num_stacked != 2:
        raise ShapeError(f"site '{site.key}': an offset cannot be folded through a weight of shape {weight}.")
    if site.bias is None or not site.select:
        return
    bias = structure.shapes[first_name(structure, site.bias)]
    leading = sorted(dim for dim, _ in site.select) == list(range(num_stacked))
    if not leading or len(bias) != num_stacked + 1 or bias[:-1] != weight[:num_stacked]:
        raise ShapeError(f"site '{site.key}': an offset has nowhere to go: its slice has no bias of its own.")


def _add_variance(drafts: dict[str, EditBuilder], structure: Structure, site: LinearSite, dropped: Tensor) -> None:
    if site.norm is None:
        return
    name = f"{site.norm}.running_var"
    name = structure.aliases.get(name, name)
    if name not in structure.shapes:
        return
    if tuple(dropped.shape) != structure.shapes[name]:
        raise ShapeError(f"'{name}' has shape {structure.shapes[name]}, the dropped variance {tuple(dropped.shape)}.")
    draft = drafts.setdefault(name, EditBuilder())
    draft.dropped_variance = dropped if draft.dropped_variance is None else draft.dropped_variance + dropped
