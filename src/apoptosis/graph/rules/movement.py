"""Operators that only move data: executed on the ids.

Holds: one short function per family of movement. Elsewhere: arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from apoptosis.graph.explain import Code
from apoptosis.graph.rules.broadcast import level, tie_broadcast
from apoptosis.graph.rules.normalization import parameter_operand
from apoptosis.graph.rules.notes import note_axes, note_count, note_parts, note_split
from apoptosis.graph.trace.operators import Result, Rule
from apoptosis.graph.trace.tracer import Call
from apoptosis.graph.trace.values import (
    SIZE_LIMIT,
    TooLargeError,
    Value,
    align,
    collapse,
    drop_paths,
    expand,
    joined,
    nothing,
    reshape,
    varying,
)
from apoptosis.records import IntArray


def same_memory(call: Call) -> bool:
    """Whether the result is a view of a parameter, which needs no rule."""
    return bool(call.outs) and call.view(call.outs[0]) is not None


def moving(step: Callable[[Call, Tensor, IntArray], IntArray]) -> Rule:
    """Make a rule for one tensor in, one out: `step` moves the ids as the operator moves the elements."""

    def rule(call: Call) -> Result:
        if same_memory(call):
            return None
        tensor = call.args[0]
        value = parameter_operand(call, tensor)
        if not value.has_channels:
            return Value(
                np.zeros((1,) * call.outs[0].dim(), dtype=np.int64),
                is_filler=value.is_filler,
                origin=value.origin,
                keep=value.keep,
            )
        return value.moved(step(call, tensor, value.ids))

    return rule


def copy(call: Call) -> Result:
    """Copy in the same shape; one laid out as a parameter's view stands for the parameter."""
    if same_memory(call) or call.tracer.memory.adopt(call.outs[0], call.args[0]):
        return None
    if call.name == "clone":
        call.tracer.outputs.copied(call.args[0], call.outs[0])
    return parameter_operand(call, call.args[0])


def resize(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    """Add or drop axes of size 1."""
    return reshape(ids, tensor.shape, call.outs[0].shape)


def view(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    """Lay the elements out in other axes, in the same order."""
    new = resize(call, tensor, ids)
    note_split(call, ids, tensor.shape, new, call.outs[0].shape)
    note_axes(call, new, call.arg(1, "size", ()))
    return new


def view_or_cast(call: Call) -> Result:
    """Lay the elements out in other axes; where their bytes are taken for others of another size, pin."""
    if call.overload == "dtype" and call.outs[0].shape != call.args[0].shape:
        call.pin_all(Code.NO_RULE)
        return None
    return moving(view)(call)


def permute(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    """Put the axes in another order."""
    return ids.transpose([d % tensor.dim() for d in call.arg(1, "dims")])


def transpose_all(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    """Turn the axes of a matrix round."""
    return ids.T


def transpose(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    """Swap two axes."""
    return ids.swapaxes(int(call.arg(1, "dim0")), int(call.arg(2, "dim1")))


def expand_(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    """Repeat along axes of size 1."""
    return align(ids, call.outs[0].dim())


def _take(ids: IntArray, index: int, dim: int) -> IntArray:
    taken: IntArray = ids[(slice(None),) * dim + (index,)]
    return taken


def select(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    """Take one place of an axis."""
    dim, index = int(call.arg(1, "dim")) % tensor.dim(), int(call.arg(2, "index"))
    return _take(ids, index if ids.shape[dim] > 1 else 0, dim)


def slice_(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    """Take a range of an axis."""
    dim = int(call.arg(1, "dim", 0)) % tensor.dim()
    if ids.shape[dim] == 1:
        return ids
    start, end, step = call.arg(2, "start"), call.arg(3, "end"), int(call.arg(4, "step", 1))
    for place in (start, end):
        if isinstance(place, int) and place:
            note_count(call, ids, dim, place if place > 0 else ids.shape[dim] + place)
    return collapse(ids[(slice(None),) * dim + (slice(start, end, step),)])


def split(call: Call) -> Result:
    """Cut an axis into parts."""
    if not call.outs or same_memory(call):
        return None
    value = call.value(call.args[0])
    dim = int(call.arg(2, "dim", 0)) % call.args[0].dim()
    if value.ids.shape[dim] == 1:
        return [value] * len(call.outs)
    sizes = [t.shape[dim] for t in call.outs]
    if len(set(sizes)) == 1:
        note_parts(call, value.ids, dim, len(sizes))
    ends = np.cumsum(sizes)[:-1]
    parts = np.split(value.ids, ends.tolist(), axis=dim)
    for part in parts:
        note_count(call, part, dim, part.shape[dim])
    return [value.moved(collapse(part)) for part in parts]


def unbind(call: Call) -> Result:
    """Take every place of an axis."""
    if not call.outs or same_memory(call):
        return None
    value = call.value(call.args[0])
    dim = int(call.arg(1, "dim", 0)) % call.args[0].dim()
    wide = value.ids.shape[dim] > 1
    return [value.moved(collapse(_take(value.ids, i if wide else 0, dim))) for i in range(len(call.outs))]


def _side_by_side(call: Call, tensors: Sequence[Tensor], values: list[Value], dim: int) -> Value:
    """Lay values side by side along `dim`."""
    if not any(v.has_channels for v in values):
        return nothing(values[0].ids.ndim, values[0].origin, is_filler=all(v.is_filler for v in values))
    ndim = values[0].ids.ndim
    axes = frozenset().union(*(varying(v.ids) for v in values)) - {dim}
    first = values[0].ids
    rates = {v.dropout for v in values}
    paths, dropout = joined([v.paths for v in values]), rates.pop() if len(rates) == 1 else 0.0
    scaling = frozenset().union(*(v.linear for v in values)) if all(v.linear for v in values) else frozenset()
    if dim not in varying(first) and all(np.array_equal(v.ids, first) for v in values):
        return Value(first, paths=paths, dropout=dropout, linear=scaling)
    for tensor, value in zip(tensors, values, strict=True):
        fixed = {k for k in axes - varying(value.ids) if tensor.shape[k] > 1 and tensor.stride(k) != 0}
        for other in values if fixed and (value.has_channels or not value.is_filler) else ():
            if varying(other.ids) & fixed:
                call.pin(other.ids, Code.BESIDE_NONE)
    parts = [expand(v.ids, t.shape, [*axes, dim]) for t, v in zip(tensors, values, strict=True)]
    if ndim and sum(p.size for p in parts) > SIZE_LIMIT:
        raise TooLargeError
    return Value(collapse(np.concatenate(parts, axis=dim)), paths=paths, dropout=dropout, linear=scaling)


def _beside(call: Call, tensors: Sequence[Tensor]) -> list[Value]:
    """Return the values of operands laid side by side: parameters keep the axis that the others' channels lie along."""
    known = [call.value(t) if call.view(t) is None else None for t in tensors]
    axes = frozenset().union(*(varying(v.ids) for v in known if v is not None))
    return [parameter_operand(call, t, axes or None) if v is None else v for t, v in zip(tensors, known, strict=True)]


def _extended(call: Call, tensors: Sequence[Tensor], values: list[Value], dim: int) -> list[Value]:
    """Tie parameters that are put in front of positions (a class token), whose channels lie along the same axes."""
    carrying = [v for t, v in zip(tensors, values, strict=True) if v.has_channels and call.view(t) is None]
    if not carrying or any(dim in varying(v.ids) or not np.array_equal(v.ids, carrying[0].ids) for v in carrying):
        return values
    first, out = carrying[0].ids, []
    for tensor, value in zip(tensors, values, strict=True):
        token = value.has_channels and call.view(tensor) is not None and value.ids.shape == first.shape
        if token:
            call.tie(first, value.ids)
        fits = token or (value.is_filler and not value.has_channels)
        out.append(value.moved(first) if fits else value)
    return out


def cat(call: Call) -> Result:
    """Lay tensors side by side along an axis."""
    tensors = [t for t in call.args[0] if t.dim() > 1 or t.numel()]
    if not tensors:
        return None
    dim = int(call.arg(1, "dim", 0)) % tensors[0].dim()
    tensors = [t for t in tensors if t.shape[dim]] or tensors  # what is empty along it lays nothing beside
    return _side_by_side(call, tensors, _extended(call, tensors, _beside(call, tensors), dim), dim)


def _one_width(call: Call, values: Sequence[Value], dim: int) -> None:
    """Give what is stacked one width: tied in places if flattening would lay it out in turns, else by shares."""
    carrying = [v for v in values if v.has_channels]
    if len({v.ids.tobytes() for v in carrying}) < 2:
        return
    if dim > min(min(varying(v.ids), default=dim) for v in carrying):
        for value in carrying[1:]:
            call.tie(carrying[0].ids, value.ids)
        return
    token = object()
    for value in carrying:
        call.trace.size_constraints[token].append(np.unique(value.ids[value.ids != 0]))


def stack(call: Call) -> Result:
    """Lay tensors side by side along a new axis."""
    tensors = list(call.args[0])
    dim = int(call.arg(1, "dim", 0)) % (tensors[0].dim() + 1)
    values = _beside(call, tensors)
    _one_width(call, values, dim)
    values = [v.moved(np.expand_dims(v.ids, dim)) for v in values]
    return _side_by_side(call, [t.unsqueeze(dim) for t in tensors], values, dim)


def flip(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    """Turn axes round."""
    return np.flip(ids, tuple(d % tensor.dim() for d in call.arg(1, "dims")))


def roll(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    """Move elements on along axes, and round."""
    shifts, dims = call.arg(1, "shifts"), call.arg(2, "dims", [])
    if not dims:
        return collapse(np.roll(expand(ids, tensor.shape), shifts))
    return np.roll(ids, tuple(shifts), axis=tuple(d % tensor.dim() for d in dims))


def rot90(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    """Turn two axes."""
    return np.rot90(ids, int(call.arg(1, "k", 1)), tuple(call.arg(2, "dims", (0, 1))))


def repeat(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    """Lay copies side by side."""
    repeats = list(call.arg(1, "repeats"))
    ids = align(ids, len(repeats))
    return np.tile(ids, [n if size > 1 else 1 for n, size in zip(repeats, ids.shape, strict=True)])


def padding(mode: Literal["constant", "reflect", "replicate"]) -> Rule:
    """Make a rule of an operator that pads; constants beside channels are none, and end what is known of the paths."""
    constant = mode == "constant"
    fills: Any = "edge" if mode == "replicate" else mode  # as numpy calls it

    def rule(call: Call) -> Result:
        tensor, pad = call.args[0], list(call.arg(1, "pad" if constant else "padding"))
        value = call.value(tensor)
        widths = [(0, 0)] * tensor.dim()
        for i in range(len(pad) // 2):
            widths[tensor.dim() - 1 - i] = (pad[2 * i], pad[2 * i + 1])
        ids = value.ids
        for axis in varying(ids):
            before, after = widths[axis]
            cut = [slice(None)] * ids.ndim
            cut[axis] = slice(max(0, -before), ids.shape[axis] - max(0, -after))
            ids = ids[tuple(cut)]
            grow = [(max(0, before), max(0, after)) if i == axis else (0, 0) for i in range(ids.ndim)]
            ids = np.pad(ids, grow, mode=fills)
        if len(pad) <= 2 * (tensor.dim() - 2) and not (constant and call.arg(2, "value", 0)):
            call.tracer.entries.padded(tensor, call.outs[0], tuple(int(n) for n in pad), mode)
        if not any(pad):
            return value
        if not value.has_channels:
            return nothing(tensor.dim(), value.origin, is_filler=value.is_filler and not constant)
        return replace(value, ids=ids, paths=drop_paths([value.paths]) if constant else value.paths, source=None)

    return rule


def pixel_shuffle(call: Call) -> Result:
    """Lay blocks of channels out as pixels; a block goes as a whole."""
    tensor = call.args[0]
    value = call.value(tensor)
    if not value.has_channels:
        return nothing(call.outs[0].dim(), value.origin, is_filler=value.is_filler)
    keep, ids = max(0, tensor.dim() - 3), value.ids
    if ids.shape[keep] > 1:
        blocks = ids.reshape(*ids.shape[:keep], -1, int(call.arg(1, "upscale_factor")) ** 2, *ids.shape[keep + 1 :])
        level(call, blocks, {keep + 1}, Code.LAID_OUT_WITH_NONE)
    return _rearranged(call, value)


def pixel_unshuffle(call: Call) -> Result:
    """Lay blocks of pixels out as channels."""
    value = call.value(call.args[0])
    if not value.has_channels:
        return nothing(call.outs[0].dim(), value.origin, is_filler=value.is_filler)
    return _rearranged(call, value)


def _rearranged(call: Call, value: Value) -> Value:
    """Execute a rearrangement of the last three axes on fully expanded ids of these."""
    tensor = call.args[0]
    wide = torch.from_numpy(np.array(expand(value.ids, tensor.shape, range(max(0, tensor.dim() - 3), tensor.dim()))))
    moved = getattr(torch.ops.aten, call.name)(wide, *call.args[1:], **call.kwargs)
    return value.moved(collapse(moved.numpy()))


def channel_shuffle(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    """Lay the channels of groups in turns."""
    groups = int(call.arg(1, "groups"))
    if ids.shape[1] == 1:
        return ids
    note_parts(call, ids, 1, groups)
    split = ids.reshape(ids.shape[0], groups, -1, *ids.shape[2:])
    return split.swapaxes(1, 2).reshape(ids.shape)


def copy_into(call: Call) -> Result:
    """Overwrite: an empty place takes the ids, channels already there are tied to the new ones."""
    target, source = call.args[0], call.args[1]
    if call.view(target) is not None or call.value(target).has_channels:
        return tie_broadcast(call, [target, source], target.dim())
    value = call.value(source)
    return replace(value, ids=align(value.ids, target.dim()), source=None)


def pack(call: Call) -> Result:
    """Lay the steps of sequences of several lengths one after the other; channels stay along the last axis."""
    value, last = parameter_operand(call, call.args[0]), call.args[0].dim() - 1
    if varying(value.ids) - {last}:
        call.pin_all(Code.PACKS)
        return None
    return [value.moved(value.ids.reshape(1, -1)), None]


def unfold(call: Call) -> Result:
    """Cut an axis into windows."""
    tensor = call.args[0]
    value = call.value(tensor)
    dim, size, step = (int(a) for a in (call.arg(1, "dimension"), call.arg(2, "size"), call.arg(3, "step")))
    ids = value.ids[..., None]
    dim %= max(1, tensor.dim())
    if ids.shape[dim] > 1:
        windows = [ids[(slice(None),) * dim + (slice(i, i + size),)] for i in range(0, ids.shape[dim] - size + 1, step)]
        ids = collapse(np.stack([w.swapaxes(dim, -1).squeeze(dim) for w in windows], axis=dim))
    return value.moved(ids)
