"""Normalisations of activations and of weights, and parameters that are computed with before they are used.

Holds: group, layer and RMS normalisation, weight normalisation, `parameter_operand` (a parameter as an operand
along one of its axes) and batch normalisation. Elsewhere: norms that the model writes out by hand are
reductions (rules/reduction.py).

A norm is harmless where every set of elements that shares its statistics belongs to one channel; else removing a
channel changes all others of its set.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.conv import _ConvNd

from apoptosis.graph.explain import ROWS_REMEDY, Code, layer_of, opt_in
from apoptosis.graph.rules.broadcast import level, tie_broadcast
from apoptosis.graph.rules.computed_weights import normalised_copy
from apoptosis.graph.rules.notes import note_grid
from apoptosis.graph.trace.ids import TensorInfo, View
from apoptosis.graph.trace.operators import Result
from apoptosis.graph.trace.tracer import Call
from apoptosis.graph.trace.values import Axis, Origin, Path, Paths, Value, drop_paths, nothing, reshape, varying
from apoptosis.records import IntArray

_STOCK = (_BatchNorm.forward, SyncBatchNorm.forward)


def parameter_operand(call: Call, tensor: Tensor, axes: Iterable[int] | None = None) -> Value:
    """Return the value of an operand; of a parameter that runs along several axes, one stays a channel axis.

    What is computed from a parameter can be followed along one of its axes: the first, or the last of a table that
    begins with an axis of size 1. The other axes are pinned. Buffers are tables of numbers, as Tracer.value reads them.

    axes: the axes of `tensor` that may stay (all when None).
    """
    view = call.view(tensor)
    if view is None or view.info.is_buffer or (view.dims is not None and len(view.varied()) < 2):
        return call.value(tensor)
    allowed = frozenset(range(tensor.dim()) if axes is None else (axis % tensor.dim() for axis in axes))
    if view.dims is None:
        rows = _flattened(call, tensor, view.info)
        return call.value(tensor) if rows is None or varying(rows) - allowed else _kept(call, view, 0, rows)
    dims = [dim for dim in view.varied() if view.axes(dim) <= allowed]
    dims.sort(key=lambda dim: min(view.axes(dim)), reverse=_is_table(view))
    return along(call, view, dims[0] if dims else None)


def _is_table(view: View) -> bool:
    """Whether a parameter begins with an axis of size 1 or an expanded one, as tables that all examples share do."""
    return view.ndim > 0 and not any(0 in view.axes(dim) for dim in view.varied())


def along(call: Call, view: View, dim: int | None) -> Value:
    """Return a parameter as a value with channels along one dim; its other axes are pinned."""
    return _kept(call, view, dim, None if dim is None else view.ids(dim))


def _kept(call: Call, view: View, dim: int | None, ids: IntArray | None) -> Value:
    info = view.info
    call.tracer.read(info, "operator")
    why = Code.COMPUTED_WEIGHT(name=info.name)
    for other in range(len(info.shape)):
        if other != dim and info.shape[other] > 1:
            call.pin(info.axis(other) if view.dims is None else view.ids(other), why)
    if dim is None or ids is None:
        return nothing(view.ndim, Origin(f"'{info.name}'"))
    if not info.is_buffer:
        _listed(call, (info.name, dim))
    return Value(ids, origin=Origin(f"'{info.name}'"), paths={(info.name, dim): None})


def _flattened(call: Call, tensor: Tensor, info: TensorInfo) -> IntArray | None:
    """Return the first axis' ids at each place of a view that runs over several of the other axes at once.

    None where some axis of the view runs over the first one and another.
    """
    begin = call.tracer.memory.start(tensor, info)
    if begin is None or len(info.shape) < 2 or info.stride[0] != math.prod(info.shape[1:]):
        return None
    outer, start = info.stride[0], int(tensor.storage_offset()) - begin
    ids = np.full((1,) * tensor.dim(), info.bases[0] + start // outer, dtype=np.int64)
    inside = start % outer
    for axis, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if step and step % outer == 0:
            shape = [-1 if i == axis else 1 for i in range(tensor.dim())]
            ids = ids + step // outer * np.arange(size, dtype=np.int64).reshape(shape)
        else:
            inside += (size - 1) * step
    return ids if inside < outer else None


def _listed(call: Call, axis: Axis) -> None:
    """Record the weight that is computed for a layer as a producer of that layer."""
    modules = {name: module for name, module, *_ in call.tracer._stack}
    name = layer_of(call.tracer.module_name)
    if isinstance(modules.get(name), nn.Linear | _ConvNd):
        call.trace.producers.setdefault(axis, name)


def held_together(call: Call, tensors: Sequence[Tensor], ndim: int) -> list[tuple[Tensor, Value]]:
    """Return the operands of an elementwise operator that are followed along one axis only; others meet as they are.

    Only where nothing but parameters meet and one runs along several axes: a weight is being computed. The axis is the
    one along which a smaller operand runs (a norm's gain), else the first.
    """
    views = [(t, view) for t in tensors if (view := call.view(t)) is not None and view.dims is not None]
    wide = [(t, view) for t, view in views if len(view.varied()) > 1]
    if all(view.info.is_buffer for _, view in wide):
        return []
    if any(call.view(t) is None and call.value(t).has_channels for t in tensors):
        return []
    places = [frozenset(a + ndim - v.ndim for a in v.axes(v.varied()[0])) for _, v in views if len(v.varied()) == 1]
    first = next(view for _, view in wide if not view.info.is_buffer)
    order = sorted((min(first.axes(d)) + ndim - first.ndim for d in first.varied()), reverse=_is_table(first))
    wanted = next((axis for axis in order if any(axis in place for place in places)), order[0])
    out = []
    for tensor, view in wide:
        dims = [dim for dim in view.varied() if wanted - (ndim - view.ndim) in view.axes(dim)]
        out.append((tensor, along(call, view, dims[0] if dims else None)))
    return out


def _result(call: Call, x: Tensor, value: Value, gains: Sequence[Tensor], shape: Sequence[int] | None = None) -> Result:
    """Meet the gain and the offset, laid out in `shape`, and end what is known of the way here."""
    operands: list[Tensor] = []
    given = [(x, value)]
    for gain in gains:
        laid = gain if shape is None else gain.view(shape)
        if call.view(gain) is not None or shape is None:
            operands.append(laid)
        else:
            found = call.value(gain)
            given.append((laid, found.moved(reshape(found.ids, gain.shape, laid.shape))))
    met = tie_broadcast(call, operands, x.dim(), given)
    return replace(met, paths=drop_paths([one.paths for _, one in given]))


def whole_channels(call: Call, value: Value) -> Value:
    """Tie what shares the statistics of one channel: rows of a linear layer laid out as positions of feature maps."""
    inside = varying(value.ids) - {0, 1}
    if not inside or varying(value.ids) - inside != {1}:
        return value
    ids = level(call, value.ids, inside, Code.NORM_WITH_NONE)
    return replace(value, ids=ids, paths=drop_paths([value.paths]), source=None)


def group_norm(call: Call) -> Result:
    """Normalise blocks of channels, each by itself."""
    x, (num, channels, positions, groups) = call.args[0], (int(n) for n in call.args[3:7])
    value = whole_channels(call, parameter_operand(call, x, [1]))
    block = channels // max(1, groups)
    sets = reshape(value.ids, x.shape, (num, groups, block * positions))
    reason = call.reason(Code.GROUP_NORM(block=block, channels=channels))
    if 2 in varying(sets) and varying(value.ids) == {1} and bool((value.ids != 0).all()):
        blocks = value.ids.reshape(1, groups, block)  # which go as a whole
        call.tie(blocks[..., 1:], blocks[..., :-1])
        call.trace.atomic_blocks.append((blocks[0, 0, :1], reason))
        note_grid(call, blocks, (1, 2))
    elif 2 in varying(sets):
        call.trace.pin(value.ids, reason)
    elif x.dim() > 1 and value.ids.shape[1] == channels:
        note_grid(call, value.ids, (1,))  # one row: num_groups is the number of channels, and has to follow it
    shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
    return _result(call, x, value, [t for t in call.args[1:3] if isinstance(t, Tensor)], shape)


def layer_norm(call: Call) -> Result:
    """Normalise over the last axes, with a mean or without."""
    x, shape = call.args[0], call.arg(1, "normalized_shape")
    value = parameter_operand(call, x, range(x.dim() - len(shape)))
    rest = varying(value.ids) & set(range(x.dim() - len(shape)))
    if varying(value.ids) - rest:  # of several rows each is normalised by itself, and may go as a whole
        remedy = ROWS_REMEDY if rest else opt_in(call.tracer.module)
        call.pin(value.ids, Code.NORM, remedy, inner=bool(rest))
    return _result(call, x, value, [t for t in call.args[2:4] if isinstance(t, Tensor)])


def weight_norm(call: Call) -> Result:
    """W = g v / |v|, the norm over all axes but `dim`: rows go together with their gain, columns change the norm."""
    v, g, dim = call.args[0], call.args[1], int(call.arg(2, "dim", 0)) % call.args[0].dim()
    if dim == 0 and call.view(v) is not None and normalised_copy(call, v, call.outs[0], g, centred=False):
        return None
    for tensor in (v, g):
        if (view := call.view(tensor)) is not None:
            call.tracer.read(view.info, "operator")
    value = parameter_operand(call, v, [dim])
    if varying(value.ids) - {dim}:
        call.pin(value.ids, Code.ROWS_NORMALISED)
    met = tie_broadcast(call, [g], v.dim(), [(v, value)])
    return [replace(met, paths=value.paths), Value(met.ids)]


def batch_norm(call: Call) -> Result:
    """Statistics per channel along axis 1, one entry of each operand per channel."""
    tracer, x = call.tracer, call.args[0]
    if _of_rows(call, x):
        return None
    value = whole_channels(call, parameter_operand(call, x, [1]))
    ndim = x.dim()
    module = tracer.module
    stock = isinstance(module, _BatchNorm) and type(module).forward in _STOCK
    shape = [-1 if i == 1 else 1 for i in range(ndim)]
    over = bool(varying(value.ids) - {1})
    if over:
        call.pin(value.ids, Code.NORM)
    tensors = tracer.trace.channel_ids.tensors
    # behind a permutation of channels its entries are not in the order of the rows that made them
    stock = stock and all(np.array_equal(value.ids.reshape(-1), tensors[name].axis(dim)) for name, dim in value.paths)
    sizes = {tracer.trace.channel_ids.tensors[name].shape[dim] for name, dim in value.paths}
    stock = stock and not over and sizes <= {x.shape[1]} and value.ids.shape[1] == x.shape[1]
    given: list[tuple[Tensor, Value]] = []
    operands: list[Tensor] = []
    for tensor in call.args[1:5]:
        if not isinstance(tensor, Tensor) or tensor.dim() != 1:
            continue
        if tracer.view(tensor) is not None:
            operands.append(tensor.view(shape))
        else:
            found = tracer.value(tensor)
            given.append((tensor.view(shape), found.moved(found.ids.reshape(shape))))
    if value.source is not None:
        reader = tracer.module_name if stock else "operator"
        tracer.trace.readers[value.source].add(reader)
    if stock:
        tracer.trace.normalised[tracer.module_name].add(value.source or "")
    met = tie_broadcast(call, operands, ndim, [(x, value), *given])
    result = replace(met, paths=_normalised(value.paths, tracer.module_name if stock else None))
    moments = Value(met.ids.reshape(-1)) if met.ids.size == met.ids.shape[1] else None
    return [result, *[moments if o.dim() == 1 and o.shape[0] == x.shape[1] else None for o in call.outs[1:]]]


def _of_rows(call: Call, x: Tensor) -> bool:
    """Whether the rows of a weight are standardised, laid out as the channels of one example."""
    view = call.view(x)
    if view is None or x.dim() < 2 or x.shape[:2] != (1, view.info.shape[0]) or x.stride(1) != view.info.stride[0]:
        return False
    own = isinstance(call.arg(3, "running_mean"), Tensor) or isinstance(call.arg(2, "bias"), Tensor)
    gain = call.arg(1, "weight")
    return not own and normalised_copy(call, x, call.outs[0], gain, centred=True)


def _normalised(paths: Paths, norm: str | None) -> Paths:
    out: dict[tuple[str, int], Path | None] = {}
    for key, path in paths.items():
        plain = path is not None and norm is not None and path == Path()
        out[key] = Path(norm=norm) if plain else None
    return out
