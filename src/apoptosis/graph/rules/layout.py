"""Operators that lay elements out anew: windows, strides, diagonals, complex numbers.

Holds: movements of which the channels of one element have to agree, and those along fixed positions.
Elsewhere: plain movements (rules/movement.py).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from torch import Tensor

from apoptosis.graph.explain import Code
from apoptosis.graph.rules.movement import same_memory
from apoptosis.graph.rules.normalization import parameter_operand
from apoptosis.graph.trace.operators import Result
from apoptosis.graph.trace.tracer import Call
from apoptosis.graph.trace.values import SIZE_LIMIT, collapse, drop_paths, expand, nothing, unpaired, varying
from apoptosis.records import IntArray


def _refused(call: Call, why: Code) -> Result:
    call.pin(call.value(call.args[0]).ids, why)
    return None


def pairs_as_complex(call: Call) -> Result:
    """Real and imaginary part of one number go together."""
    if same_memory(call):
        return None
    value = call.value(call.args[0])
    if value.ids.shape[-1] > 1:
        call.tie(value.ids[..., 0], value.ids[..., 1])
    return replace(value.moved(collapse(value.ids[..., 0])), paths=drop_paths([value.paths]))


def as_real(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    """Take real and imaginary part as two places of a new axis."""
    return ids[..., None]


def diagonal(call: Call, tensor: Tensor, ids: IntArray) -> IntArray:
    """Take the elements with equal places along two axes."""
    offset, dims = int(call.arg(1, "offset", 0)), (call.arg(2, "dim1", 0), call.arg(3, "dim2", 1))
    one, two = (int(d) % tensor.dim() for d in dims)
    return collapse(np.diagonal(expand(ids, tensor.shape, [one, two]), offset, one, two))


def as_strided(call: Call) -> Result:
    """Execute on ids laid out in memory as the tensor is."""
    if same_memory(call):
        return None
    tensor, out = call.args[0], call.outs[0]
    value = call.value(tensor)
    if not value.has_channels:
        return nothing(out.dim(), value.origin, is_filler=value.is_filler)
    start, size = out.storage_offset() - tensor.storage_offset(), 1 + _last(tensor)
    if max(size, out.numel()) > SIZE_LIMIT:
        return _refused(call, Code.READS_LARGE)
    flat = np.full(size, -1, dtype=np.int64)  # what lies between the operand's elements is not known
    _strided(flat, tensor)[...] = expand(value.ids, tensor.shape)
    if start < 0 or start + _last(out) >= size or bool((strided := _strided(flat[start:], out)).min(initial=0) < 0):
        return _refused(call, Code.READS_BEYOND)
    return value.moved(collapse(np.array(strided)))


def _last(tensor: Tensor) -> int:
    """Return where a tensor's last element lies, from its first."""
    return sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def _strided(flat: IntArray, tensor: Tensor) -> IntArray:
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, [8 * step for step in tensor.stride()])


def triangle(call: Call) -> Result:
    """Keep what lies on one side of the diagonal of the last two axes."""
    tensor = call.args[0]
    value = parameter_operand(call, tensor)
    if varying(value.ids) & {tensor.dim() - 2, tensor.dim() - 1}:
        call.pin(value.ids, Code.DIAGONAL)
    even = (
        {axis: object() for axis in range(-tensor.dim(), -2)} if value.is_filler else {}
    )  # filled, now its places differ
    paths = drop_paths([value.paths])
    return replace(value, paths=paths, source=None, linear=frozenset(), is_filler=False, even=even)


def im2col(call: Call) -> Result:
    """Each channel owns the positions of a kernel, one after the other."""
    tensor, taps = call.args[0], math.prod(call.arg(1, "kernel_size"))
    value = call.value(tensor)
    lead = tensor.dim() - 3
    if not value.has_channels:
        return nothing(call.outs[0].dim(), value.origin, is_filler=value.is_filler)
    if varying(value.ids) & {lead + 1, lead + 2}:
        return _refused(call, Code.WINDOWS)
    ids = value.ids[..., 0]
    ids = np.repeat(ids, taps, axis=lead) if ids.shape[lead] > 1 else ids
    return replace(value, ids=ids, paths=drop_paths([value.paths]), source=None)


def col2im(call: Call) -> Result:
    """Sum windows back into place: the positions of one kernel have to be one channel's."""
    tensor, taps = call.args[0], math.prod(call.arg(2, "kernel_size"))
    value = call.value(tensor)
    lead = tensor.dim() - 2
    if not value.has_channels:
        return nothing(call.outs[0].dim(), value.origin, is_filler=value.is_filler)
    ids = value.ids
    if ids.shape[lead] > 1:
        split = ids.reshape(*ids.shape[:lead], -1, taps, ids.shape[-1])
        call.tie(split, split[..., :1, :])  # a kernel's positions go together
        call.pin(unpaired(split, split[..., :1, :]), Code.ADDS_NONE)
        ids = split[..., 0, :]
    if ids.shape[-1] > 1:
        return _refused(call, Code.SUMS_WINDOWS)
    return replace(
        value, ids=collapse(ids[..., None]), paths=drop_paths([value.paths]), source=None, linear=frozenset()
    )
