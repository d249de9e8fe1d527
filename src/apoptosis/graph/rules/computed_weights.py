"""Weights that are computed from one parameter before they are used, and stay as easy to fold into as the parameter.

Holds: factors of a whole weight. Elsewhere: weights of which only the rows can be followed
(rules/normalization.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from apoptosis.graph.explain import Code
from apoptosis.graph.trace.ids import TensorInfo
from apoptosis.graph.trace.tracer import Call
from apoptosis.graph.trace.values import CONSTANT, Axis
from apoptosis.records import IntArray, Normal


@dataclass(frozen=True, slots=True)
class ComputedWeight:
    """What the copy of a parameter was multiplied by. fixed: by plain numbers of the code, which training keeps.

    numbers: where these are noted, as in values.Multiple. rows: every row (dim 0) was normalised by itself, less its
    mean where `centred`, and multiplied by `gain` (None: by no parameter of its own).
    """

    factor: float = 1.0
    fixed: bool = True
    numbers: tuple[tuple[int, int, float], ...] = ()
    rows: bool = False
    centred: bool = False
    gain: Axis | None = None


def _is_factor(call: Call) -> bool:
    """Whether an elementwise operator multiplies by one number: a factor, a divisor, or minus one."""
    return call.operator.role in ("multiplies", "divides", "moves")


def scaled_copy(call: Call) -> bool:
    """Let the product of a parameter and a number stand for the parameter; return whether this is one.

    The number may be a tensor of one element (a gain that is learned), but no channel.
    """
    if not _is_factor(call) or call.inplace or call.kwargs.get("rounding_mode") is not None:
        return False
    tracer, divides = call.tracer, call.operator.role == "divides"
    wide = [t for t in call.tensors() if (v := tracer.view(t)) is not None and len(v.varied()) > 1]
    if len(wide) != 1 or wide[0].shape != call.outs[0].shape or wide[0].dtype != call.outs[0].dtype:
        return False
    weight, view = wide[0], tracer.view(wide[0])
    if view is None or view.info.is_buffer or (divides and call.args[0] is not weight):
        return False
    computed = tracer.memory.computed_weight(weight) or ComputedWeight()
    for other in call.args:
        if other is weight:
            continue
        factor = _number(call, other)
        if factor is None or factor == 0.0:
            return False
        factor = 1.0 / factor if divides else factor
        numbers = computed.numbers
        if not isinstance(other, Tensor) and tracer.numbers.at >= 0:
            numbers = (*numbers, (tracer.numbers.at, 0, -1.0 if divides else 1.0))
        fixed = computed.fixed and not isinstance(other, Tensor)
        computed = replace(computed, factor=computed.factor * factor, fixed=fixed, numbers=numbers)
    if call.operator.role == "moves":
        computed = replace(computed, factor=-computed.factor)
    if not tracer.memory.adopt(call.outs[0], weight):
        return False
    tracer.memory.note_computed(call.outs[0], computed)
    return True


def scaled_in_place(call: Call) -> bool:
    """Whether a whole parameter takes a plain factor in its own place, as RWKV's weights do for evaluation.

    It remains the parameter, with other numbers in this pass, and what is folded into it is multiplied likewise.
    """
    if not _is_factor(call) or not call.inplace or call.kwargs.get("rounding_mode") is not None:
        return False
    view = call.view(call.args[0])
    if view is None or not view.whole or view.info.is_buffer or len(view.varied()) < 2:
        return False
    factor = call.arg(1, "other", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or factor == 0.0:
        return False
    call.tracer.memory.keep_owned(call.args[0])
    return True


def _number(call: Call, other: object) -> float | None:
    """Return a factor that is the same for all elements; nan where it is not known, None for anything else."""
    if isinstance(other, bool) or not isinstance(other, int | float | Tensor):
        return None
    if not isinstance(other, Tensor):
        return float(other)
    view = call.view(other)
    if other.numel() != 1 or other.is_complex():
        return None
    if view is None and (call.value(other).has_channels or call.value(other).origin != CONSTANT):
        return None  # computed from the weight, it may be
    if view is not None:
        call.tracer.read(view.info, "operator")
    return float("nan") if other.is_meta or isinstance(other, FakeTensor) else float(other.detach())


def gains_of(call: Call) -> tuple[Axis, ...]:
    """Return the parameter that one operand of an elementwise operator is, if the others are plain numbers."""
    tensors = call.tensors()
    role = call.operator.role
    if len(tensors) != 1 or not (role == "multiplies" or (role == "divides" and call.args[0] is tensors[0])):
        return ()
    view = call.view(tensors[0])
    if view is None:
        return call.value(tensors[0]).gains
    varied = view.varied()
    return ((view.info.name, varied[0]),) if len(varied) == 1 and not view.info.is_buffer else ()


def normalised_copy(call: Call, weight: Tensor, out: Tensor, gain: Tensor | None, *, centred: bool) -> bool:
    """Let a parameter whose rows were normalised, each by itself, stand for the parameter; return whether this is one.

    gain: what the normalised rows are multiplied by, one number each.
    """
    tracer = call.tracer
    view = tracer.view(weight)
    if view is None or view.info.is_buffer or tracer.memory.computed_weight(weight) is not None:
        return False
    info = view.info
    if len(info.shape) < 2 or weight.numel() != math.prod(info.shape) or out.dtype != weight.dtype:
        return False
    found: Axis | None = None
    ids: IntArray | None = None
    if gain is not None:
        own = tracer.view(gain)
        if own is not None:
            varied = own.varied()
            found = (own.info.name, varied[0]) if len(varied) == 1 and not own.info.is_buffer else None
            ids = own.ids(varied[0]) if len(varied) == 1 else None
            tracer.read(own.info, "operator")
        else:
            value = tracer.value(gain)
            found, ids = (value.gains[0] if len(value.gains) == 1 else None), value.ids
        if ids is None or ids.size != info.shape[0]:
            return False
    if not tracer.memory.adopt(out, weight):
        return False
    if ids is not None:
        tracer.trace.tie(ids.reshape(-1), info.axis(0))
    tracer.memory.note_computed(out, ComputedWeight(fixed=False, rows=True, centred=centred, gain=found))
    return True


def normal_of(call: Call, weight: Tensor, info: TensorInfo, dim_out: int, columns: IntArray) -> Normal | None:
    """Return how the rows of a computed weight are normalised; pin its columns where no gain makes up for it."""
    computed = call.tracer.memory.computed_weight(weight)
    if computed is None or not computed.rows:
        return None
    if dim_out != 0:
        call.pin(columns, Code.ROWS_ALONG_INPUTS(name=info.name))
        return None
    if computed.gain is None:
        call.pin(columns, Code.ROWS_STANDARDISED(name=info.name))
        return None
    raw, used = call.tracer.memory.raw_and_used(weight, info)
    if raw.is_meta or isinstance(used, FakeTensor) or isinstance(raw, FakeTensor):
        one = np.ones(info.shape[0])
        return Normal(gain=computed.gain[0], gain_dim=computed.gain[1], centred=computed.centred, scale=one, length=one)
    rows, seen = raw.double().flatten(1), used.double().flatten(1)
    if computed.centred:
        rows, seen = rows - rows.mean(1, keepdim=True), seen - seen.mean(1, keepdim=True)
    square = rows.square().sum(1)
    scale = torch.where(square > 0, (rows * seen).sum(1) / square, 0.0)
    return Normal(
        gain=computed.gain[0],
        gain_dim=computed.gain[1],
        centred=computed.centred,
        scale=scale.cpu().numpy(),
        length=square.sqrt().cpu().numpy(),
    )
