"""Operators that reduce, order, transform or pool along some axes.

Holds: what lets channels through while the axes it works along carry none, and pins them else. Elsewhere:
normalisations that torch knows as one operator (rules/normalization.py), contractions.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from apoptosis.graph.explain import ROWS_REMEDY, Code, opt_in
from apoptosis.graph.rules.broadcast import tie_broadcast
from apoptosis.graph.rules.normalization import parameter_operand
from apoptosis.graph.rules.product import sum_of_products
from apoptosis.graph.trace.tracer import Call, Result, Rule
from apoptosis.graph.trace.values import Paths, Value, drop_paths, varying
from apoptosis.records import IntArray

# Position and default of the `dim` argument.
_REDUCTIONS = {
    "sum": 1, "mean": 1, "amax": 1, "amin": 1, "max": 1, "min": 1, "var": 1, "std": 1, "var_mean": 1, "std_mean": 1,
    "prod": 1, "all": 1, "any": 1, "argmax": 1, "argmin": 1, "logsumexp": 1, "median": 1, "nansum": 1,
    "count_nonzero": 1, "norm": 2, "linalg_vector_norm": 2, "nanmedian": 1, "aminmax": 1, "kthvalue": 2, "mode": 1,
    "_assert_async": 9, "special_logsumexp": 1, "trace": 9, "histc": 9, "bincount": 9, "is_nonzero": 9,
}  # fmt: skip
_LAST = frozenset(("kthvalue", "mode", "sort", "topk"))
_AVERAGES = frozenset(("mean", "var", "std", "var_mean", "std_mean"))
_SUMS = _AVERAGES | frozenset(("sum", "nansum", "norm", "linalg_vector_norm", "logsumexp", "special_logsumexp"))
_HOMOGENEOUS = frozenset(("mean", "sum", "amax", "amin", "max", "min"))  # over positions: scale as their operand does
_EXTREMES = frozenset(("amax", "amin", "max", "min"))
_SOFTMAX = frozenset(("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax"))
_ALONG = {"_softmax": 1, "_log_softmax": 1, "_safe_softmax": 1, "softmax": 1, "log_softmax": 1, "cumsum": 1,
          "cumprod": 1, "logcumsumexp": 1, "cummax": 1, "cummin": 1, "_cummax_helper": 3, "_cummin_helper": 3,
          "sort": 1, "topk": 2, "_fft_c2c": 1, "_fft_r2c": 1, "_fft_c2r": 1}  # fmt: skip
_WHY = {"sort": Code.ORDERS, "topk": Code.ORDERS,
        "_fft_c2c": Code.TRANSFORMS, "_fft_r2c": Code.TRANSFORMS, "_fft_c2r": Code.TRANSFORMS}  # fmt: skip
_LINEAR = frozenset(("_fft_c2c", "_fft_r2c", "_fft_c2r"))  # what is zero adds nothing

_POOLED = (
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d avg_pool1d "
    "avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d mkldnn_adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "fractional_max_pool2d fractional_max_pool3d max_unpool2d max_unpool3d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d "
    "upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa _upsample_lanczos2d_aa grid_sampler_2d grid_sampler_3d"
).split()


def _axes(call: Call, position: int, ndim: int) -> frozenset[int]:
    """Return the axes that the argument `dim` names; all where it names none."""
    dims = call.arg(position, "dim", -1 if call.name in _LAST else None)
    if dims is None or isinstance(dims, bool) or dims == []:  # var(x, unbiased)
        return frozenset(range(ndim))
    return frozenset(axis % max(1, ndim) for axis in (dims if isinstance(dims, (list, tuple)) else [dims]))


def reduce(call: Call) -> Result:
    """Reduce over axes without channels; over channels, pin them."""
    tensor = call.args[0]
    reduced = _axes(call, _REDUCTIONS[call.name], tensor.dim())
    if call.name == "sum" and len(reduced) == 1 and (sums := sum_of_products(call, min(reduced))) is not None:
        return sums
    value = parameter_operand(call, tensor, set(range(tensor.dim())) - reduced)
    meeting, rest = reduced & varying(value.ids), varying(value.ids) - reduced
    inner = bool(meeting and rest) and min(meeting) > max(rest)
    if meeting and rest and (call.name in _EXTREMES or (call.name in _SUMS and not inner)):
        value = _place_by_place(call, value, reduced)
    if reduced & varying(value.ids):
        rows = None if not rest or call.name not in _SUMS else _rows(call, value, reduced)
        if call.name in _AVERAGES:
            remedy = opt_in(call.tracer.module) if rows is None else ROWS_REMEDY
            call.pin(value.ids, Code.AVERAGES, remedy, inner=rows is not None)
        else:
            call.pin(value.ids, Code.SUMS if call.name == "sum" else Code.REDUCES, inner=rows is not None)
        if rows is None:
            return None
        value = Value(rows, paths=drop_paths([value.paths]))
    if not call.outs:
        return None
    keepdim = call.outs[0].dim() == tensor.dim()
    ids = value.ids if keepdim else value.ids.reshape([n for i, n in enumerate(value.ids.shape) if i not in reduced])
    average, largest = call.name == "mean", call.name in ("amax", "max")
    result = replace(
        value,
        ids=ids,
        paths=_pooled(value.paths, average, largest),
        dropout=0.0,
        source=None,
        keep=None,
        linear=value.linear if call.name in _HOMOGENEOUS else frozenset(),
        scaled=False,
    )
    return [result] * len(call.outs)


def _rows(call: Call, value: Value, reduced: frozenset[int]) -> IntArray | None:
    """Give every row that is reduced by itself (a head, say) an id of its own, and let its channels be inside it.

    None where some elements of a row carry no channel, or ids of rows already.
    """
    findings, ids = call.tracer.findings, value.ids
    axes = sorted(reduced & varying(ids))
    wide = np.moveaxis(ids, axes, range(-len(axes), 0))
    flat = wide.reshape(-1, math.prod(ids.shape[axis] for axis in axes))
    if bool((flat == 0).any()) or not findings.slots.is_owned(flat):
        return None
    rows, place = np.unique(flat, axis=0, return_inverse=True)
    fresh = findings.slots.fresh(len(rows))
    findings.contain(fresh[:, None], rows, call.tracer.module_name, part=True)
    return fresh[place.reshape(-1)].reshape([1 if axis in axes else size for axis, size in enumerate(ids.shape)])


def _place_by_place(call: Call, value: Value, reduced: frozenset[int]) -> Value:
    """Tie the channels that meet at each place of the other axes, as an elementwise maximum, or a sum, does."""
    first, axes = value.ids, tuple(reduced & varying(value.ids))
    for axis in axes:
        first = first.take([0], axis=axis)
    call.tracer.findings.tie(np.ascontiguousarray(np.broadcast_to(first, value.ids.shape)), value.ids)
    broken = (value.ids == 0).any(axis=axes, keepdims=True)
    verb = "chooses between" if call.name in _EXTREMES else "combines"
    call.pin(np.where(broken, value.ids, 0), Code.REDUCES_WITH_NONE(verb=verb))
    return replace(value, ids=first, paths=drop_paths([value.paths]), even={})


def _pooled(paths: Paths, average: bool, largest: bool) -> Paths:
    if not average and not largest:
        return drop_paths([paths])
    return {
        key: None if path is None else replace(path, pooled=True, max_pool=path.max_pool or largest)
        for key, path in paths.items()
    }


def _ended(value: Value) -> Value:
    """Return the value after something that is no neuron type."""
    return replace(
        value, paths=drop_paths([value.paths]), dropout=0.0, source=None, keep=None, linear=frozenset(), even={}
    )


def _along(call: Call) -> Result:
    """Mix the elements along axes without channels; along channels, pin them."""
    tensor = call.args[0]
    mixed = _axes(call, _ALONG[call.name], tensor.dim())
    value = parameter_operand(call, tensor, set(range(tensor.dim())) - mixed)
    if mixed & varying(value.ids) and call.name in _LINEAR:
        value = replace(value, ids=_beside_zeros(value.ids, tensor, mixed))
    meeting, rest = mixed & varying(value.ids), varying(value.ids) - mixed
    if meeting and rest and call.name in _SOFTMAX:
        if min(meeting) < max(rest):  # rows beside one another, as the branches of a split attention
            _place_by_place(call, value, mixed)
        else:
            call.pin(value.ids, Code.NORMALISES_ALONG, ROWS_REMEDY, inner=True)
            _rows(call, value, mixed)
    elif meeting:
        call.pin(value.ids, _WHY.get(call.name, Code.NORMALISES_ALONG))
        return None
    return [_ended(value)] * len(call.outs)


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


def _pool(call: Call) -> Result:
    tensor = call.args[0]
    num = next(int(c) for c in call.name if c in "123")
    if "unpool" in call.name:
        value = tie_broadcast(call, call.tensors()[:2], tensor.dim())
    else:
        value = parameter_operand(call, tensor, range(tensor.dim() - num))
    if call.name.startswith("grid_sampler"):
        call.pin(call.tracer.value(call.args[1]).ids, Code.SAMPLES)
    if any(axis >= tensor.dim() - num for axis in varying(value.ids)):
        neighbours = isinstance(call.tracer.module, nn.LocalResponseNorm)
        call.pin(value.ids, Code.NEIGHBOURS if neighbours else Code.POOLS)
        return None
    largest = "max_pool" in call.name
    average = "adaptive_avg" in call.name or "nearest" in call.name or "linear" in call.name
    if call.name.startswith("avg_pool"):
        padding = call.arg(3, "padding", 0)
        average = (
            not np.any(padding) and call.arg(6, "divisor_override") is None and call.arg(4, "ceil_mode") is not True
        )
    paths = _pooled(value.paths, average, largest)
    linear = frozenset() if "unpool" in call.name else value.linear
    result = replace(value, paths=paths, dropout=0.0, source=None, keep=None, linear=linear, scaled=False, even={})
    return [result] * len(call.outs)


def _glu(call: Call) -> Result:
    """Tie the two halves: out = a sigmoid(b)."""
    tensor = call.args[0]
    value = call.tracer.value(tensor)
    dim = int(call.arg(1, "dim", -1)) % tensor.dim()
    if dim not in varying(value.ids):
        return _ended(value)
    first, second = np.split(value.ids, 2, axis=dim)
    call.tracer.findings.tie(first, second)
    lone = np.where((first == 0) != (second == 0), first + second, 0)
    call.pin(lone, Code.GATES_NONE)
    return Value(first, paths=drop_paths([value.paths]))


REDUCTIONS: dict[str, tuple[Rule, bool]] = {
    **{name: (reduce, True) for name in _REDUCTIONS},
    **{name: (_along, True) for name in _ALONG},
    **{name: (_pool, True) for name in _POOLED},
    "glu": (_glu, True),
}
"""Operator name -> rule, and whether it reads its operands' values as such."""


def has_second_operand(call: Call) -> bool:
    """Whether max and min are called with two tensors: then they are elementwise."""
    return any(isinstance(t, Tensor) for t in call.args[1:])
