"""Products of activations with one another: queries times keys, probabilities times values, a graph's adjacency.

Holds: channels multiplied and summed in pairs (which tie), sums over positions (which channels pass), and
scaled-dot-product attention as the two in a row. Elsewhere: contractions with a parameter
(rules/contraction.py).

Scores have no channels, but where every head of a query has its own, the scores carry one fresh id per head: whatever
else runs along the heads (a bias per head) ties with it, and the values' channels are contained in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from apoptosis.graph.explain import Code
from apoptosis.graph.trace.operators import Result, Rule
from apoptosis.graph.trace.result import Product, pairs_of, product_key
from apoptosis.graph.trace.tracer import Call
from apoptosis.graph.trace.values import (
    Axis,
    Multiple,
    Path,
    Value,
    align,
    collapse,
    drop_paths,
    expand,
    nothing,
    unpaired,
    varying,
)
from apoptosis.records import IntArray, ModuleOutput


@dataclass(slots=True)
class _Operand:
    """A tensor whose ids are laid out as (batch axes..., kept axis, contracted axis).

    levelled: channels ran along the kept axis too, and were tied along it (vectors that meet one another in pairs).
    """

    tensor: Tensor
    value: Value
    ids: IntArray
    levelled: bool = False

    @property
    def paired(self) -> bool:
        """Whether the contracted axis carries channels."""
        return bool(self.ids.shape[-1] > 1)

    @property
    def crossed(self) -> bool:
        """Whether the kept axis carries channels, too."""
        return bool(self.ids.shape[-2] > 1)

    @property
    def whole_linear(self) -> frozenset[Axis]:
        """The producers that every element scales with; none where `ids` does not hold all of theirs."""
        return frozenset() if self.levelled else self.value.linear

    def level(self, call: Call) -> _Operand:
        """Tie what stands at the same place of several vectors: any two of them are multiplied place by place."""
        if not self.crossed:
            return self
        call.tie(self.ids[..., 1:, :], self.ids[..., :1, :].repeat(self.ids.shape[-2] - 1, -2))
        call.pin(unpaired(self.ids, self.ids[..., :1, :]), Code.MULTIPLIES_NONE)
        return _Operand(self.tensor, self.value, self.ids[..., :1, :], levelled=True)


def _operand(call: Call, tensor: Tensor, ndim: int, *, flip: bool = False) -> _Operand:
    value = call.value(tensor)
    if tensor.dim() == 1:
        laid, ids = tensor[None, :], value.ids[None, :]
    else:
        laid = tensor.transpose(-1, -2) if flip else tensor
        ids = value.ids.swapaxes(-1, -2) if flip else value.ids
    while laid.dim() < ndim:
        laid = laid[None]
    return _Operand(laid, value, align(ids, max(ndim, 2)))


def _plain(call: Call, operand: _Operand, ids: IntArray) -> Axis | None:
    """Return the axis that made the operand, when nothing but movement and plain factors lie between."""
    value = operand.value
    if len(value.paths) != 1:
        return None
    axis, path = next(iter(value.paths.items()))
    found = call.trace.channel_ids.axes_of(ids)
    plain = path == Path() or (value.scaled and value.linear == {axis})
    return axis if plain and len(found) == 1 and found[0][:2] == axis else None


def _rows(left: _Operand, right: _Operand) -> tuple[IntArray, IntArray, IntArray, int] | None:
    """Ids of both operands as (rows, channels), the row of every batch entry, and the number of rows.

    Entries of the batch that read the same channels are one row; rows have to come round and round in one order.
    """
    batch = np.broadcast_shapes(left.ids.shape[:-2], right.ids.shape[:-2])
    size = left.tensor.shape[-1]
    a = np.broadcast_to(left.ids[..., 0, :], (*batch, size)).reshape(-1, size)
    b = np.broadcast_to(right.ids[..., 0, :], (*batch, size)).reshape(-1, size)
    _, first, row = np.unique(np.concatenate([a, b], 1), axis=0, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))
    row, first = order[row.reshape(-1)], np.sort(first)
    if not np.array_equal(row, np.tile(np.arange(first.size), row.size // first.size)):
        return None
    return a[first], b[first], row.reshape(batch), first.size


def _shown(operand: _Operand, other: _Operand, num_rows: int) -> Tensor:
    """Lay an operand out as (..., rows * channels)."""
    batch = np.broadcast_shapes(tuple(operand.tensor.shape[:-2]), tuple(other.tensor.shape[:-2]))
    kept, size = operand.tensor.shape[-2:]
    x = operand.tensor.expand(*batch, kept, size).reshape(-1, num_rows, kept, size)
    return x.transpose(1, 2).reshape(-1, kept, num_rows * size)


def _module_outputs(call: Call, left: _Operand, right: _Operand, num_rows: int) -> tuple[ModuleOutput, ...]:
    """Return the output of a module that each operand is, all of its rows in any order; () where one is none."""
    found = []
    for operand, other in ((left, right), (right, left)):
        known = call.tracer.outputs.elements(operand.tensor)
        if known is None:
            return ()
        name, width, numbers = known
        batch = np.broadcast_shapes(numbers.shape[:-2], tuple(other.tensor.shape[:-2]))
        kept, size = numbers.shape[-2:]
        laid = np.broadcast_to(numbers, (*batch, kept, size)).reshape(-1, num_rows, kept, size)
        rows, columns = np.divmod(laid.swapaxes(1, 2).reshape(-1, num_rows * size), width)
        each = bool((columns == columns[:1]).all() and (rows == rows[:, :1]).all())
        if not each or not np.array_equal(np.sort(rows[:, 0]), np.arange(len(rows))):
            return ()
        found.append(ModuleOutput(module=name, width=width, columns=columns[0]))
    return tuple(found)


def sum_of_products(call: Call, axis: int) -> Value | None:
    """Take a sum over an axis of products of channels, element by element, as a product of matrices.

    Returns: what is known of the sums, None where the operand is nothing of the kind.
    """
    tensor = call.args[0]
    factors = call.tracer.memory.factors(tensor)
    if factors is None or any(call.view(t) is not None for t in factors) or tensor.is_complex():
        return None
    values = [call.value(t) for t in factors]
    ids = [align(value.ids, tensor.dim()) for value in values]
    if any(max(varying(one), default=-1) != axis for one in ids):  # else sums over branches, place by place
        return None
    laid = [np.moveaxis(one, axis, -1)[..., None, :] for one in ids]
    if np.intersect1d(laid[0], laid[1]).size:  # times itself: as in a norm
        return None
    wide = [t.expand(tensor.shape).movedim(axis, -1)[..., None, :] for t in factors]
    left, right = (_Operand(*found) for found in zip(wide, values, laid, strict=True))
    macs = float(tensor.numel())
    call.trace.macs[call.tracer.mode] += macs
    heads, multiple = _pair(call, left, right, own_scale=False, macs=macs, stepwise=True)
    ndim = call.outs[0].dim()
    if heads is None:
        return replace(nothing(ndim, call.origin()), multiple=multiple)
    found = np.moveaxis(heads[..., 0], -1, axis) if ndim == tensor.dim() else heads[..., 0, 0]
    return Value(found, multiple=multiple)


def _pair(
    call: Call, left: _Operand, right: _Operand, *, own_scale: bool, macs: float, stepwise: bool = False
) -> tuple[IntArray | None, Multiple | None]:
    """Tie the channels that are multiplied in pairs.

    Returns: the ids of the heads, (batch axes..., 1, 1), or None where scores carry none; what the sums are a multiple
    of.
    """
    tracer, trace = call.tracer, call.trace
    read = [np.unique(operand.ids) for operand in (left, right)]
    left, right = left.level(call), right.level(call)
    a, b = left.ids[..., 0, :], right.ids[..., 0, :]
    trace.tie(a, b)
    call.pin(unpaired(a, b), Code.MULTIPLIES_NONE)
    trace.count_product(a, tracer.mode, macs)
    laid = _rows(left, right)
    if laid is None:
        call.pin(a, Code.OTHER_ORDER)
        return None, None
    ids_left, ids_right, row, num_rows = laid
    fold = None if right.levelled else _plain(call, right, ids_right.reshape(-1))
    if fold is None:
        swapped = None if left.levelled else _plain(call, left, ids_left.reshape(-1))
        if swapped is not None or (own_scale and not left.value.linear):
            left, right, ids_left, ids_right, fold = right, left, ids_right, ids_left, swapped
    linear = left.value.linear or right.value.linear  # of keys some may be cached, which nothing scales
    if own_scale and not linear:
        call.pin(a, Code.OWN_ROOT)
    ids_left, ids_right = ids_left.reshape(-1), ids_right.reshape(-1)
    product = Product(tracer.module_name, ids_left, ids_right, fold, own_scale, linear, num_rows)
    product.stepwise = stepwise
    product.scales_right = not left.value.linear
    product.sides = (left.whole_linear, right.whole_linear)
    while (known := trace.products.setdefault(product_key(product), product)) is not product:
        if np.array_equal(known.left, product.left) and np.array_equal(known.right, product.right):
            break
        product.number += 1  # the module multiplies other channels, too: queries with keys and with positions
    trace.uses += [(ids, pairs_of(product)) for ids in read]
    known.own_scale = known.own_scale or own_scale
    known.scales_right = known.scales_right or product.scales_right
    known.sides = (known.sides[0] & left.whole_linear, known.sides[1] & right.whole_linear)
    known.macs[tracer.mode] += macs
    if not tracer.watched:
        known.shown[tracer.mode].append(_module_outputs(call, left, right, num_rows))
    tracer.show(product_key(known), lambda: (_shown(left, right, num_rows), _shown(right, left, num_rows)))
    found = [number for operand in (left, right) for number in tracer.numbers.of_channels(operand.value)]
    multiple = Multiple(pairs_of(product), tuple(sorted(found)))
    if num_rows == 1:
        return None, multiple
    heads = trace.channel_ids.fresh(num_rows)
    for ids in (ids_left.reshape(num_rows, -1), ids_right.reshape(num_rows, -1)):
        if np.unique(ids[:, 0]).size > 1:  # keys that all heads share are in none of them
            trace.contain(heads[:, None], ids, tracer.module_name)
    return collapse(heads[row])[..., None, None], multiple


def _pass(call: Call, weights: IntArray | None, b: _Operand, macs: float) -> Value:
    """Sum over positions: what carries channels beside the summed axis goes through."""
    tracer, trace = call.tracer, call.trace
    ids = b.ids[..., :1].swapaxes(-1, -2)  # (batch axes..., 1, kept axis of b)
    trace.count_product(ids, tracer.mode, macs)
    paths = drop_paths([b.value.paths])
    if weights is None:
        return Value(ids, paths=paths, linear=b.value.linear) if b.value.has_channels else nothing(ids.ndim)
    if not b.value.has_channels:
        call.pin(weights, Code.SUMS_NONE)
        return Value(collapse(weights), paths=paths)
    if np.array_equal(collapse(weights), collapse(ids)):
        return Value(ids, paths=paths)
    of_heads = trace.channel_ids.is_fresh(weights)
    if not of_heads or not varying(weights) <= varying(ids):
        call.pin(weights, Code.NOT_INSIDE)
        if not of_heads and not varying(weights) < varying(ids):  # else rows stay, as they must
            call.pin(ids, Code.WEIGHED)
        return Value(ids, paths=paths, linear=b.value.linear)
    trace.contain(weights, ids, tracer.module_name)
    return Value(ids, paths=paths, linear=b.value.linear)


def _credit(call: Call, value: Value, macs: float) -> None:
    """Count a contraction with a computed weight to the rows that it is computed from."""
    for axis in value.paths:
        call.trace.axis_macs[axis][call.tracer.mode] += macs / len(value.paths)


def lone_pair(call: Call, a: Tensor, b: Tensor) -> bool:
    """Whether one channel of each is multiplied, all that is left of queries and keys (on its own in every head)."""
    if a.dim() < 2 or b.dim() < 2 or a.shape[-1] != 1 or call.view(a) or call.view(b):
        return False
    for tensor in (a, b):
        value, last = call.value(tensor), {tensor.dim() - 2, tensor.dim() - 1}
        if not value.has_channels or varying(value.ids) & last or call.trace.channel_ids.is_fresh(value.ids):
            return False
    return True


def multiply(call: Call, a: Tensor, b: Tensor, ndim: int, macs: float) -> Value:
    """Matrix product of two activations: the last axis of `a` with the last but one of `b`."""
    wide = max(a.dim(), b.dim(), 2)
    left, right = _operand(call, a, wide), _operand(call, b, wide, flip=True)
    if (left.paired and right.paired) or lone_pair(call, a, b):
        if a.is_complex():
            for operand in (left, right):
                call.pin(operand.value.ids, Code.COMPLEX_PRODUCT)
            return nothing(ndim, call.origin())
        heads, multiple = _pair(call, left, right, own_scale=False, macs=macs)
        scores = nothing(ndim, call.origin()) if heads is None else Value(_fit(heads, a, b, ndim))
        return replace(scores, multiple=multiple)
    for operand in (left, right):
        if operand.paired:
            call.pin(operand.value.ids, Code.NO_LAYER)
    if left.paired != right.paired:  # what lies along the other axis goes on: the rows of a computed weight
        _credit(call, (right if left.paired else left).value, macs)
        macs = 0.0
        left.ids, right.ids = left.ids[..., :1] * (not left.paired), right.ids[..., :1] * (not right.paired)
    if left.crossed and not right.crossed and varying(right.ids):
        for operand in (left, right):
            call.pin(operand.value.ids, Code.OTHER_AXIS)
        return nothing(ndim, call.origin())
    if left.crossed and right.crossed:  # keys times values, summed over positions: an element carries one channel here
        call.pin(left.value.ids, Code.OTHER_AXIS)
    weights = left.ids if left.value.has_channels and not left.crossed else None
    from_left = left.crossed and not right.crossed
    passed = _pass(call, weights, left if from_left else right, macs)
    return replace(passed, ids=_fit(passed.ids.swapaxes(-1, -2) if from_left else passed.ids, a, b, ndim))


def _fit(ids: IntArray, a: Tensor, b: Tensor, ndim: int) -> IntArray:
    """Drop the axes that operands of one axis do not leave."""
    if a.dim() == 1:
        ids = ids[..., 0, :]
    if b.dim() == 1:
        ids = ids[..., 0]
    return ids.reshape(ids.shape[ids.ndim - ndim :]) if ids.ndim > ndim else ids


def attention(mask_name: str = "", *, has_mask: bool = True) -> Rule:
    """Make a rule of scaled-dot-product attention. mask_name: of the mask, where it is given by name alone."""

    def rule(call: Call) -> Result:
        if mask_name or not has_mask:
            return _attention(call, call.kwargs.get(mask_name))
        return _attention(call, call.arg(3, "attn_mask", call.kwargs.get("attn_bias")))

    return rule


def _attention(call: Call, mask: Any) -> Result:
    """Follow operands of (..., length, channels) each; queries of several heads may share a key's."""
    query, key, value = call.args[:3]
    ndim = query.dim()
    num = query.shape[-3] if ndim > 3 else 1
    macs = float(query.numel()) * key.shape[-2]
    summed = float(query.shape[:-1].numel()) * value.shape[-2:].numel()
    call.trace.macs[call.tracer.mode] += macs + summed
    left, right, values = (_operand(call, t, ndim) for t in (query, key, value))
    right, values = (_repeated(operand, num) for operand in (right, values))
    scale = call.kwargs.get("scale")
    own = scale is None and not isinstance(call.tracer.module, nn.MultiheadAttention)  # that one keeps its scale itself
    heads: IntArray | None = None
    if any(operand.crossed for operand in (left, right, values)) or left.paired != right.paired:
        for operand in (left, right, values):
            call.pin(operand.value.ids, Code.ATTENDS_ALONG)
        return [nothing(out.dim()) for out in call.outs]
    if left.paired:
        heads, multiple = _pair(call, left, right, own_scale=own, macs=macs)
        call.tracer.numbers.fused(call, multiple, (*call.args[2:4], call.kwargs.get("attn_mask")))
    view = call.view(mask) if isinstance(mask, Tensor) else None
    if isinstance(mask, Tensor) and view is None and heads is not None:
        met = align(call.value(mask).ids, ndim)
        call.tie(heads, met)
        if mask.dim() > 2 and mask.shape[-3] > 1 and mask.stride(-3) != 0 and met.shape[-3] == 1:
            call.pin(heads, Code.MASK_PER_HEAD)
    elif view is not None:
        call.pin_parameter(view.info, Code.SCORE_BIAS)
        if heads is not None:
            call.pin(heads, Code.BIASED_SCORES)
    flipped = _Operand(values.tensor, values.value, values.ids.swapaxes(-1, -2))
    passed = _pass(call, heads, flipped, summed)
    return [passed, *[nothing(out.dim()) for out in call.outs[1:]]]


def _repeated(operand: _Operand, num_heads: int) -> _Operand:
    """Repeat the heads of keys and values as grouped-query attention does."""
    if operand.tensor.dim() < 4 or operand.tensor.shape[-3] in (1, num_heads):
        return operand
    times = num_heads // operand.tensor.shape[-3]
    wide = np.repeat(expand(operand.ids, operand.tensor.shape, [operand.ids.ndim - 3]), times, axis=-3)
    return _Operand(operand.tensor.repeat_interleave(times, -3), operand.value, wide)
