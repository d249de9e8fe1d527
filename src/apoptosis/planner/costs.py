"""What a network costs at other widths: multiply-adds and parameters.

Holds: the product of what is kept along every axis of every tensor, laid out once per structure. Elsewhere: what a
contraction costs now (graph).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from apoptosis.records import FloatArray, Group, IntArray, NormSite, ProductSite, Structure

Axis = tuple[str, int]
Owners = dict[Axis, list[tuple[int, IntArray]]]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a network costs.

    macs: multiply-adds of a forward pass on the example input. parameters: how many; tied ones count once.
    """

    macs: float
    parameters: float


class Costs:
    """What the network of a structure costs at other widths.

    A contraction costs rows times columns times positions and a tensor has rows times columns times kernel elements, so
    both fall by the product of the shares that are kept along each axis. The cost of a product of two activations falls
    with its pairs. Of groups that share channels (whole heads, and the channels inside them) the shares multiply.
    What does not depend on the widths is laid out once, so that one answer takes some ten microseconds.

    Args:
        structure: of the network at the widths it has now.

    Example:
        >>> from torch import nn, zeros
        >>> from apoptosis.graph import analyse
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> costs = Costs(analyse(net, (zeros(3, 4),), {}))
        >>> costs.of({}), costs.of({"0": 3})
        (Cost(macs=108.0, parameters=44.0), Cost(macs=54.0, parameters=23.0))
    """

    def __init__(self, structure: Structure) -> None:
        self._macs, groups = structure.macs, structure.groups
        self._index = {group.name: number for number, group in enumerate(groups)}
        self._widths = np.array([float(group.num_channels) for group in groups])
        owners = _owners(groups)
        self._shares = _Shares(structure.shapes, owners)
        macs = _totals(structure)
        tensors = self._shares.tensors
        self._tensor_macs = np.array([macs.get(name, 0.0) for name in tensors])
        sizes = {name: float(np.prod(structure.shapes[name])) for name in structure.shapes if name not in
                 structure.buffers}  # fmt: skip
        self._parameters = sum(sizes.values())
        self._tensor_sizes = np.array([sizes.get(name, 0.0) for name in tensors])
        self._products = _Products(groups, owners)

    def of(self, keeps: Mapping[str, int]) -> Cost:
        """Return the cost where these groups, by name, have so many channels and the others all they have now."""
        kept = self._kept(keeps)
        gone = self._shares.gone(kept)
        saved = float(self._tensor_macs @ gone) + self._products.saved(kept)
        return Cost(self._macs - saved, self._parameters - float(self._tensor_sizes @ gone))

    def _kept(self, keeps: Mapping[str, int]) -> FloatArray:
        """Return the share of its channels that every group keeps."""
        kept = np.ones(self._widths.size)
        for name, width in keeps.items():
            number = self._index[name]
            kept[number] = width / self._widths[number]
        return kept


def macs_after(structure: Structure, keeps: Mapping[str, int]) -> float:
    """Return the multiply-adds of a forward pass at the given widths; to ask more than once, make a `Costs`."""
    return Costs(structure).of(keeps).macs


class _Shares:
    """By tensor, the share of its elements that goes when groups keep given shares of their channels.

    Along an axis lie cells: positions that the same groups own. What is kept of a cell is the product of what its
    groups keep; the axis keeps the sum over its cells, and the tensor the product over its axes.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], owners: Owners) -> None:
        parts: list[float] = []
        members: list[int] = []
        cell_starts: list[int] = []
        axis_starts: list[int] = []
        tensor_starts: list[int] = []
        self.tensors: list[str] = []
        for place, axis in enumerate(sorted(owners)):
            if not self.tensors or self.tensors[-1] != axis[0]:
                self.tensors.append(axis[0])
                tensor_starts.append(place)
            axis_starts.append(len(parts))
            for part, own in _cells(owners[axis], shapes[axis[0]][axis[1]]):
                parts.append(part)
                cell_starts.append(len(members))
                members.extend(own)
        self._parts, self._members = np.array(parts), np.array(members, dtype=np.int64)
        self._cells, self._axes, self._starts = (
            np.array(starts, dtype=np.int64) for starts in (cell_starts, axis_starts, tensor_starts)
        )

    def gone(self, kept: FloatArray) -> FloatArray:
        """Return (tensors,) the share that goes; kept: (groups,) the share of its channels that each keeps."""
        if not self.tensors:
            return np.zeros(0)
        cells = self._parts * (1.0 - np.multiply.reduceat(kept[self._members], self._cells))
        gone: FloatArray = 1.0 - np.multiply.reduceat(1.0 - np.add.reduceat(cells, self._axes), self._starts)
        return gone


class _Products:
    """Multiply-adds of products of two activations, which fall with the channels of a group, and with whole heads."""

    def __init__(self, groups: Sequence[Group], axes: Owners) -> None:
        products = _products(groups)
        own: list[int] = []
        factors: list[float] = []
        self._starts: list[int] = []
        for number in products:
            self._starts.append(len(own))
            mine = {(m.tensor, m.dim): m.positions for m in groups[number].members if m.role == "producer"}
            for other, factor in [(number, 1.0), *_overlaps(number, axes, mine).items()]:
                own.append(other)
                factors.append(factor)
        self._own, self._factors = np.array(own, dtype=np.int64), np.array(factors)
        self._macs = np.array(list(products.values()))

    def saved(self, kept: FloatArray) -> float:
        """Return the multiply-adds that go; kept: (groups,) the share of its channels that each keeps."""
        if not self._starts:
            return 0.0
        left = 1.0 - self._factors * (1.0 - kept[self._own])
        return float(self._macs @ (1.0 - np.multiply.reduceat(left, self._starts)))


def _owners(groups: Iterable[Group]) -> Owners:
    """Return the groups with positions along every axis, by their numbers, and which these are."""
    owners: Owners = {}
    for number, group in enumerate(groups):
        for axis, positions in _axes(group).items():
            owners.setdefault(axis, []).append((number, positions))
    return owners


def _axes(group: Group) -> dict[Axis, IntArray]:
    """Return (channels, m) the positions that every channel owns, along every axis that is cut with the group."""
    found = {(member.tensor, member.dim): member.positions for member in group.members}
    reads = [site for site in group.sites if site.weight and not isinstance(site, ProductSite | NormSite)]
    return {(site.weight, site.dim): site.columns for site in reads} | found


def _cells(owners: Sequence[tuple[int, IntArray]], size: int) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Yield the share of an axis that positions of the same groups take up, and the numbers of these groups."""
    owned = np.zeros((size, len(owners)), dtype=bool)
    for place, (_, positions) in enumerate(owners):
        owned[positions.reshape(-1), place] = True
    if not bool((owned.sum(axis=1) > 1).any()):
        for number, positions in owners:
            yield positions.size / size, (number,)
        return
    sets, counts = np.unique(owned, axis=0, return_counts=True)
    for own, count in zip(sets, counts.tolist(), strict=True):
        if own.any():
            yield count / size, tuple(owners[place][0] for place in np.flatnonzero(own).tolist())


def _products(groups: Iterable[Group]) -> dict[int, float]:
    """Return the multiply-adds of products of two activations by the number of the group they fall with."""
    found = {}
    for number, group in enumerate(groups):
        macs = group.product_macs or sum(site.macs for site in group.sites if isinstance(site, ProductSite))
        if macs:
            found[number] = macs * group.num_channels
    return found


def _overlaps(number: int, axes: Owners, mine: Mapping[Axis, IntArray]) -> dict[int, float]:
    """Return the other groups that share channels with a group, and the share of its channels that lies in theirs.

    axes: the groups with positions along every axis. mine: the group's own positions where it is made.
    """
    found: dict[int, float] = {}
    for axis, own in mine.items():
        for other, positions in axes[axis]:
            inside = 0.0 if other == number else float(np.isin(own, positions).mean())
            if inside:
                found[other] = max(found.get(other, 0.0), inside)
    return found


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
