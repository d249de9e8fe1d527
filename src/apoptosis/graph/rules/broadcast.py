"""What happens where the elements of several tensors meet one another.

Holds: the one procedure behind all elementwise operators, biases and masks. Elsewhere: which operator
is elementwise (rules/table.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from itertools import pairwise

import numpy as np
from torch import Tensor

from apoptosis.graph.explain import Code, Reason, place_of
from apoptosis.graph.rules.notes import note_count
from apoptosis.graph.trace.ids import View
from apoptosis.graph.trace.tracer import Call
from apoptosis.graph.trace.values import CONSTANT, Origin, Value, align, nothing, unpaired, varying
from apoptosis.records import IntArray


def _bind(call: Call, view: View, ndim: int, axes: frozenset[int] | None) -> IntArray | None:
    """Return the ids of the one axis of a parameter that runs along `axes` (None: any), else None.

    None stands for "runs along no channel axis", or for a parameter that had to be pinned.
    """
    lead = ndim - view.ndim
    if view.dims is None:
        call.pin_parameter(view.info, Code.SEVERAL_AS_ONE)
        return None
    runs = view.varied()
    if axes is not None:
        runs = [dim for dim in runs if any(axis + lead in axes for axis in view.axes(dim))]
    if len(runs) == 1:
        return align(view.ids(runs[0]), ndim)
    if runs:
        call.pin_parameter(view.info, Code.SEVERAL_AXES)
    return None


def _spans(tensor: Tensor, ndim: int, axes: Set[int]) -> bool:
    """Whether the tensor has elements of its own along any of these axes of the result."""
    lead = ndim - tensor.dim()
    return any(axis >= lead and tensor.shape[axis - lead] > 1 and tensor.stride(axis - lead) != 0 for axis in axes)


def _even(call: Call, tensor: Tensor, ndim: int, value: Value) -> dict[int, object]:
    """Return the axes, counted from the last, along which values without channels are alike, with their tokens.

    None is the token of an axis along which the tensor is broadcast, so that it has no size of its own there.
    """
    out: dict[int, object] = {}
    for axis in range(-ndim, 0):
        if not _spans(tensor, ndim, {ndim + axis}):
            out[axis] = None
        elif axis in value.even:
            out[axis] = value.even[axis]
        elif value.is_filler:
            out[axis] = (call.tracer.mode, call.tracer.memory.place(tensor), axis)
    return out


def _all_even(parts: Sequence[Mapping[int, object]]) -> dict[int, object]:
    """Return the axes along which all operands are alike, each with a token of theirs or one of its own."""
    axes = frozenset.intersection(*(frozenset(part) for part in parts)) if parts else frozenset()
    return {axis: next((part[axis] for part in parts if part[axis] is not None), object()) for axis in axes}


def _note_sizes(call: Call, tensor: Tensor, value: Value, ids: IntArray) -> None:
    """Note the channels that a tensor without any meets along axes on which it is the same all along."""
    axes = sorted(varying(ids))
    fresh = call.trace.channel_ids.is_fresh(ids)
    for axis, token in _even(call, tensor, ids.ndim, value).items():
        if token is not None and ids.ndim + axis in (axes if fresh else axes[-1:]):
            call.trace.size_constraints[token].append(np.unique(ids[ids != 0]))
            note_count(call, ids, ids.ndim + axis, ids.shape[axis])


def tie_broadcast(
    call: Call, tensors: Sequence[Tensor], ndim: int, given: Sequence[tuple[Tensor, Value]] = ()
) -> Value:
    """Tie the channels of operands that meet element by element, after broadcasting.

    Channels that meet values without channels (the network input, a mask of fixed size) are pinned; values that are the
    same everywhere, or independent noise, meet them harmlessly. A parameter gives the ids of the axis that runs along
    the channels.

    given: further operands whose values are not those on record.

    Returns: the ids of the result, without paths.
    """
    tracer = call.tracer
    carrying: list[tuple[Tensor, IntArray]] = []
    without: list[tuple[Tensor, Value]] = []
    filled: list[tuple[Tensor, Value]] = []
    views: list[tuple[Tensor, View]] = []
    is_filler = True
    operands: list[tuple[Tensor, Value | None]] = [*given, *((tensor, None) for tensor in tensors)]
    for tensor, known in operands:
        view = tracer.view(tensor) if known is None else None
        if view is not None:
            tracer.read(view.info, "operator")
            views.append((tensor, view))
            is_filler = is_filler and tensor.numel() == 1
            continue
        value = tracer.value(tensor) if known is None else known
        is_filler = is_filler and (value.is_filler or tensor.numel() == 1)
        if value.has_channels:
            carrying.append((tensor, align(value.ids, ndim)))
        else:
            (filled if value.is_filler else without).append((tensor, value))
    axes = frozenset().union(*(varying(ids) for _, ids in carrying)) if carrying else None
    for tensor, view in views:
        bound = _bind(call, view, ndim, axes)
        if bound is not None:
            carrying.append((tensor, bound))
        elif view.dims is None and axes is not None and tensor.numel() > 1:
            without.append((tensor, nothing(tensor.dim(), Origin(f"'{view.info.name}'"))))
    if not carrying:
        origin = without[0][1].origin if without else CONSTANT
        parts = [_even(call, t, ndim, value) for t, value in (*without, *filled)]
        parts += [_even(call, tensor, ndim, nothing(ndim)) for tensor, _ in views]
        return replace(nothing(ndim, origin, is_filler=is_filler), even={} if is_filler else _all_even(parts))
    result = carrying[0][1]
    for (left, _), (tensor, ids) in pairwise(carrying):
        result = _join(call, left, result, tensor, ids, ndim)
    for tensor, value in (*without, *filled):
        _note_sizes(call, tensor, value, result)
    for tensor, value in without:
        if _spans(tensor, ndim, varying(result) - {ndim + axis for axis in value.even}):
            call.pin(result, (Code.MEETS_KEPT if value.origin.kept else Code.MEETS_NONE)(origin=value.origin))
            break
    return Value(result)


def level(call: Call, ids: IntArray, axes: Set[int], why: Code | Reason) -> IntArray:
    """Tie what lies along some axes to what lies at their first places, whose ids are returned.

    why: the reason of channels that meet values without channels there.
    """
    first = ids
    for axis in axes:
        first = first.take([0], axis=axis)
    call.tie(np.ascontiguousarray(np.broadcast_to(first, ids.shape)), ids)
    broken = (ids == 0).any(axis=tuple(axes), keepdims=True)
    call.pin(np.where(broken, ids, 0), why)
    return first


def _join(call: Call, left: Tensor, a: IntArray, right: Tensor, b: IntArray, ndim: int) -> IntArray:
    """Tie two id arrays; the one that varies more is the result."""
    if a is b or (a.shape == b.shape and np.array_equal(a, b)):
        return a
    along_a, along_b = varying(a), varying(b)
    if not along_a and along_b:
        call.pin(a, Code.SPREADS)
        if _spans(left, ndim, along_b):
            call.pin(b, Code.MEETS_POSITIONS)
        return b
    if along_a and not along_b:
        call.pin(b, Code.SPREADS)
        if _spans(right, ndim, along_a):
            call.pin(a, Code.MEETS_POSITIONS)
        return a
    if not (along_a <= along_b or along_b <= along_a):
        return _crossed(call, left, a, right, b, ndim)
    if not _inside(call, left, a, right, b, ndim):
        call.tie(a, b)
        _note_join(call, a, b)
    wide_a, wide_b = np.broadcast_arrays(a, b)
    call.pin(unpaired(wide_a, wide_b), Code.MEETS_VALUES)
    return np.where(wide_a != 0, wide_a, wide_b) if along_b <= along_a else np.where(wide_b != 0, wide_b, wide_a)


def _note_join(call: Call, a: IntArray, b: IntArray) -> None:
    tracer = call.tracer
    if not tracer.watched:
        text = f"operator {call.label}{place_of(tracer.module_name)}"
        tracer.trace.joins.append((a[a != 0][:1], b[b != 0][:1], text, tracer.where()))


def _inside(call: Call, left: Tensor, a: IntArray, right: Tensor, b: IntArray, ndim: int) -> bool:
    """Whether one side holds heads, and the other the channels inside them (each divided by its head's sum)."""
    trace = call.trace
    for tensor, heads, inner in ((left, a, b), (right, b, a)):
        more = varying(inner) - varying(heads)
        if not more or not varying(heads) <= varying(inner) or _spans(tensor, ndim, more):
            continue
        if trace.channel_ids.is_fresh(heads) and not trace.channel_ids.is_fresh(inner):
            trace.contain(heads, inner, call.tracer.module_name, part=True)
            return True
    return False


def _crossed(call: Call, left: Tensor, a: IntArray, right: Tensor, b: IntArray, ndim: int) -> IntArray:
    """Pin the fewer of the channels where those along one axis meet those along another; the others go on."""
    if np.unique(a).size < np.unique(b).size:
        left, a, right, b = right, b, left, a
    call.pin(b, Code.CROSSES)
    if varying(a) & varying(b) or _spans(right, ndim, varying(a)):
        call.pin(a, Code.CROSSES)
    return a
