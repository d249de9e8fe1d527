"""Operators that only move data: executed on the ids.

Holds: one short function per family of movement. Elsewhere: arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apoptosis.graph.explain import Code
from apoptosis.graph.rules.broadcast import tie_broadcast
from apoptosis.graph.rules.normalization import parameter_operand
from apoptosis.graph.rules.notes import note_axes, note_count, note_parts, note_split
from apoptosis.graph.trace.tracer import Call, Result, Rule
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
    return bool(call.outs) and call.tracer.view(call.outs[0]) is not None


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


def _copy(call: Call) -> Result:
    """Copy in the same shape; one laid out as a parameter's view stands for the parameter."""
    if same_memory(call) or call.tracer.memory.adopt(call.outs[0], call.args[0]):
        return None
    return parameter_operand(call, call.args[0])


def _reshape(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    new = reshape(ids, tensor.shape, call.outs[0].shape)
    if call.name not in ("squeeze", "unsqueeze"):
        note_split(call, ids, tensor.shape, new, call.outs[0].shape)
        note_axes(call, new, call.arg(1, "size", ()))
    return new


def _view(call: Call) -> Result:
    if call.overload == "dtype" and call.outs[0].shape != call.args[0].shape:
        call.pin_all(Code.NO_RULE)
        return None
    return moving(_reshape)(call)


def _permute(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    return ids.transpose([d % tensor.dim() for d in call.arg(1, "dims")])


def _transpose(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    if call.name == "t":
        return ids.T
    return ids.swapaxes(int(call.arg(1, "dim0")), int(call.arg(2, "dim1")))


def _expand(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    return align(ids, call.outs[0].dim())


def _take(ids: IntArray, index: int, dim: int) -> IntArray:
    taken: IntArray = ids[(slice(None),) * dim + (index,)]
    return taken


def _select(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    dim, index = int(call.arg(1, "dim")) % tensor.dim(), int(call.arg(2, "index"))
    return _take(ids, index if ids.shape[dim] > 1 else 0, dim)


def _slice(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    dim = int(call.arg(1, "dim", 0)) % tensor.dim()
    if ids.shape[dim] == 1:
        return ids
    start, end, step = call.arg(2, "start"), call.arg(3, "end"), int(call.arg(4, "step", 1))
    for place in (start, end):
        if isinstance(place, int) and place:
            note_count(call, ids, dim, place if place > 0 else ids.shape[dim] + place)
    return collapse(ids[(slice(None),) * dim + (slice(start, end, step),)])


def _split(call: Call) -> Result:
    if not call.outs or same_memory(call):
        return None
    value = call.tracer.value(call.args[0])
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


def _unbind(call: Call) -> Result:
    if not call.outs or same_memory(call):
        return None
    value = call.tracer.value(call.args[0])
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
    known = [call.tracer.value(t) if call.tracer.view(t) is None else None for t in tensors]
    axes = frozenset().union(*(varying(v.ids) for v in known if v is not None))
    return [parameter_operand(call, t, axes or None) if v is None else v for t, v in zip(tensors, known, strict=True)]


def _extended(call: Call, tensors: Sequence[Tensor], values: list[Value], dim: int) -> list[Value]:
    """Tie parameters that are put in front of positions (a class token), whose channels lie along the same axes."""
    live = [v for t, v in zip(tensors, values, strict=True) if v.has_channels and call.tracer.view(t) is None]
    if not live or any(dim in varying(v.ids) or not np.array_equal(v.ids, live[0].ids) for v in live):
        return values
    first, out = live[0].ids, []
    for tensor, value in zip(tensors, values, strict=True):
        token = value.has_channels and call.tracer.view(tensor) is not None and value.ids.shape == first.shape
        if token:
            call.tracer.findings.tie(first, value.ids)
        fits = token or (value.is_filler and not value.has_channels)
        out.append(value.moved(first) if fits else value)
    return out


def _cat(call: Call) -> Result:
    tensors = [t for t in call.args[0] if t.dim() > 1 or t.numel()]
    if not tensors:
        return None
    dim = int(call.arg(1, "dim", 0)) % tensors[0].dim()
    tensors = [t for t in tensors if t.shape[dim]] or tensors  # what is empty along it lays nothing beside
    return _side_by_side(call, tensors, _extended(call, tensors, _beside(call, tensors), dim), dim)


def _one_width(call: Call, values: Sequence[Value], dim: int) -> None:
    """Let what is stacked keep one width: place by place where flattening would lay it out in turns, else as shares."""
    live = [v for v in values if v.has_channels]
    if len({v.ids.tobytes() for v in live}) < 2:
        return
    if dim > min(min(varying(v.ids), default=dim) for v in live):
        for value in live[1:]:
            call.tracer.findings.tie(live[0].ids, value.ids)
        return
    token = object()
    for value in live:
        call.tracer.findings.extents[token].append(np.unique(value.ids[value.ids != 0]))


def _stack(call: Call) -> Result:
    tensors = list(call.args[0])
    dim = int(call.arg(1, "dim", 0)) % (tensors[0].dim() + 1)
    values = _beside(call, tensors)
    _one_width(call, values, dim)
    values = [v.moved(np.expand_dims(v.ids, dim)) for v in values]
    return _side_by_side(call, [t.unsqueeze(dim) for t in tensors], values, dim)


def _flip(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    return np.flip(ids, tuple(d % tensor.dim() for d in call.arg(1, "dims")))


def _roll(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    shifts, dims = call.arg(1, "shifts"), call.arg(2, "dims", [])
    if not dims:
        return collapse(np.roll(expand(ids, tensor.shape), shifts))
    return np.roll(ids, tuple(shifts), axis=tuple(d % tensor.dim() for d in dims))


def _rot90(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    return np.rot90(ids, int(call.arg(1, "k", 1)), tuple(call.arg(2, "dims", (0, 1))))


def _repeat(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    repeats = list(call.arg(1, "repeats"))
    ids = align(ids, len(repeats))
    return np.tile(ids, [n if size > 1 else 1 for n, size in zip(repeats, ids.shape, strict=True)])


def _pad(call: Call) -> Result:
    """Pad; constants beside channels are no channels, and end what is known of the way here."""
    tensor, pad = call.args[0], list(call.arg(1, "pad" if call.name == "constant_pad_nd" else "padding"))
    value = call.tracer.value(tensor)
    widths = [(0, 0)] * tensor.dim()
    for i in range(len(pad) // 2):
        widths[tensor.dim() - 1 - i] = (pad[2 * i], pad[2 * i + 1])
    ids = value.ids
    for axis in varying(ids):
        before, after = widths[axis]
        cut = [slice(None)] * ids.ndim
        cut[axis] = slice(max(0, -before), ids.shape[axis] - max(0, -after))
        ids = ids[tuple(cut)]
        mode: Any = {"reflection": "reflect", "replication": "edge"}.get(call.name.split("_")[0], "constant")
        grow = [(max(0, before), max(0, after)) if i == axis else (0, 0) for i in range(ids.ndim)]
        ids = np.pad(ids, grow, mode=mode)
    _note_padded(call, tensor, pad)
    if not any(pad):
        return value
    if not value.has_channels:
        return nothing(tensor.dim(), value.origin, is_filler=value.is_filler and call.name != "constant_pad_nd")
    paths = drop_paths([value.paths]) if call.name == "constant_pad_nd" else value.paths
    return replace(value, ids=ids, paths=paths, source=None)


def _note_padded(call: Call, tensor: Tensor, pad: Sequence[int]) -> None:
    """Note what the surroundings of feature maps are filled with, where a function of torch fills them so again."""
    mode = {"reflection": "reflect", "replication": "replicate"}.get(call.name.split("_")[0], "constant")
    if len(pad) <= 2 * (tensor.dim() - 2) and not (mode == "constant" and call.arg(2, "value", 0)):
        call.tracer.entries.padded(tensor, call.outs[0], tuple(int(n) for n in pad), mode)


def _trailing(call: Call) -> Result:
    """Rearrangements of the last three axes, executed on fully expanded ids of those."""
    tensor = call.args[0]
    value = call.tracer.value(tensor)
    if not value.has_channels:
        return nothing(call.outs[0].dim(), value.origin, is_filler=value.is_filler)
    keep = max(0, tensor.dim() - 3) if call.name.startswith("pixel") else 0
    if call.name == "pixel_shuffle" and value.ids.shape[keep] > 1:  # the operator takes whole blocks only
        ids = value.ids
        blocks = ids.reshape(*ids.shape[:keep], -1, int(call.arg(1, "upscale_factor")) ** 2, *ids.shape[keep + 1 :])
        call.tracer.findings.tie(blocks, np.broadcast_to(blocks.take([0], axis=keep + 1), blocks.shape))
        broken = (blocks == 0).any(axis=keep + 1, keepdims=True)
        call.pin(np.where(broken, blocks, 0), Code.LAID_OUT_WITH_NONE)
    wide = torch.from_numpy(np.array(expand(value.ids, tensor.shape, range(keep, tensor.dim()))))
    moved = getattr(torch.ops.aten, call.name)(wide, *call.args[1:], **call.kwargs)
    return value.moved(collapse(moved.numpy()))


def _channel_shuffle(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    groups = int(call.arg(1, "groups"))
    if ids.shape[1] == 1:
        return ids
    note_parts(call, ids, 1, groups)
    split = ids.reshape(ids.shape[0], groups, -1, *ids.shape[2:])
    return split.swapaxes(1, 2).reshape(ids.shape)


def _copy_into(call: Call) -> Result:
    """Overwrite: an empty place takes the ids, channels already there are tied to the new ones."""
    target, source = call.args[0], call.args[1]
    if call.tracer.view(target) is not None or call.tracer.value(target).has_channels:
        return tie_broadcast(call, [target, source], target.dim())
    value = call.tracer.value(source)
    return replace(value, ids=align(value.ids, target.dim()), source=None)


def _pack(call: Call) -> Result:
    """Lay the steps of sequences of several lengths one after the other; channels stay along the last axis."""
    value, last = parameter_operand(call, call.args[0]), call.args[0].dim() - 1
    if varying(value.ids) - {last}:
        call.pin_all(Code.PACKS)
        return None
    return [value.moved(value.ids.reshape(1, -1)), None]


def _unfold(call: Call) -> Result:
    tensor = call.args[0]
    value = call.tracer.value(tensor)
    dim, size, step = (int(a) for a in (call.arg(1, "dimension"), call.arg(2, "size"), call.arg(3, "step")))
    ids = value.ids[..., None]
    dim %= max(1, tensor.dim())
    if ids.shape[dim] > 1:
        windows = [ids[(slice(None),) * dim + (slice(i, i + size),)] for i in range(0, ids.shape[dim] - size + 1, step)]
        ids = collapse(np.stack([w.swapaxes(dim, -1).squeeze(dim) for w in windows], axis=dim))
    return value.moved(ids)


MOVES: dict[str, Rule] = {
    **{name: _copy for name in ("clone", "_to_copy", "alias", "detach", "contiguous", "lift_fresh", "positive", "to")},
    **{name: _copy for name in ("lift", "lift_fresh_copy", "detach_copy", "_conj", "resolve_conj", "resolve_neg")},
    **{
        name: moving(_reshape)
        for name in ("_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "flatten")
    },
    "view": _view,
    "permute": moving(_permute),
    **{name: moving(_transpose) for name in ("t", "transpose", "swapaxes", "swapdims")},
    "expand": moving(_expand),
    "select": moving(_select),
    "slice": moving(_slice),
    **{name: _split for name in ("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")},
    "unbind": _unbind,
    "cat": _cat,
    "stack": _stack,
    "flip": moving(_flip),
    "roll": moving(_roll),
    "rot90": moving(_rot90),
    "repeat": moving(_repeat),
    **{name: _pad for name in ("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d")},
    **{name: _pad for name in ("replication_pad1d", "replication_pad2d", "replication_pad3d")},
    "pixel_shuffle": _trailing,
    "pixel_unshuffle": _trailing,
    "channel_shuffle": moving(_channel_shuffle),
    "native_channel_shuffle": moving(_channel_shuffle),
    "copy": _copy_into,
    "unfold": _unfold,
    "_pack_padded_sequence": _pack,
    "_neg_view": _copy,
    "_pin_memory": _copy,
}
"""Operator name -> rule."""
