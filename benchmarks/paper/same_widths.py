"""The widths that apoptosis found, cut from the untrained or pretrained network at once, by the norms of its channels.

Holds: which channels are kept, and the smaller tensors. Elsewhere: training.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import apoptosis
from apoptosis.graph import analyse
from apoptosis.records import Group, ProductSite

Axis = tuple[str, int]  # a tensor and one of its axes
Alive = dict[Axis, np.ndarray[Any, Any]]  # which of its positions are kept


def cut_to(build: Any, shrunk: nn.Module, example: Any, heads: Mapping[str, int]) -> nn.Module:
    """Return the network that `build` makes, at the widths of `shrunk`: the channels of largest norm, as they are.

    Args: heads: how many are left, by the name of their group; all where it is missing.

    Raises: ValueError: the widths cannot be told from the groups; the tensor is named.
    """
    model, full = build(), build()
    with tempfile.TemporaryDirectory() as folder:
        apoptosis.save(Path(folder) / "found.safetensors", shrunk)
        apoptosis.load(Path(folder) / "found.safetensors", model)  # its values go, its widths are what is asked for
    structure = analyse(full, *(((), example) if isinstance(example, dict) else ((example,), {})))
    wide, narrow = ({**dict(net.named_parameters()), **dict(net.named_buffers())} for net in (full, model))
    alive: Alive = {(name, dim): np.ones(size, bool) for name, t in wide.items() for dim, size in enumerate(t.shape)}
    whole = [group for group in structure.open_groups if group.name.endswith(":heads")]
    for group in (*whole, *(group for group in structure.open_groups if group not in whole)):
        _choose(group, alive, wide, narrow, heads.get(group.name, group.num_channels) if group in whole else None)
    with torch.no_grad():
        for name, tensor in narrow.items():
            kept = wide[name]
            for dim in range(kept.dim()):
                kept = kept.index_select(dim, torch.from_numpy(np.flatnonzero(alive[name, dim])))
            if kept.shape != tensor.shape:
                raise ValueError(f"'{name}' is {tuple(tensor.shape)} there; the groups make it {tuple(kept.shape)}.")
            tensor.copy_(kept)
    return model


def _axes(group: Group) -> Iterator[tuple[Axis, np.ndarray[Any, Any]]]:
    """Every axis that a channel of the group lies on, with its positions, (channels, m)."""
    for member in group.members:
        yield (member.tensor, member.dim), member.positions
    for site in group.sites:
        if site.weight:
            yield (site.weight, site.dim), site.columns
        if isinstance(site, ProductSite) and site.bias:
            yield (site.bias, 0), site.columns


def _choose(
    group: Group, alive: Alive, wide: Mapping[str, Tensor], narrow: Mapping[str, Tensor], left: int | None
) -> None:
    """Drop the weakest channels, equally many of every row that is still there.

    left: how many remain; None: as many as the narrow network has positions for.
    """
    axes = list(_axes(group))
    axis, positions = axes[0]
    present = np.array([alive[axis][row].all() for row in positions])
    rows = int(present.reshape(group.rows, -1).any(1).sum())
    if left is None:
        surplus = int(alive[axis].sum()) - narrow[axis[0]].shape[axis[1]]
        per_row, rest = divmod(surplus, positions.shape[1] * rows)
        if rest:
            raise ValueError(f"'{group.name}': {surplus} positions of '{axis[0]}' are no share of its {rows} rows.")
    else:
        per_row = group.num_channels - left
    if per_row <= 0:
        return
    weight = wide[axis[0]].detach().movedim(axis[1], 0).flatten(1).square().sum(1).numpy()
    norms = np.where(present, weight[positions].sum(1), np.inf).reshape(group.rows, -1)
    for row, order in enumerate(norms.argsort(1)):
        if np.isinf(norms[row]).all():
            continue
        for channel in order[:per_row] + row * norms.shape[1]:
            for where, owned in axes:
                alive[where][owned[channel]] = False
