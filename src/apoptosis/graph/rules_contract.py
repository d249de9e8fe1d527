"""Contractions: the few operators with rules of their own.

Lives here: matrix products and convolutions with a parameter (consumer sites and producers). Does not live here:
products of activations with one another (rules_product.py), batch normalisation (rules_batchnorm.py).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.conv import _ConvNd

from apoptosis.graph.findings import Consumer, site_key
from apoptosis.graph.matrices import Matrix, as_matrix, as_stack
from apoptosis.graph.meet import meet
from apoptosis.graph.rules_product import lone_pair, multiply
from apoptosis.graph.slots import View
from apoptosis.graph.tracer import Call, Result, Rule
from apoptosis.graph.values import Path, Value, nothing, spoiled, varying
from apoptosis.records import IntArray, SiteKind

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_STOCK: dict[Any, Any] = {cls.forward: getattr(cls, "_conv_forward", None) for cls in _CONVS}
_REMEDY = "Let an nn.Linear or nn.Conv module compute it."
_STACK_REMEDY = "The widths inside the matrices may shrink; their number may not."


def _stock_linear(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and "forward" not in vars(module)


def _stock_conv(module: nn.Module | None) -> bool:
    if not isinstance(module, _ConvNd) or "forward" in vars(module):
        return False
    forward = type(module).forward
    return forward in _STOCK and getattr(type(module), "_conv_forward", None) is _STOCK[forward]


def consume(call: Call, weight: Matrix, tensor: Tensor, axis: int, columns: IntArray) -> Value:
    """Tie the channels along `axis` of an operand to the columns that read them."""
    tracer = call.tracer
    value = tracer.value(tensor)
    tracer.findings.uses.append((np.unique(value.ids), f"{weight.owner.name}:{weight.dim_in}"))
    size = tensor.shape[axis]
    if not value.live and _is_zero(value, tensor):
        pass  # a first hidden state, which says nothing of its channels
    elif not value.live:
        call.pin(columns, f"reads {value.origin}, which carries no channels")
    elif value.ids.size == 1:  # positions of one channel, the only one: flattened, they are read column by column
        tracer.findings.tie(np.broadcast_to(value.ids.reshape(1), columns.shape), columns)
    elif value.ids.shape[axis] != size:
        text = "mixes the positions of single channels"
        call.pin(value.ids, text)
        call.pin(columns, text)
    else:
        ids = np.moveaxis(value.ids, axis, -1).reshape(-1, size)
        wide = np.broadcast_to(columns, ids.shape)
        tracer.findings.tie(ids, wide)
        if bool((ids == 0).any()):
            call.pin(np.where(ids == 0, wide, 0), "reads channels beside values that are none")
    return value


def _is_zero(value: Value, tensor: Tensor) -> bool:
    """Whether an operand was filled with zeros."""
    return value.free and not tensor.is_meta and not isinstance(tensor, FakeTensor) and not bool(tensor.any())


def register(call: Call, weight: Matrix, value: Value, site: Consumer, direct: bool, macs: float) -> None:
    """Record the consumer and the producer that this contraction is."""
    tracer, findings = call.tracer, call.tracer.findings
    name = tracer.module_name
    if site.module is None:
        call.pin(weight.columns, "is a convolution without a module", _REMEDY)
    elif site.functional and weight.rows.size != weight.owner.shape[weight.dim_out]:
        call.pin(weight.columns, f"reads part of the rows of '{weight.owner.name}'", _REMEDY)
    known = findings.consumers.setdefault(site.key, site)
    if known.bias != site.bias:
        known.bias = None  # not added each time: nothing may be folded into it
    known.inputs.append(value.paths)
    known.dropout = max(known.dropout, value.dropout if tracer.mode == "training" else 0.0)
    known.zero_padded = known.zero_padded or site.zero_padded
    known.macs[tracer.mode] += macs
    axis = (weight.owner.name, weight.dim_out)
    findings.producers.setdefault(axis, name if direct else weight.owner.name.rpartition(".")[0])
    findings.axis_macs[axis][tracer.mode] += macs


def _site_bias(call: Call, direct: bool, added: Tensor | None = None, num_rows: int = 0) -> str | None:
    """Return the bias that takes a constant: the module's own, or the parameter that the operator adds whole."""
    module = call.tracer.module
    if direct and module is not None:
        owner = call.tracer.owner_of(module, "bias")
        return owner.name if owner is not None else None
    view = call.tracer.view(added) if added is not None else None
    if view is None or not view.whole or view.owner.shape != (num_rows,):
        return None
    return view.owner.name


def _product(call: Call, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Result:
    """Matrix product: the last axis of `a` with the last but one of `b`."""
    tracer, out = call.tracer, call.outs[0]
    macs = float(out.numel()) * (a.shape[-1] if a.dim() else 1)
    tracer.findings.macs[tracer.mode] += macs
    view_a, view_b = tracer.view(a), tracer.view(b)
    # a buffer is no more than a constant here: it is not fitted, and nothing is folded into it
    view_a, view_b = (None if v is not None and v.owner.is_buffer else v for v in (view_a, view_b))
    value: Value | None = None
    if _outer(a, b) and view_a is None and view_b is None and not lone_pair(call, a, b):
        met = meet(call, [a, b], out.dim())
        value = replace(met, paths=spoiled([tracer.value(t).paths for t in (a, b) if tracer.view(t) is None]))
    elif view_b is not None and view_a is None and b.dim() >= 2:
        value = _apply(call, view_b, (b.dim() - 2, b.dim() - 1), a, a.dim() - 1, out.dim() - 1, macs, bias)
    elif view_a is not None and view_b is None and a.dim() >= 2:
        axis = max(0, b.dim() - 2)
        last = max(0, out.dim() - min(2, b.dim()))
        value = _apply(call, view_a, (a.dim() - 1, a.dim() - 2), b, axis, last, macs, bias)
    elif view_a is None and view_b is None:
        value = multiply(call, a, b, out.dim(), macs)
    if value is None:
        text = "contracts channels with values that are not a parameter"
        for tensor, view in ((a, view_a), (b, view_b)):
            if view is not None:
                call.pin_owner(view.owner, "does not use it as a plain matrix")
            else:
                call.pin(tracer.value(tensor).ids, text)
        value = nothing(out.dim(), f"the result of {call.label}")
    return value if bias is None else _biased(call, value, bias, out)


def _outer(a: Tensor, b: Tensor) -> bool:
    """Whether nothing is summed: every element of the one meets every element of the other (angles of rotations)."""
    return a.dim() > 1 and b.dim() > 1 and a.shape[-1] == 1


def _apply(
    call: Call,
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
        call.pin(stack.others, "numbers matrices of a stack", _STACK_REMEDY)
    direct = (
        _stock_linear(module)
        and module is not None
        and tracer.owner_of(module, "weight") is weight.owner
        and (weight.dim_in, weight.dim_out) == (1, 0)
        and weight.whole
        and stack is None
    )
    value = consume(call, weight, x, axis, weight.columns)
    site = Consumer(
        tracer.module_name,
        "linear",
        weight.owner.name,
        weight.dim_in,
        None
        if weight.select or stack is not None
        else _site_bias(call, direct, bias, weight.owner.shape[weight.dim_out]),
        functional=not direct,
        select=weight.select,
    )
    register(call, weight, value, site, direct, macs)
    tracer.show(site_key(site), lambda: (x.movedim(axis, -1), None))
    rows = weight.rows if stack is None else stack.rows
    ids = rows.reshape([-1 if i == axis_result else 1 for i in range(out.dim())])
    made = (weight.owner.name, weight.dim_out)
    source = tracer.module_name if direct else None
    return Value(ids, paths={made: Path() if stack is None else None}, source=source, linear=frozenset((made,)))


def _biased(call: Call, value: Value, bias: Tensor, out: Tensor) -> Value:
    """Add a bias, which belongs to the rows when it is a parameter along them."""
    view = call.tracer.view(bias)
    if value.multiple is not None:
        call.tracer.numbers.read(value.multiple)
    if view is None:
        other = call.tracer.value(bias)
        met = meet(call, [bias], out.dim(), [(out, value)])  # `out` stands for the product before the addition
        return replace(met, paths=spoiled([value.paths, other.paths]))
    if view.ndim == 1 and len(view.varied()) == 1 and value.live:
        slots = view.slots(view.varied()[0])
        call.tracer.findings.tie(value.ids.reshape(-1), slots.reshape(-1))
        call.tracer.findings.biases.add((view.owner.name, view.varied()[0]))
        for axis in value.paths:
            call.tracer.findings.bias_of[axis].add(view.owner.name)
        return value
    if view.varied():
        call.pin_owner(view.owner, "adds it across channels")
        call.pin(value.ids, "adds a parameter across channels")
    return value


def _mm(call: Call) -> Result:
    return _product(call, call.args[0], call.args[1])


def _addmm(call: Call) -> Result:
    return _product(call, call.args[1], call.args[2], call.args[0])


def _linear(call: Call) -> Result:
    x, weight = call.args[0], call.args[1]
    bias = call.arg(2, "bias")
    return _product(call, x, weight.t(), bias)


def _convolution(call: Call) -> Result:
    x, w, bias = call.args[0], call.args[1], call.arg(2, "bias")
    stride, padding = call.arg(3, "stride"), call.arg(4, "padding")
    transposed, groups = bool(call.arg(6, "transposed")), int(call.arg(8, "groups"))
    tracer, out = call.tracer, call.outs[0]
    taps = math.prod(w.shape[2:])
    macs = float(x.numel() if transposed else out.numel()) * w.shape[1] * taps
    tracer.findings.macs[tracer.mode] += macs
    view = tracer.view(w)
    if view is None or not view.whole:
        value = _computed(call, x, w, transposed or groups > 1)
        return value if bias is None else _biased(call, value, bias, out)
    owner = view.owner
    dim_in, dim_out = (0, 1) if transposed else (1, 0)
    weight = Matrix(owner, dim_in, dim_out, owner.axis(dim_in), owner.axis(dim_out))
    module = tracer.module
    direct = _stock_conv(module) and module is not None and tracer.owner_of(module, "weight") is owner
    if groups > 1 and (w.shape[0] // groups if transposed else w.shape[1]) == 1:
        value = _depthwise(call, weight, x, groups, transposed, macs)
        if not direct:
            call.pin(weight.owner.slots(), "is a depthwise convolution without a module", _REMEDY)
    else:
        columns, rows = _grouped(call, weight, groups, transposed)
        read = consume(call, weight, x, 1, columns)
        kind: SiteKind = "conv_transpose" if transposed else "conv"
        padded = transposed and (taps > 1 or bool(np.any(np.array(stride) != 1)))  # borders read fewer taps
        padded = padded or bool(np.any(padding)) or _pads_itself(module, taps)
        name = tracer.module_name if direct else None
        site = Consumer(name, kind, owner.name, dim_in, _site_bias(call, direct), taps, padded, groups)
        register(call, weight, read, site, direct, macs)
        made = (owner.name, dim_out)
        paths = {made: Path()}
        value = Value(_channels_first(rows, out.dim()), paths=paths, source=name, linear=frozenset((made,)))
    return value if bias is None else _biased(call, value, bias, out)


def _computed(call: Call, x: Tensor, w: Tensor, involved: bool) -> Value:
    """Convolve with a computed weight, which may make channels but takes in no one's place.

    involved: its rows are not simply the channels of the result.
    """
    tracer, ndim = call.tracer, call.outs[0].dim()
    view = tracer.view(w)
    call.pin(tracer.value(x).ids, "contracts channels with values that are not a parameter")
    if view is not None:
        call.pin_owner(view.owner, "does not use it whole")
        return nothing(ndim, f"the result of {call.label}")
    value = tracer.value(w)
    if involved or varying(value.ids) - {0} or value.ids.shape[0] != w.shape[0]:
        call.pin(value.ids, "convolves with what is computed from it")
        return nothing(ndim, f"the result of {call.label}")
    for axis in value.paths:
        tracer.findings.axis_macs[axis][tracer.mode] += float(call.outs[0].numel()) * math.prod(w.shape[1:])
    return Value(_channels_first(value.ids.reshape(-1), ndim), paths=value.paths)


def _pads_itself(module: nn.Module | None, taps: int) -> bool:
    """Whether a convolution pads with zeros before the operator ("same" with an even kernel)."""
    return isinstance(module, _ConvNd) and module.padding == "same" and module.padding_mode == "zeros" and taps > 1


def _channels_first(slots: IntArray, ndim: int) -> IntArray:
    return slots.reshape([-1 if i == 1 else 1 for i in range(ndim)])


def _grouped(call: Call, weight: Matrix, groups: int, transposed: bool) -> tuple[IntArray, IntArray]:
    """Return the slot that reads each input channel and the slot that makes each output channel.

    With several blocks the same position of every block goes together, so that the blocks stay of one size.
    """
    columns, rows = weight.columns, weight.rows
    if groups == 1:
        return columns, rows
    split = (columns if transposed else rows).reshape(groups, -1)
    call.tracer.findings.tie(split[1:], np.broadcast_to(split[0], split[1:].shape))
    if transposed:
        return columns, np.tile(rows, groups)
    return np.tile(columns, groups), rows


def _depthwise(call: Call, weight: Matrix, x: Tensor, groups: int, transposed: bool, macs: float) -> Value:
    """Every block reads one channel: its outputs are removed with it, and it is no producer of its own."""
    tracer, owner = call.tracer, weight.owner
    slots = owner.axis(0).reshape(groups, -1)
    value = consume(call, weight, x, 1, slots[:, 0])
    tracer.findings.tie(slots[:, 1:], np.broadcast_to(slots[:, :1], slots[:, 1:].shape))
    tracer.findings.axis_macs[(owner.name, 0)][tracer.mode] += macs
    ids = np.repeat(slots[:, 0], owner.shape[1]) if transposed else slots.reshape(-1)
    return Value(_channels_first(ids, call.outs[0].dim()), paths=spoiled([value.paths]))


CONTRACTIONS: dict[str, tuple[Rule, bool]] = {
    "mm": (_mm, True),
    "bmm": (_mm, True),
    "mv": (_mm, True),
    "matmul": (_mm, True),
    "addmm": (_addmm, True),
    "baddbmm": (_addmm, True),
    "addmv": (_addmm, True),
    "linear": (_linear, True),
    "convolution": (_convolution, True),
}
"""Operator name -> rule, and whether it reads its operands' values as such."""
