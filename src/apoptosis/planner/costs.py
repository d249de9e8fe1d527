"""What a forward pass costs at other widths.

Holds: multiply-adds of contractions along edited axes. Elsewhere: what they cost now (graph).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from apoptosis.records import Group, ProductSite, Structure

Axis = tuple[str, int]


def macs_after(structure: Structure, keeps: Mapping[str, int]) -> float:
    """Return the multiply-adds of a forward pass at the given widths: exact for contractions of two edited axes.

    Every contraction costs rows times columns times positions, so its cost falls by the product of the shares that are
    kept along each of its axes. The cost of a product of two activations falls with its pairs.
    """
    gone = {g.name: g.num_channels - keeps.get(g.name, g.num_channels) for g in structure.groups}
    share: dict[Axis, float] = {}
    saved = 0.0
    for group in structure.groups:
        for axis, positions in _axes(group).items():
            size = structure.shapes[axis[0]][axis[1]]
            share[axis] = share.get(axis, 1.0) - gone[group.name] * positions / size
        pairs = sum(site.macs for site in group.sites if isinstance(site, ProductSite)) * group.num_channels
        if pairs:
            saved += pairs * _share_gone(structure, group, gone)
    for tensor, macs in _totals(structure).items():
        left = 1.0
        for (name, _), part in share.items():
            if name == tensor:
                left *= part
        saved += macs * (1.0 - left)
    return structure.macs - saved


def _axes(group: Group) -> dict[Axis, int]:
    """Return how many positions one channel owns along every contracted or producing axis."""
    found = {(m.tensor, m.dim): m.positions.shape[1] for m in group.members if m.macs or m.role == "producer"}
    return found | {(s.weight, s.dim): s.columns.shape[1] for s in group.sites if not isinstance(s, ProductSite)}


def _totals(structure: Structure) -> dict[str, float]:
    """Return the multiply-adds of every weight: those of its rows, or those of all sites that read its columns."""
    made: dict[Axis, float] = {}
    read: dict[Axis, dict[str, float]] = {}
    for group in structure.groups:
        for member in group.members:
            axis, count = (member.tensor, member.dim), member.positions.shape[1]
            if member.macs:
                made[axis] = max(made.get(axis, 0.0), member.macs / count * structure.shapes[axis[0]][axis[1]])
        for site in group.sites:
            if not isinstance(site, ProductSite):
                axis, count = (site.weight, site.dim), max(site.columns.shape[1], 1)
                own = site.macs / count * structure.shapes[axis[0]][axis[1]]
                reads = read.setdefault(axis, {})
                reads[site.key] = max(reads.get(site.key, 0.0), own)
    total: dict[str, float] = {}
    for axis, macs in [*made.items(), *((axis, sum(reads.values())) for axis, reads in read.items())]:
        total[axis[0]] = max(total.get(axis[0], 0.0), macs)
    return total


def _share_gone(structure: Structure, group: Group, gone: Mapping[str, int]) -> float:
    """Return the share of a group's channels that is removed, by itself or inside of whole heads."""
    share = gone[group.name] / group.num_channels
    mine = {(m.tensor, m.dim): m.positions for m in group.members if m.role == "producer"}
    for other in structure.groups:
        if other.name not in group.conflicts_with or not gone[other.name]:
            continue
        for member in other.members:
            own = mine.get((member.tensor, member.dim))
            if own is not None:
                inside = np.isin(own, member.positions).mean()
                share += float(inside) * gone[other.name] / other.num_channels
                break
    return min(1.0, share)
