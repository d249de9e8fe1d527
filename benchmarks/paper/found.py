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


def cut_to(build: Any, shrunk: nn.Module, example: Any) -> nn.Module:
    """Return the network that `build` makes, at the widths of `shrunk`: the channels of largest norm, as they are.

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
        _choose(group, alive, wide, narrow)
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


def _choose(group: Group, alive: Alive, wide: Mapping[str, Tensor], narrow: Mapping[str, Tensor]) -> None:
    """Drop the weakest channels until as many are left as the narrow network has there, equally many of every row."""
    axes = list(_axes(group))
    axis, positions = axes[0]
    left = np.array([alive[axis][row].all() for row in positions])
    surplus = int(alive[axis].sum()) - narrow[axis[0]].shape[axis[1]]
    rows = left.reshape(group.rows, -1)
    held = int(rows.any(1).sum())
    per_row, rest = divmod(surplus, positions.shape[1] * held)
    if rest and group.name.endswith(":heads") is False:
        raise ValueError(f"'{group.name}': {surplus} positions of '{axis[0]}' are no share of its {held} rows.")
    if per_row <= 0:
        return
    weight = wide[axis[0]].detach().movedim(axis[1], 0).flatten(1).square().sum(1).numpy()
    norms = np.where(left, weight[positions].sum(1), np.inf).reshape(group.rows, -1)
    for row, order in enumerate(norms.argsort(1)):
        for channel in order[: per_row if rows[row].any() else 0] + row * rows.shape[1]:
            for where, owned in axes:
                alive[where][owned[channel]] = False
