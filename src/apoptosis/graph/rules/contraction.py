"""Matrix products with a parameter: consumer sites and producers.

Holds: plain and batched products, grouped ones (rows of one operand, each with its own matrix of a stack of experts),
and matrices picked from a stack for every token. Elsewhere: convolutions (convolution.py), products of activations with
one another (product.py); the router of experts, whose channels pin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from apoptosis.graph.explain import Code, layer_of
from apoptosis.graph.rules.broadcast import tie_broadcast
from apoptosis.graph.rules.computed_weights import normal_of
from apoptosis.graph.rules.matrices import Matrix, as_matrix, as_stack
from apoptosis.graph.rules.product import lone_pair, multiply
from apoptosis.graph.trace.ids import TensorInfo, View
from apoptosis.graph.trace.operators import Result
from apoptosis.graph.trace.result import Consumer, site_key
from apoptosis.graph.trace.tracer import Call
from apoptosis.graph.trace.values import Multiple, Path, Value, drop_paths, nothing, varying, weight_named
from apoptosis.records import IntArray


def _stock_linear(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and "forward" not in vars(module)


def consume(call: Call, weight: Matrix, tensor: Tensor, axis: int, columns: IntArray) -> Value:
    """Tie the channels along `axis` of an operand to the columns that read them."""
    tracer = call.tracer
    value = tracer.value(tensor)
    tracer.trace.uses.append((np.unique(value.ids), f"{weight.info.name}:{weight.dim_in}"))
    size = tensor.shape[axis]
    if not value.has_channels and _is_zero(value, tensor):
        pass  # a first hidden state, which says nothing of its channels
    elif not value.has_channels:
        call.pin(columns, Code.READS_NONE(origin=value.origin))
    elif value.ids.size == 1:  # positions of one channel, the only one: flattened, they are read column by column
        tracer.trace.tie(np.broadcast_to(value.ids.reshape(1), columns.shape), columns)
    elif value.ids.shape[axis] != size:
        call.pin(value.ids, Code.MIXES_POSITIONS)
        call.pin(columns, Code.MIXES_POSITIONS)
    else:
        ids = np.moveaxis(value.ids, axis, -1).reshape(-1, size)
        wide = np.broadcast_to(columns, ids.shape)
        tracer.trace.tie(ids, wide)
        if bool((ids == 0).any()):
            call.pin(np.where(ids == 0, wide, 0), Code.READS_BESIDE_NONE)
    return value


def _is_zero(value: Value, tensor: Tensor) -> bool:
    """Whether an operand was filled with zeros."""
    return value.is_filler and not tensor.is_meta and not isinstance(tensor, FakeTensor) and not bool(tensor.any())


def register(call: Call, weight: Matrix, value: Value, site: Consumer, direct: bool, macs: float) -> None:
    """Record the consumer and the producer that this contraction is."""
    tracer, trace = call.tracer, call.trace
    name = tracer.module_name
    if site.functional and weight.rows.size != weight.info.shape[weight.dim_out]:
        call.pin(weight.columns, Code.PART_OF_ROWS(name=weight.info.name))
    known = trace.consumers.setdefault(site.key, site)
    if known.bias != site.bias or known.factors != site.factors:
        known.bias = None  # not added each time: nothing may be folded into it
    if (known.conv, known.functional) != (site.conv, site.functional):
        _in_several_ways(call, weight, known, site)
    known.inputs.append(value.paths)
    known.dropout = max(known.dropout, value.dropout if tracer.mode == "training" else 0.0)
    known.zero_padded = known.zero_padded or site.zero_padded
    known.macs[tracer.mode] += macs
    axis = (weight.info.name, weight.dim_out)
    trace.producers.setdefault(axis, name if direct else layer_of(weight.info.name.rpartition(".")[0]))
    trace.axis_macs[axis][tracer.mode] += macs


def _in_several_ways(call: Call, weight: Matrix, known: Consumer, site: Consumer) -> None:
    """Handle a weight that is read in several ways: where padding alone differs, the pass is run again; else pin it."""
    if known.conv is None or site.conv is None:
        call.pin(weight.columns, Code.LAYER_AND_OTHER(name=weight.info.name))
    elif replace(known.conv, padded=()) != replace(site.conv, padded=()):
        call.pin(weight.columns, Code.SEVERAL_CONVOLUTIONS(name=weight.info.name))
    else:
        known.conv, known.functional = replace(known.conv, padded=()), True


def factors_of(call: Call, weight: Tensor, info: TensorInfo) -> tuple[tuple[float, float], bool]:
    """Return the factors of weight and bias as in records.Site, and whether they stay what they are."""
    computed = call.tracer.memory.computed_weight(weight)
    if computed is None:
        return (1.0, 1.0), True
    call.tracer.numbers.read(Multiple(weight_named(info.name), computed.numbers))
    known = math.isfinite(computed.factor) and computed.factor != 0.0
    return (computed.factor if known else 1.0, 1.0), computed.fixed and known


def site_bias(call: Call, direct: bool, added: Tensor | None = None, num_rows: int = 0) -> str | None:
    """Return the bias that takes a constant: the module's own, or the parameter that the operator adds whole."""
    module = call.tracer.module
    if direct and module is not None:
        info = call.tracer.info_of(module, "bias")
        return info.name if info is not None else None
    view = call.view(added) if added is not None else None
    if view is None or not view.whole or view.info.shape != (num_rows,):
        return None
    return view.info.name


def _product(call: Call, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Result:
    """Matrix product: the last axis of `a` with the last but one of `b`."""
    tracer, out = call.tracer, call.outs[0]
    macs = float(out.numel()) * (a.shape[-1] if a.dim() else 1)
    tracer.trace.macs[tracer.mode] += macs
    view_a, view_b = tracer.view(a), tracer.view(b)
    # a buffer is no more than a constant here: it is not fitted, and nothing is folded into it
    view_a, view_b = (None if v is not None and v.info.is_buffer else v for v in (view_a, view_b))
    value: Value | None = None
    if _outer(a, b) and view_a is None and view_b is None and not lone_pair(call, a, b):
        met = tie_broadcast(call, [a, b], out.dim())
        value = replace(met, paths=drop_paths([tracer.value(t).paths for t in (a, b) if tracer.view(t) is None]))
    elif view_b is not None and view_a is None and b.dim() >= 2:
        value = _apply(call, b, view_b, (b.dim() - 2, b.dim() - 1), a, a.dim() - 1, out.dim() - 1, macs, bias)
    elif view_a is not None and view_b is None and a.dim() >= 2:
        axis = max(0, b.dim() - 2)
        last = max(0, out.dim() - min(2, b.dim()))
        value = _apply(call, a, view_a, (a.dim() - 1, a.dim() - 2), b, axis, last, macs, bias)
    elif view_a is None and view_b is None:
        value = multiply(call, a, b, out.dim(), macs)
    if value is None:
        for tensor, view in ((a, view_a), (b, view_b)):
            if view is not None:
                call.pin_parameter(view.info, Code.NO_MATRIX)
            else:
                call.pin(tracer.value(tensor).ids, Code.NO_PARAMETER)
        value = nothing(out.dim(), call.origin())
    return value if bias is None else biased(call, value, bias, out)


def _outer(a: Tensor, b: Tensor) -> bool:
    """Whether nothing is summed: every element of the one meets every element of the other (angles of rotations)."""
    return a.dim() > 1 and b.dim() > 1 and a.shape[-1] == 1


def _apply(
    call: Call,
    matrix: Tensor,
    view: View,
    axes: tuple[int, int],
    x: Tensor,
    axis: int,
    axis_result: int,
    macs: float,
    bias: Tensor | None,
) -> Value | None:
    """One operand is a parameter: consumer of `x` along `axis`, producer along `axis_result` of the result."""
    tracer, out = call.tracer, call.outs[0]
    module = tracer.module
    weight = as_matrix(view, *axes)
    stack = None
    if weight is None or any(view.axes(d) & set(range(view.ndim - 2)) for d in view.varied()):
        stack = as_stack(view, *axes)
        if stack is None:
            return None
        weight = stack.matrix
        call.pin(stack.others, Code.MATRIX_NUMBERS)
    direct = (
        _stock_linear(module)
        and module is not None
        and tracer.info_of(module, "weight") is weight.info
        and (weight.dim_in, weight.dim_out) == (1, 0)
        and weight.whole
        and stack is None
    )
    value = consume(call, weight, x, axis, weight.columns)
    factors, fixed = factors_of(call, matrix, weight.info)
    site = Consumer(
        tracer.module_name,
        "linear",
        weight.info.name,
        weight.dim_in,
        None
        if weight.select or stack is not None or not fixed
        else site_bias(call, direct, bias, weight.info.shape[weight.dim_out]),
        functional=not direct,
        select=weight.select,
        source=tracer.module_name if direct and fixed else None,
        factors=factors,
        normal=normal_of(call, matrix, weight.info, weight.dim_out, weight.columns),
    )
    register(call, weight, value, site, direct, macs)
    tracer.show(site_key(site), lambda: (x.movedim(axis, -1), None))
    rows = weight.rows if stack is None else stack.rows
    ids = rows.reshape([-1 if i == axis_result else 1 for i in range(out.dim())])
    made = (weight.info.name, weight.dim_out)
    plain = stack is None and fixed and factors == (1.0, 1.0)
    return Value(ids, paths={made: Path() if plain else None}, source=site.source, linear=frozenset((made,)))


def biased(call: Call, value: Value, bias: Tensor, out: Tensor) -> Value:
    """Add a bias, which belongs to the rows when it is a parameter along them."""
    view = call.view(bias)
    if value.multiple is not None:
        call.tracer.numbers.read(value.multiple)
    if view is None:
        other = call.value(bias)
        met = tie_broadcast(call, [bias], out.dim(), [(out, value)])  # `out` stands for the product before the addition
        return replace(met, paths=drop_paths([value.paths, other.paths]))
    if view.ndim == 1 and len(view.varied()) == 1 and value.has_channels:
        ids = view.ids(view.varied()[0])
        call.tie(value.ids.reshape(-1), ids.reshape(-1))
        call.trace.biases.add((view.info.name, view.varied()[0]))
        for axis in value.paths:
            call.trace.bias_of[axis].add(view.info.name)
        return value
    if (added := _stacked_bias(call, value, view, out)) is not None:
        return added
    if view.varied():
        call.pin_parameter(view.info, Code.BIAS_ACROSS)
        call.pin(value.ids, Code.ADDED_ACROSS)
    return value


def _stacked_bias(call: Call, value: Value, view: View, out: Tensor) -> Value | None:
    """Add a bias with a row for every matrix of a stack, (matrices, 1, rows); None where it is laid out otherwise."""
    last = out.dim() - 1
    if view.dims is None or view.ndim != out.dim() or view.info.is_buffer or varying(value.ids) != {last}:
        return None
    along = [dim for dim in view.varied() if view.axes(dim) == {last}]
    if len(along) != 1 or any(last in view.axes(dim) for dim in view.varied() if dim != along[0]):
        return None
    call.tie(value.ids.reshape(-1), view.ids(along[0]).reshape(-1))
    call.trace.biases.add((view.info.name, along[0]))
    for dim in view.varied():
        if dim != along[0]:
            call.pin(view.info.axis(dim), Code.MATRIX_NUMBERS)
    return replace(value, paths=drop_paths([value.paths]), linear=frozenset())


def mm(call: Call) -> Result:
    """Multiply two matrices, or a matrix and a vector."""
    return _product(call, call.args[0], call.args[1])


def addmm(call: Call) -> Result:
    """Multiply two matrices and add to a third tensor."""
    return _product(call, call.args[1], call.args[2], call.args[0])


def linear(call: Call) -> Result:
    """Multiply with a weight (out, in), and add a bias."""
    x, weight = call.args[0], call.args[1]
    bias = call.arg(2, "bias")
    return _product(call, x, weight.t(), bias)


def grouped_mm(call: Call) -> Result:
    """(rows, in) times one of (experts, in, out) per row: the same positions of all experts are one channel."""
    x, w = call.args[0], call.args[1]
    tracer = call.tracer
    macs = float(call.outs[0].numel()) * x.shape[-1]
    tracer.trace.macs[tracer.mode] += macs
    view = tracer.view(w)
    if view is None or tracer.view(x) is not None or (x.dim(), w.dim()) != (2, 3):
        call.pin_all(Code.NO_STACK)
        return None
    columns, rows = view.sole(1), view.sole(2)
    if columns is None or rows is None:
        call.pin_all(Code.OTHER_STACK)
        return None
    dims = {axis: next(dim for dim in view.varied() if axis in view.axes(dim)) for axis in (1, 2)}
    weight = Matrix(view.info, dims[1], dims[2], columns, rows)
    for dim in set(view.varied()) - set(dims.values()):
        call.pin(view.ids(dim), Code.EXPERT_NUMBERS)
    value = consume(call, weight, x, 1, columns)
    site = Consumer(tracer.module_name, "linear", view.info.name, dims[1], None, functional=True)
    register(call, weight, value, site, False, macs)
    tracer.show(site_key(site), lambda: (x, None))
    made = (view.info.name, dims[2])
    return Value(np.asarray(rows)[None, :], paths={made: None}, linear=frozenset((made,)))


def of_stack(call: Call, tensor: Tensor, indices: Sequence[Tensor | None]) -> bool:
    """Whether matrices are picked from a stack of experts, one for every token: they stand for the stack."""
    picks = [index for index in indices if index is not None]
    if len(picks) != 1 or indices[0] is None or picks[0].dim() != 1 or picks[0].dtype in (torch.bool, torch.uint8):
        return False
    return call.tracer.memory.look_up(call.outs[0], tensor)
