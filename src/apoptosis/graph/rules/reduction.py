"""Operators that reduce, order, transform or pool along some axes.

Holds: what lets channels through while the axes it works along carry none, and pins them else. Elsewhere:
normalisations that torch knows as one operator (rules/normalization.py), contractions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from apoptosis.graph.explain import ROWS_REMEDY, Code, opt_in
from apoptosis.graph.rules.broadcast import level, tie_broadcast
from apoptosis.graph.rules.normalization import parameter_operand
from apoptosis.graph.rules.product import sum_of_products
from apoptosis.graph.trace.operators import Result, Rule
from apoptosis.graph.trace.tracer import Call
from apoptosis.graph.trace.values import Paths, Value, drop_paths, unpaired, varying
from apoptosis.records import IntArray

Pooled = Literal["", "average", "largest"]


@dataclass(frozen=True, slots=True)
class _Reduction:
    """How an operator reduces. dim, default: place and default of that argument.

    sums, averages: it adds up what it reduces, or compares it with its average. chooses: it takes one of the elements.
    scales: its result scales as its operand does. pools: of what kind it is where positions are reduced.
    """

    dim: int = 1
    default: int | None = None
    sums: bool = False
    averages: bool = False
    chooses: bool = False
    scales: bool = False
    pools: Pooled = ""


def reduces(dim: int = 1, default: int | None = None, **how: Any) -> Rule:
    """Make a rule of an operator that reduces over axes: those with channels pin. how: see `_Reduction`."""
    reduction = _Reduction(dim, default, **how)
    return lambda call: _reduce(call, reduction)


def _axes(call: Call, position: int, default: int | None, ndim: int) -> frozenset[int]:
    """Return the axes that the argument `dim` names; all where it names none."""
    dims = call.arg(position, "dim", default)
    if dims is None or isinstance(dims, bool) or dims == []:  # var(x, unbiased)
        return frozenset(range(ndim))
    return frozenset(axis % max(1, ndim) for axis in (dims if isinstance(dims, (list, tuple)) else [dims]))


def _reduce(call: Call, how: _Reduction) -> Result:
    tensor, is_sum = call.args[0], call.operator.role == "sums"
    reduced = _axes(call, how.dim, how.default, tensor.dim())
    if is_sum and len(reduced) == 1 and (sums := sum_of_products(call, min(reduced))) is not None:
        return sums
    value = parameter_operand(call, tensor, set(range(tensor.dim())) - reduced)
    adds = how.sums or how.averages
    meeting, rest = reduced & varying(value.ids), varying(value.ids) - reduced
    inner = bool(meeting and rest) and min(meeting) > max(rest)
    if meeting and rest and (how.chooses or (adds and not inner)):
        value = _place_by_place(call, value, reduced, "chooses between" if how.chooses else "combines")
    if reduced & varying(value.ids):
        rows = None if not rest or not adds else _rows(call, value, reduced)
        if how.averages:
            remedy = opt_in(call.tracer.module) if rows is None else ROWS_REMEDY
            call.pin(value.ids, Code.AVERAGES, remedy, inner=rows is not None)
        else:
            call.pin(value.ids, Code.SUMS if is_sum else Code.REDUCES, inner=rows is not None)
        if rows is None:
            return None
        value = Value(rows, paths=drop_paths([value.paths]))
    if not call.outs:
        return None
    keepdim = call.outs[0].dim() == tensor.dim()
    ids = value.ids if keepdim else value.ids.reshape([n for i, n in enumerate(value.ids.shape) if i not in reduced])
    result = replace(
        _ended(value),
        ids=ids,
        paths=_pooled(value.paths, how.pools),
        linear=value.linear if how.scales else frozenset(),
        even=value.even,
        scaled=False,
    )
    return [result] * len(call.outs)


def _rows(call: Call, value: Value, reduced: frozenset[int]) -> IntArray | None:
    """Give every row that is reduced by itself (a head, say) an id of its own, which contains its channels.

    None where some elements of a row carry no channel, or ids of rows already.
    """
    trace, ids = call.trace, value.ids
    axes = sorted(reduced & varying(ids))
    wide = np.moveaxis(ids, axes, range(-len(axes), 0))
    flat = wide.reshape(-1, math.prod(ids.shape[axis] for axis in axes))
    if bool((flat == 0).any()) or not trace.channel_ids.is_owned(flat):
        return None
    rows, place = np.unique(flat, axis=0, return_inverse=True)
    fresh = trace.channel_ids.fresh(len(rows))
    trace.contain(fresh[:, None], rows, call.tracer.module_name, part=True)
    return fresh[place.reshape(-1)].reshape([1 if axis in axes else size for axis, size in enumerate(ids.shape)])


def _place_by_place(call: Call, value: Value, reduced: frozenset[int], verb: str = "combines") -> Value:
    """Tie the channels that meet at each place of the other axes, as an elementwise maximum, or a sum, does."""
    first = level(call, value.ids, reduced & varying(value.ids), Code.REDUCES_WITH_NONE(verb=verb))
    return replace(value, ids=first, paths=drop_paths([value.paths]), even={})


def _pooled(paths: Paths, how: Pooled) -> Paths:
    if not how:
        return drop_paths([paths])
    return {
        key: None if path is None else replace(path, pooled=True, max_pool=path.max_pool or how == "largest")
        for key, path in paths.items()
    }


def _ended(value: Value) -> Value:
    """Return the value after something that is no neuron type."""
    return replace(
        value, paths=drop_paths([value.paths]), dropout=0.0, source=None, keep=None, linear=frozenset(), even={}
    )


def works_along(
    dim: int = 1,
    default: int | None = None,
    *,
    why: Code = Code.NORMALISES_ALONG,
    softmax: bool = False,
    linear: bool = False,
) -> Rule:
    """Make a rule of an operator that mixes elements along axes: those with channels pin.

    dim, default: place and default of that argument. softmax: the elements that meet share one sum. linear: what is
    zero adds nothing.
    """

    def rule(call: Call) -> Result:
        tensor = call.args[0]
        mixed = _axes(call, dim, default, tensor.dim())
        value = parameter_operand(call, tensor, set(range(tensor.dim())) - mixed)
        if mixed & varying(value.ids) and linear:
            value = replace(value, ids=_beside_zeros(value.ids, tensor, mixed))
        meeting, rest = mixed & varying(value.ids), varying(value.ids) - mixed
        if meeting and rest and softmax:
            if min(meeting) < max(rest):  # rows beside one another, as the branches of a split attention
                _place_by_place(call, value, mixed)
            else:
                call.pin(value.ids, why, ROWS_REMEDY, inner=True)
                _rows(call, value, mixed)
        elif meeting:
            call.pin(value.ids, why)
            return None
        return [_ended(value)] * len(call.outs)

    return rule


def _beside_zeros(ids: IntArray, tensor: Tensor, mixed: frozenset[int]) -> IntArray:
    """Return the ids without axes along which there is one channel and zeros: frequencies that were left out."""
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        return ids
    found = ids
    for axis in sorted(mixed & varying(ids)):
        top = found.max(axis, keepdims=True)
        if not bool(((found == top) | (found == 0)).all()):
            return ids
        found = top
    empty = torch.from_numpy(np.array(np.broadcast_to(ids == 0, tensor.shape))).to(tensor.device)
    return ids if bool(tensor.detach().masked_select(empty).any()) else found


def pools(how: Pooled = "", *, windows: bool = False, unpools: bool = False, samples: bool = False) -> Rule:
    """Make a rule of an operator that pools or resizes; its name says along how many axes ("max_pool2d").

    windows: the operator takes padding and a divisor, with which an average is none. unpools: a second operand says
    where elements go. samples: it says at which positions they are read.
    """

    def rule(call: Call) -> Result:
        tensor = call.args[0]
        num = next(int(c) for c in call.name if c in "123")
        if unpools:
            value = tie_broadcast(call, call.tensors()[:2], tensor.dim())
        else:
            value = parameter_operand(call, tensor, range(tensor.dim() - num))
        if samples:
            call.pin(call.value(call.args[1]).ids, Code.SAMPLES)
        if any(axis >= tensor.dim() - num for axis in varying(value.ids)):
            neighbours = isinstance(call.tracer.module, nn.LocalResponseNorm)
            call.pin(value.ids, Code.NEIGHBOURS if neighbours else Code.POOLS)
            return None
        pads = windows and (
            np.any(call.arg(3, "padding", 0))
            or call.arg(4, "ceil_mode") is True
            or call.arg(6, "divisor_override") is not None
        )
        paths, linear = _pooled(value.paths, "" if pads else how), frozenset() if unpools else value.linear
        return [replace(_ended(value), paths=paths, linear=linear, scaled=False)] * len(call.outs)

    return rule


def glu(call: Call) -> Result:
    """Tie the two halves: out = a sigmoid(b)."""
    tensor = call.args[0]
    value = call.value(tensor)
    dim = int(call.arg(1, "dim", -1)) % tensor.dim()
    if dim not in varying(value.ids):
        return _ended(value)
    first, second = np.split(value.ids, 2, axis=dim)
    call.tie(first, second)
    call.pin(unpaired(first, second), Code.GATES_NONE)
    return Value(first, paths=drop_paths([value.paths]))


def has_second_operand(call: Call) -> bool:
    """Whether max and min are called with two tensors: then they are elementwise."""
    return any(isinstance(t, Tensor) for t in call.args[1:])
