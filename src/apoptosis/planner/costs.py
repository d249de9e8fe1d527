"""What a network costs at other widths: multiply-adds, parameters, seconds of a training step.

Holds: the product of what is kept along every axis of every tensor, laid out once per structure. Elsewhere: what a
contraction costs now (graph), measuring the table of seconds (decide/timing.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from apoptosis.records import Curve, FloatArray, Group, IntArray, NormSite, ProductSite, Structure, Timings

Axis = tuple[str, int]
Owners = dict[Axis, list[tuple[int, IntArray]]]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a network costs.

    macs: multiply-adds of a forward pass on the example input. parameters: how many; tied ones count once. seconds: of
    a training step; NaN where no table of timings was given.
    """

    macs: float
    parameters: float
    seconds: float = math.nan


class Costs:
    """What the network of a structure costs at other widths.

    A contraction costs rows times columns times positions and a tensor has rows times columns times kernel elements, so
    both fall by the product of the shares that are kept along each axis. The cost of a product of two activations falls
    with its pairs. Of groups that share channels (whole heads, and the channels inside them) the shares multiply.
    What does not depend on the widths is laid out once, so that one answer takes some ten microseconds.

    Args:
        structure: of the network at the widths it has now.
        timings: the machine's table, measured at these widths or at earlier ones.

    Example:
        >>> from torch import nn, zeros
        >>> from apoptosis.graph import analyse
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> costs = Costs(analyse(net, (zeros(3, 4),), {}))
        >>> costs.of({}), costs.of({"0": 3})
        (Cost(macs=108.0, parameters=44.0, seconds=nan), Cost(macs=54.0, parameters=23.0, seconds=nan))
    """

    def __init__(self, structure: Structure, timings: Timings | None = None) -> None:
        self.timings = timings
        self._macs, groups = structure.macs, structure.groups
        self._index = {group.name: number for number, group in enumerate(groups)}
        self._widths = np.array([float(group.num_channels) for group in groups])
        owners = _owners(groups)
        self._shares = _Shares(structure.shapes, owners)
        macs = weight_macs(structure)
        tensors = self._shares.tensors
        self._tensor_macs = np.array([macs.get(name, 0.0) for name in tensors])
        sizes = {name: float(np.prod(structure.shapes[name])) for name in structure.shapes if name not in
                 structure.buffers}  # fmt: skip
        self._parameters = sum(sizes.values())
        self._tensor_sizes = np.array([sizes.get(name, 0.0) for name in tensors])
        self._products = _Channelwise(_products(groups), groups, owners)
        self._seconds = None if timings is None else _Seconds(structure, timings, tensors, self._tensor_macs, owners)
        self._branches = [branch for group in groups if (branch := group.branch) is not None]
        self._beside: dict[str, tuple[float, float]] = {}  # by branch: macs and parameters that no group counts

    def of(self, keeps: Mapping[str, int]) -> Cost:
        """Return the cost where these groups, by name, have so many channels and the others all they have now.

        With all groups of a residual branch at 0 goes what lies in it beside them: norms, biases, other products.
        """
        kept = self._kept(keeps)
        gone = self._shares.gone(kept)
        beside, others = self._gone_whole(keeps) if self._branches and 0 in keeps.values() else (0.0, 0.0)
        products = self._products.saved(kept) + beside
        macs = self._macs - float(self._tensor_macs @ gone) - products
        parameters = self._parameters - float(self._tensor_sizes @ gone) - others
        if self._seconds is None:
            return Cost(macs, parameters)
        return Cost(macs, parameters, self._seconds.of(kept, gone, products, parameters))

    def _gone_whole(self, keeps: Mapping[str, int]) -> tuple[float, float]:
        """Return the multiply-adds and parameters beside groups that go with branches of which nothing is kept."""
        none = {name for name, width in keeps.items() if not width}
        whole = {branch.name: branch for branch in self._branches if none.issuperset(branch.groups)}
        for name, branch in whole.items():
            if name not in self._beside:
                kept = self._kept(dict.fromkeys(branch.groups, 0))
                gone = self._shares.gone(kept)
                macs = float(self._tensor_macs @ gone) + self._products.saved(kept)
                parameters = float(self._tensor_sizes @ gone)
                self._beside[name] = max(0.0, branch.macs - macs), max(0.0, branch.parameters - parameters)
        return sum(self._beside[name][0] for name in whole), sum(self._beside[name][1] for name in whole)

    def _kept(self, keeps: Mapping[str, int]) -> FloatArray:
        """Return the share of its channels that every group keeps."""
        kept = np.ones(self._widths.size)
        if keeps:
            numbers = np.fromiter(map(self._index.__getitem__, keeps), dtype=np.int64, count=len(keeps))
            widths = np.fromiter(keeps.values(), dtype=np.float64, count=len(keeps))
            kept[numbers] = widths / self._widths[numbers]
        return kept


def macs_after(structure: Structure, keeps: Mapping[str, int]) -> float:
    """Return the multiply-adds of a forward pass at the given widths; to ask more than once, make a `Costs`."""
    return Costs(structure).of(keeps).macs


def open_axes(structure: Structure) -> dict[str, set[int]]:
    """Return the axes of every tensor along which channels of open groups lie."""
    found: dict[str, set[int]] = {}
    for group in structure.open_groups:
        for name, dim in _axes(group):
            found.setdefault(name, set()).add(dim)
    return found


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


class _Channelwise:
    """What falls with the channels of a group, and with whole heads: products of two activations, single numbers.

    amounts: by the number of a group.
    """

    def __init__(self, amounts: Mapping[int, float], groups: Sequence[Group], axes: Owners) -> None:
        own: list[int] = []
        factors: list[float] = []
        self._starts: list[int] = []
        for number in amounts:
            self._starts.append(len(own))
            mine = {(m.tensor, m.dim): m.positions for m in groups[number].members if m.role == "producer"}
            for other, factor in [(number, 1.0), *_overlaps(number, axes, mine).items()]:
                own.append(other)
                factors.append(factor)
        self._own, self._factors = np.array(own, dtype=np.int64), np.array(factors)
        self._amounts = np.array(list(amounts.values()))

    def saved(self, kept: FloatArray) -> float:
        """Return how much goes; kept: (groups,) the share of its channels that each keeps."""
        if not self._starts:
            return 0.0
        left = 1.0 - self._factors * (1.0 - kept[self._own])
        return float(self._amounts @ (1.0 - np.multiply.reduceat(left, self._starts)))


class _Seconds:
    """Seconds of a training step: curves of the contractions that were measured, and what is in proportion.

    tensors, macs: the tensors that are cut, and what each costs now.
    """

    def __init__(
        self, structure: Structure, timings: Timings, tensors: Sequence[str], macs: FloatArray, owners: Owners
    ) -> None:
        self._timings, groups = timings, structure.groups
        known = [place for place, name in enumerate(tensors) if name in timings.weights and macs[place] > 0]
        curves = [timings.curves[timings.weights[tensors[place]]] for place in known]
        self._known, self._others = np.array(known, dtype=np.int64), macs.copy()
        self._others[self._known] = 0.0
        self._share = np.array([macs[place] / curve.macs for place, curve in zip(known, curves, strict=True)])
        self._curves = _Curves(curves) if curves else None
        self._unmeasured = structure.macs - float(macs[self._known].sum())
        amounts = {number: g.elements * g.num_channels for number, g in enumerate(groups) if g.elements}
        self._elements, self._channels = structure.elements, _Channelwise(amounts, groups, owners)

    def of(self, kept: FloatArray, gone: FloatArray, products: float, parameters: float) -> float:
        """Return the seconds.

        kept: by group, the share of its channels. gone: by tensor, the share that goes. products: multiply-adds of
        products of two activations that go. parameters: those that stay.
        """
        table = self._timings
        macs = self._unmeasured - float(self._others @ gone) - products
        elements = self._elements - self._channels.saved(kept)
        seconds = table.fixed + macs * table.per_mac + elements * table.per_element + parameters * table.per_parameter
        if self._curves is not None:
            seconds += self._curves.total(self._share * (1.0 - gone[self._known]))
        return seconds


class _Curves:
    """Piecewise linear functions of the share of a contraction's multiply-adds; nothing costs nothing."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        longest = max(len(curve.shares) for curve in curves)
        knots = np.full((len(curves), longest), np.inf)
        self._slopes, self._offsets = np.zeros((2, len(curves), longest))
        for place, curve in enumerate(curves):
            x, y = np.array(curve.shares), np.maximum.accumulate(curve.seconds)  # narrower is never slower
            slopes = np.diff(y) / np.diff(x) if x.size > 1 else y / x
            slopes = np.array([slopes[0], *slopes][: x.size])  # below the least share as from there to the next
            at = np.array([0, *range(x.size - 1)])
            knots[place, : x.size - 1] = x[:-1]
            self._slopes[place, : x.size] = slopes
            self._offsets[place, : x.size] = y[at] - slopes * x[at]
        self._knots, self._rows = knots, np.arange(len(curves))

    def total(self, shares: FloatArray) -> float:
        """Return the sum of all; shares: (curves,)."""
        part = (shares[:, None] > self._knots).sum(axis=1)
        seconds = self._offsets[self._rows, part] + self._slopes[self._rows, part] * shares
        return float((np.maximum(seconds, 0.0) * (shares > 0)).sum())


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


def weight_macs(structure: Structure) -> dict[str, float]:
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
