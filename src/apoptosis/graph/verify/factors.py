"""Numbers that follow a size and scale a product of activations, and what makes up for them after an edit.

Holds: which weights scale the sums of a product and nothing else, and the comparison of the plain numbers of two
structures. Elsewhere: following numbers through a pass (multiples.py), the tensors (surgery).

`scores / k.size(-1) ** 0.5` divides by another number once channels are gone. Where all that reads the scores reads
them times such numbers, and weights of their own make an operand, these take the factor that is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from apoptosis.errors import StructureChangedError
from apoptosis.graph.explain import Code
from apoptosis.graph.groups.classes import Classes, own_readers
from apoptosis.graph.trace.result import NO_READER, TraceResult, pairs_of
from apoptosis.graph.trace.scalars import changed_numbers, changed_scalar
from apoptosis.graph.trace.values import CHANNELS, LITERAL, Axis, weight_named
from apoptosis.records import IntArray, RowScale, ScalarOperands, Structure, TensorEdit

Kept = Mapping[str, Mapping[int, Tensor | IntArray]]
Parts = tuple[tuple[str, int, IntArray], ...]

_POWERS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
_CLOSE = 1e-9
_ELSEWHERE = "which scales more than a product of activations"
_APART = "which does not scale all that reads a product of activations"
_NO_SIDE = "which scales a product of activations neither side of which scales with weights of its own alone"
_LEFT_OUT = "which only weights that are left out by exclude= could make up for"
_NO_SIZE = "which scales a product of activations, but not with the root of a number of channels"


def scalable(trace: TraceResult, classes: Classes) -> dict[str, Parts]:
    """Return what scales the sums of each product, and nothing else: (tensor, dim, positions), by `pairs_of`.

    That is one operand's producers and their biases. Products without such an operand are left out.
    """
    sides: dict[str, dict[bytes, tuple[IntArray, frozenset[Axis]]]] = {}
    for product in trace.products.values():
        found = sides.setdefault(pairs_of(product), {})
        for ids, axes in zip((product.left, product.right), product.sides, strict=True):
            _, known = found.get(ids.tobytes(), (ids, axes))
            found[ids.tobytes()] = (ids, axes & known)
    out: dict[str, Parts] = {}
    readers, numbers = trace.readers_of_ids()
    for key, found in sides.items():
        if len(found) < 2:  # times itself
            continue
        both, counts = np.unique(np.concatenate([np.unique(ids) for ids, _ in found.values()]), return_counts=True)
        if int(counts.max()) > 1:
            continue
        unread = np.isin(readers, (NO_READER, numbers[key]))
        parts = (
            _parts(trace, classes, ids, axes, (both, readers))
            for ids, axes in found.values()
            if bool(unread[ids].all())
        )
        first = next((part for part in parts if part), ())
        if first:
            out[key] = first
    return out | _weights(trace)


def _weights(trace: TraceResult) -> dict[str, Parts]:
    """Return the weights that are multiplied by numbers before every use of them, rows of whole parameters."""
    factors: dict[str, set[tuple[float, float]]] = {}
    for consumer in trace.consumers.values():
        alone = not trace.reads[consumer.weight] - own_readers(consumer)
        factors.setdefault(consumer.weight, set()).add(consumer.factors if alone else (math.nan, math.nan))
    scaled = {multiple.of for multiples in trace.multiples.values() for multiple in multiples}
    return {
        of: ((name, 0, np.arange(trace.channel_ids.tensors[name].shape[0], dtype=np.int64)),)
        for name, found in factors.items()
        if (of := weight_named(name)) in scaled and len(found) == 1 and not math.isnan(next(iter(found))[0])
    }


def _parts(
    trace: TraceResult,
    classes: Classes,
    ids: IntArray,
    axes: frozenset[Axis],
    known: tuple[IntArray, IntArray],
) -> Parts:
    """Return what scales one operand; () where that is not all it consists of.

    known: the ids of both operands, and the reader of every id.
    """
    owned, (both, readers) = trace.channel_ids.axes_of(ids), known
    if {(name, dim) for name, dim, _ in owned} != axes or any(len(trace.reads[name]) > 1 for name, _ in axes):
        return ()
    found: list[tuple[str, int, IntArray]] = []
    labels = np.unique(classes.labels[ids])
    for name, dim, here in owned:
        info = trace.channel_ids.tensors[name]
        every = info.axis(dim).reshape(-1)
        tied = every[np.isin(classes.labels[every], labels) & ~np.isin(every, both)]
        if bool((readers[tied] == NO_READER).any()):
            return ()  # more of the axis is in the operand than its ids say: a sum of two of its parts
        positions = np.unique(ids[here]) - info.bases[dim]
        biases = sorted(trace.bias_of.get((name, dim), ()))
        if any(len(trace.reads[bias]) > 1 for bias in biases):
            return ()
        found += [(name, dim, positions), *((bias, 0, positions) for bias in biases)]
    return tuple(found)


@dataclass(slots=True)
class _Reading:
    """One reading of a multiple: the mode, the ratio of its numbers after and before the edit, and their calls."""

    mode: str
    of: str
    ratio: float
    calls: frozenset[int]


def rescale_edits(old: Structure, new: Structure, kept: Kept) -> tuple[TensorEdit, ...]:
    """Return the edits, on the shapes after the event, that make up for numbers that changed with it.

    Args:
        old: structure before the edit.
        new: structure of the edited model.
        kept: tensor name -> dim -> kept old positions.

    Raises: StructureChangedError: a number changed that does anything else than scale a product of activations by a
        power of a width, or nothing can make up for it. Names the operator and its numbers.
    """
    readings = list(_readings(old, new))
    ratios, odd = _tested(old, readings, kept)
    for mode, calls in old.scalars.items():
        covered = frozenset().union(*(r.calls for r in readings if r.mode == mode))
        why = {at: text for (where, at), text in odd.items() if where == mode}
        error = changed_scalar(calls, new.scalars.get(mode, ()), covered - why.keys(), why)
        if error is not None:
            raise error
    scales: dict[str, list[RowScale]] = {}
    for of, ratio in ratios.items():
        for name, dim, positions in old.scalable[of]:
            left = positions_left(kept, name, dim)
            places = positions if left is None else np.flatnonzero(np.isin(left, positions))
            if places.size:
                scales.setdefault(name, []).append(RowScale(dim=dim, positions=places, factor=1.0 / ratio, follow=True))
    return tuple(TensorEdit(tensor=name, keep={}, scales=tuple(found)) for name, found in scales.items())


def _readings(old: Structure, new: Structure) -> Iterator[_Reading]:
    for mode, multiples in old.multiples.items():
        before, after = old.scalars.get(mode, ()), new.scalars.get(mode, ())
        changed = changed_numbers(before, after)
        for multiple in multiples:
            ratio = math.prod(_ratio(number, before, after) for number in multiple[1] if number[0] in changed)
            yield _Reading(mode, multiple[0], ratio, frozenset(number[0] for number in multiple[1]))


def _ratio(number: tuple[int, int, float], before: Sequence[ScalarOperands], after: Sequence[ScalarOperands]) -> float:
    """Return a number after the edit over what it was, to its power; NaN where that is no positive number."""
    call, place, power = number
    numbers = [calls[call].values[place] for calls in (before, after) if place < len(calls[call].values)]
    if len(numbers) < 2 or numbers[0].imag or numbers[1].imag or not numbers[0].real:
        return math.nan
    ratio = float(numbers[1].real) / float(numbers[0].real)
    return ratio**power if ratio > 0.0 else math.nan


def _tested(
    old: Structure, readings: Sequence[_Reading], kept: Kept
) -> tuple[dict[str, float], dict[tuple[str, int], str]]:
    """Return the ratio of each product that has to be made up for, and why calls cannot be: (mode, call) -> text."""
    by_product: dict[str, list[_Reading]] = {}
    odd: dict[tuple[str, int], str] = {}
    shares = _shares(old, kept)
    for reading in readings:
        by_product.setdefault(reading.of, []).append(reading)
    ratios: dict[str, float] = {}
    for of, found in by_product.items():
        ratio = found[0].ratio
        if all(_same(r.ratio, 1.0) for r in found):
            continue
        if of in (CHANNELS, LITERAL):
            found, text = [r for r in found if not _same(r.ratio, 1.0)], _ELSEWHERE
        elif not all(_same(r.ratio, ratio) for r in found):
            text = _APART
        elif of not in old.scalable:
            text = _NO_SIDE
        elif _is_left_out(old, of):
            text = _LEFT_OUT
        elif not _is_power(ratio, shares + _own_shares(old, of, kept)):
            text = _NO_SIZE
        else:
            ratios[of] = ratio
            continue
        odd.update(((r.mode, call), text) for r in found for call in r.calls)
    return ratios, odd


def _is_left_out(old: Structure, of: str) -> bool:
    """Whether the user left out what scales a product."""
    members = [m for g in old.groups if g.pin is not None and g.pin.code == Code.EXCLUDED.code for m in g.members]
    return any(
        (member.tensor, member.dim) == (name, dim) and bool(np.isin(member.positions, positions).any())
        for name, dim, positions in old.scalable[of]
        for member in members
    )


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_CLOSE)


def positions_left(kept: Kept, name: str, dim: int) -> IntArray | None:
    """Return the positions that an event keeps along one axis, None for all."""
    found = kept.get(name, {}).get(dim)
    if found is None:
        return None
    array = found.detach().cpu().numpy() if isinstance(found, Tensor) else np.asarray(found)
    return array.astype(np.int64).reshape(-1)


def _shares(old: Structure, kept: Kept) -> list[float]:
    """Return the share that the event leaves of every group."""
    found = set()
    for group in old.groups:
        for member in group.members[:1]:
            left = positions_left(kept, member.tensor, member.dim)
            if left is not None:
                found.add(float(np.isin(member.positions[:, 0], left).mean()))
    return sorted(found)


def _own_shares(old: Structure, of: str, kept: Kept) -> list[float]:
    """Return the share that is left of the channels of one product."""
    total = remaining = 0
    for name, dim, positions in old.scalable[of]:
        left = positions_left(kept, name, dim)
        total += positions.size
        remaining += positions.size if left is None else int(np.isin(positions, left).sum())
    return [remaining / total]


def _is_power(ratio: float, shares: Sequence[float]) -> bool:
    """Whether a ratio is a root or a power of one of the shares, or the inverse of that."""
    targets = (share**power for share in shares if 0.0 < share < 1.0 for power in _POWERS)
    return any(_same(ratio, target) or _same(1.0 / ratio, target) for target in targets)


def gains(old: Structure, new: Structure, kept: Kept) -> tuple[TensorEdit, ...]:
    """Return the edits of gains with which rows that are normalised before use keep the size that they had.

    Args:
        old: structure before the edit, of today's weights.
        new: structure of the edited model.
        kept: tensor name -> dim -> kept old positions.

    Raises: StructureChangedError: a row that had a size has none any more. Names the weight.
    """
    after = new.normalised
    found: dict[str, TensorEdit] = {}
    for site, normal in old.normalised.values():
        if site.key not in after or site.dim not in kept.get(site.weight, {}):
            continue
        now, rows = after[site.key][1], positions_left(kept, site.weight, 0)
        before = normal.scale if rows is None else normal.scale[rows]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(before == 0.0, 1.0, before / now.scale)
        if not bool(np.isfinite(ratio).all()):
            raise StructureChangedError(f"rows of '{site.weight}', which are normalised, would be nothing but zeros.")
        scale = RowScale(dim=now.gain_dim, positions=np.arange(ratio.size), factor=ratio, follow=True)
        found[now.gain] = TensorEdit(tensor=now.gain, keep={}, scales=(scale,))
    return tuple(found.values())
