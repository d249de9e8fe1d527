"""Batch normalisation: statistics per channel, and whether it belongs to the producer or the consumer before it.

Holds: one rule. Elsewhere: norms that mix channels (rules/normalization.py).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from apoptosis.graph.explain import Code
from apoptosis.graph.rules.broadcast import tie_broadcast
from apoptosis.graph.rules.computed_weights import normalised_copy
from apoptosis.graph.rules.normalization import parameter_operand, whole_channels
from apoptosis.graph.trace.operators import Result
from apoptosis.graph.trace.tracer import Call
from apoptosis.graph.trace.values import Path, Paths, Value, varying

_NORMS = (_BatchNorm.forward, SyncBatchNorm.forward)


def batch_norm(call: Call) -> Result:
    """Statistics per channel along axis 1, one entry of each operand per channel."""
    tracer, x = call.tracer, call.args[0]
    if _of_rows(call, x):
        return None
    value = whole_channels(call, parameter_operand(call, x, [1]))
    ndim = x.dim()
    module = tracer.module
    stock = isinstance(module, _BatchNorm) and type(module).forward in _NORMS
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
