"""Operators that work element by element, and those that fill tensors.

Holds: what ties channels that meet element by element, activations, masks of dropout, biases added by themselves.
Elsewhere: what happens where elements meet (rules/broadcast.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from apoptosis.graph.rules.broadcast import tie_broadcast
from apoptosis.graph.rules.computed_weights import gains_of, scaled_copy, scaled_in_place
from apoptosis.graph.rules.normalization import held_together, parameter_operand
from apoptosis.graph.rules.reduction import has_second_operand
from apoptosis.graph.trace.operators import Result, Rule
from apoptosis.graph.trace.tracer import Call
from apoptosis.graph.trace.values import Axis, Path, Paths, Value, drop_paths, nothing, varying
from apoptosis.numerics.activations import NeuronType

Neuron = tuple[str, tuple[float, ...], str | None]
"""A neuron type's name, its scalar arguments, the parameter that holds its slopes."""


def _activated(paths: Paths, neuron: Neuron) -> Paths:
    name, args, slopes = neuron

    def step(path: Path | None) -> Path | None:
        if path is None or path.activated:
            return None
        return replace(path, activation=name, args=args, slopes=slopes, activated=True)

    return {key: step(path) for key, path in paths.items()}


def neurons(read: Callable[[Call], Neuron | None]) -> Rule:
    """Make a rule of an elementwise operator that is an activation by itself. read: which one a call computes."""
    return lambda call: elementwise(call, read)


def elementwise(call: Call, read: Callable[[Call], Neuron | None] | None = None) -> Result:
    """Tie the ids that meet; follow activations, dropout masks and the bias that a module adds to its own output."""
    role = call.operator.role
    if scaled_in_place(call) or scaled_copy(call):
        return None
    tensors = call.tensors()
    values = [call.value(t) if call.view(t) is None else None for t in tensors]
    ndim = call.outs[0].dim()
    computed = held_together(call, tensors, ndim)
    met = tie_broadcast(call, [t for t in tensors if all(t is not c for c, _ in computed)], ndim, computed)
    known = [*(v for _, v in computed), *(v for v in values if v is not None)]
    if _own_bias(call, tensors):
        for axis in known[0].paths:
            call.trace.bias_of[axis].update(v.info.name for t in tensors if (v := call.view(t)))
        return replace(met, paths=known[0].paths, source=known[0].source, linear=known[0].linear)
    for value in known:
        if value.source is not None:
            call.trace.readers[value.source].add("operator")
    masks = [v for v in known if v.keep is not None]
    others = [v for v in known if v.keep is None]
    if role in ("multiplies", "divides") and len(tensors) == len(masks) == 1:
        return replace(met, keep=masks[0].keep, is_filler=masks[0].is_filler)
    if role == "multiplies" and len(tensors) == 2 and len(masks) == len(others) == 1:
        rate = round(1.0 - (1.0 - others[0].dropout) * float(masks[0].keep or 0.0), 12)
        return replace(met, paths=others[0].paths, dropout=rate)
    if role == "multiplies" and len(others) == len(tensors) == 2 and not call.inplace and met.has_channels:
        call.tracer.memory.multiplied(call.outs[0], tensors[0], tensors[1])
    first = values[0] if values else None
    neuron = read(call) if read is not None and first is not None else None
    paths = drop_paths([v.paths for v in known])
    result = replace(
        met,
        paths=paths if neuron is None or first is None else _activated(first.paths, neuron),
        linear=_linear_after(call, values),
        gains=gains_of(call),
        scaled=role in ("multiplies", "divides") and len(tensors) == 1 and known != [] and _plain(known[0]),
    )
    return [result] + [result] * (len(call.outs) - 1)


def _linear_after(call: Call, operands: Sequence[Value | None]) -> frozenset[Axis]:
    """Return the producers that the result of a call scales with; operands that are parameters stand as None."""
    role, parts = call.operator.role, [frozenset() if value is None else value.linear for value in operands]
    scaling = [part for part in parts if part]
    scales = role == "multiplies" or (role == "divides" and parts[0])
    if role == "moves" or (scales and len(scaling) == 1):  # which changes the sign
        return scaling[0] if scaling else frozenset()
    alone = not any(isinstance(a, int | float | complex) for a in call.args)
    if role == "adds" and len(scaling) == len(parts) and alone:
        return frozenset().union(*scaling)
    return frozenset()


def _plain(value: Value) -> bool:
    """Whether every channel is its producer's, times the same number."""
    return value.scaled or list(value.paths.values()) == [Path()]


def activation(kind: NeuronType) -> Callable[[Call], Neuron | None]:
    """Return what reads the scalar arguments of an operator that is an activation by itself, behind its operand."""

    def read(call: Call) -> Neuron | None:
        args = [call.arg(i, "", default) for i, default in enumerate(kind.defaults, 1)]
        plain = len(call.tensors()) == 1 and not any(arg is None for arg in args)
        return (kind.name, tuple(float(arg) for arg in args), None) if plain else None

    return read


def gelu(call: Call) -> Neuron | None:
    """Read the two forms of GELU."""
    return ("gelu_tanh" if call.arg(1, "approximate", "none") == "tanh" else "gelu", (), None)


def rrelu(call: Call) -> Neuron | None:
    """Read a ReLU with random slopes, which come as a second tensor."""
    return "rrelu", (float(call.arg(2, "lower", 1 / 8)), float(call.arg(3, "upper", 1 / 3))), None


def prelu(call: Call) -> Neuron | None:
    """Read a ReLU with slopes of its own."""
    view = call.view(call.args[1])
    return None if view is None else ("prelu", (), view.info.name)


def extremum(reduction: Rule) -> Rule:
    """Make a rule of max and min, which are elementwise for two tensors and reduce one."""
    return lambda call: elementwise(call) if has_second_operand(call) else reduction(call)


def _own_bias(call: Call, tensors: Sequence[Tensor]) -> bool:
    """Whether a linear module adds its own bias in a separate operator (done for inputs that are not contiguous)."""
    module = call.tracer.module
    if call.name != "add" or len(tensors) != 2 or len(call.args) != 2:
        return False
    if not isinstance(module, nn.Linear):
        return _functional_bias(call, tensors)
    view, bias = call.view(tensors[1]), call.tracer.info_of(module, "bias")
    source = call.value(tensors[0]).source if call.view(tensors[0]) is None else None
    if view is None or view.info is not bias or source != call.tracer.module_name:
        return False
    call.trace.biases.add((view.info.name, 0))
    return True


def _functional_bias(call: Call, tensors: Sequence[Tensor]) -> bool:
    """Whether a parameter with one entry per row is added to what F.linear made of inputs that are not contiguous."""
    if call.view(tensors[0]) is not None:
        return False
    value, view = call.value(tensors[0]), call.view(tensors[1])
    if view is None or view.ndim != 1 or view.dims is None or view.info.is_buffer or len(view.info.shape) != 1:
        return False
    if list(value.paths.values()) != [Path()] or varying(value.ids) - {value.ids.ndim - 1}:
        return False
    name, dim = next(iter(value.paths))
    info = call.trace.channel_ids.tensors[name]
    places = value.ids.reshape(-1) - info.bases[dim]
    if view.info.shape[0] != info.shape[dim] or not np.array_equal(view.ids(0) - view.info.bases[0], places):
        return False
    call.trace.biases.add((view.info.name, 0))
    return True


def fill(call: Call) -> Result:
    """Make a tensor of nothing but numbers that say nothing of their place."""
    return nothing(call.outs[0].dim(), is_filler=True) if call.outs else None


def fill_like(call: Call) -> Result:
    """Shaped after the first operand: its ids where the shape is the same; random and filled values fit anything."""
    first = call.args[0]
    if not isinstance(first, Tensor):
        return fill(call)
    if any(isinstance(t, Tensor) for t in call.args[1:]):
        return tie_broadcast(call, call.tensors(), call.outs[0].dim())
    if first.shape != call.outs[0].shape or call.view(first) is not None:
        return fill(call)
    value = call.value(first)
    return Value(value.ids, is_filler=not value.has_channels, origin=value.origin)


def bernoulli(call: Call) -> Result:
    """Fill with ones and zeros: the mask of a dropout where one rate is written over a tensor."""
    made = fill_like(call)
    if isinstance(made, Value) and call.inplace and call.overload == "float":
        return replace(made, keep=float(call.arg(1, "p", 0.5)))  # the dispatcher leaves defaults out
    return made


def native_dropout(call: Call) -> Result:
    """Drop and scale in one operator, which returns its mask, too."""
    value = parameter_operand(call, call.args[0])
    rate = 1.0 - (1.0 - value.dropout) * (1.0 - float(call.args[1])) if call.arg(2, "train") in (True, None) else 0.0
    return [replace(value, dropout=rate, source=None), Value(value.ids, is_filler=not value.has_channels)]
