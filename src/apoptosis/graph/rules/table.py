"""The registry of operators that have a rule, and the rules of elementwise operators and fills.

Holds: what ties channels that meet element by element. Elsewhere: data movement (rules/movement.py,
rules/layout.py), lookups (rules/lookup.py), reductions (rules/reduction.py), normalisations (rules/normalization.py),
contractions (rules/contraction.py, rules/convolution.py, rules/product.py, rules/experts.py). What is not in the
registry pins whatever reaches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches

import numpy as np
import torch
from torch import Tensor, nn

from apoptosis.errors import ArgumentError
from apoptosis.graph.rules.batch_norm import BATCH_NORMS
from apoptosis.graph.rules.broadcast import tie_broadcast
from apoptosis.graph.rules.computed_weights import gains_of, scaled_copy, scaled_in_place
from apoptosis.graph.rules.contraction import CONTRACTIONS
from apoptosis.graph.rules.convolution import CONVOLUTIONS
from apoptosis.graph.rules.experts import EXPERTS
from apoptosis.graph.rules.layout import LAYOUTS
from apoptosis.graph.rules.lookup import LOOKUPS
from apoptosis.graph.rules.movement import MOVES
from apoptosis.graph.rules.normalization import NORMS, held_together, parameter_operand
from apoptosis.graph.rules.product import PRODUCTS
from apoptosis.graph.rules.reduction import REDUCTIONS, has_second_operand, reduce
from apoptosis.graph.trace.scalars import scalar_operators
from apoptosis.graph.trace.tracer import Call, Result, Rule
from apoptosis.graph.trace.values import Path, Paths, Value, drop_paths, linear_after, nothing, varying
from apoptosis.numerics.activations import NEURON_TYPES

# Operators that are an activation by themselves: name of the neuron type, and how many of the operator's scalar
# arguments belong to it.
ACTIVATIONS: dict[str, tuple[str, int]] = {
    operator: (kind.name, len(kind.defaults)) for kind in NEURON_TYPES.values() for operator in kind.operators
}

_ELEMENTWISE = (
    "abs acos acosh add addcdiv addcmul angle asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or "
    "bitwise_xor ceil clamp clamp_max clamp_min clip copysign cos cosh deg2rad digamma div eq erf erfc erfinv exp "
    "exp2 expm1 floor floor_divide fmax fmin fmod frac ge gt heaviside hypot i0 isfinite isinf isnan isneginf "
    "isposinf ldexp le lerp lgamma log log10 log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or "
    "logical_xor logit lt masked_fill maximum minimum mul nan_to_num ne neg nextafter polygamma pow prelu rad2deg "
    "reciprocal remainder round rrelu rsqrt rsub sgn sign signbit sin sinc sinh special_entr special_log_ndtr sqrt "
    "square sub tan trunc where xlogy _prelu_kernel rrelu_with_noise rrelu_with_noise_functional gelu __and__ __iand__ "
    "__ilshift__ __ior__ __irshift__ __ixor__ __lshift__ __or__ __rshift__ __xor__ bitwise_left_shift "
    "bitwise_right_shift complex conj_physical float_power frexp gcd igamma igammac lcm mvlgamma polar "
    "special_bessel_j0 special_bessel_j1 special_erfcx special_i0e special_i1 special_i1e special_ndtr special_ndtri "
    "special_xlog1py special_zeta true_divide fake_quantize_per_tensor_affine_cachemask "
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams _add_relu _masked_scale _standard_gamma poisson"
).split()

_FREE = "empty zeros ones full rand randn scalar_tensor empty_strided".split()
_LIKE = (
    "empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty new_zeros new_ones new_full "
    "new_empty_strided fill zero bernoulli uniform normal exponential geometric log_normal cauchy random"
).split()


def _activated(paths: Paths, name: str, args: tuple[float, ...], slopes: str | None = None) -> Paths:
    def step(path: Path | None) -> Path | None:
        if path is None or path.activated:
            return None
        return replace(path, activation=name, args=args, slopes=slopes, activated=True)

    return {key: step(path) for key, path in paths.items()}


def _scalars(call: Call, count: int) -> tuple[float, ...] | None:
    names = {
        "leaky_relu": ("negative_slope",), "threshold": ("threshold", "value"), "hardtanh": ("min_val", "max_val"),
        "softshrink": ("lambd",), "hardshrink": ("lambd",), "softplus": ("beta", "threshold"),
        "elu": ("alpha", "scale", "input_scale"), "celu": ("alpha",),
    }  # fmt: skip
    defaults = {
        "leaky_relu": (0.01,), "hardtanh": (-1.0, 1.0), "softshrink": (0.5,), "hardshrink": (0.5,),
        "softplus": (1.0, 20.0), "elu": (1.0, 1.0, 1.0), "celu": (1.0,),
    }  # fmt: skip
    out: list[float] = []
    for i in range(count):
        default = defaults.get(call.name, (None,) * count)[i]
        found = call.arg(i + 1, names[call.name][i], default)
        if isinstance(found, Tensor) or found is None:
            return None
        out.append(float(found))
    return tuple(out)


def _elementwise(call: Call) -> Result:
    """Tie the ids that meet; follow activations, dropout masks and the bias that a module adds to its own output."""
    if scaled_in_place(call) or scaled_copy(call):
        return None
    tensors = call.tensors()
    values = [call.tracer.value(t) if call.tracer.view(t) is None else None for t in tensors]
    ndim = call.outs[0].dim()
    computed = held_together(call, tensors, ndim)
    met = tie_broadcast(call, [t for t in tensors if all(t is not c for c, _ in computed)], ndim, computed)
    known = [*(v for _, v in computed), *(v for v in values if v is not None)]
    if _own_bias(call, tensors):
        for axis in known[0].paths:
            call.tracer.findings.bias_of[axis].update(v.owner.name for t in tensors if (v := call.tracer.view(t)))
        return replace(met, paths=known[0].paths, source=known[0].source, linear=known[0].linear)
    for value in known:
        if value.source is not None:
            call.tracer.findings.readers[value.source].add("operator")
    masks = [v for v in known if v.keep is not None]
    others = [v for v in known if v.keep is None]
    if call.name in ("mul", "div") and len(tensors) == len(masks) == 1:
        return replace(met, keep=masks[0].keep, is_filler=masks[0].is_filler)
    if call.name == "mul" and len(tensors) == 2 and len(masks) == len(others) == 1:
        rate = round(1.0 - (1.0 - others[0].dropout) * float(masks[0].keep or 0.0), 12)
        return replace(met, paths=others[0].paths, dropout=rate)
    if call.name == "mul" and len(others) == len(tensors) == 2 and not call.inplace and met.has_channels:
        call.tracer.memory.multiplied(call.outs[0], tensors[0], tensors[1])
    paths = _unary_paths(call, tensors, values)
    scalar = any(isinstance(a, int | float | complex) for a in call.args)
    result = replace(
        met,
        paths=paths if paths is not None else drop_paths([v.paths for v in known]),
        linear=linear_after(call.name, values, scalar=scalar),
        gains=gains_of(call),
        scaled=call.name in ("mul", "div") and len(tensors) == 1 and known != [] and _plain(known[0]),
    )
    return [result] + [result] * (len(call.outs) - 1)


def _plain(value: Value) -> bool:
    """Whether every channel is its producer's, times the same number."""
    return value.scaled or list(value.paths.values()) == [Path()]


def _unary_paths(call: Call, tensors: Sequence[Tensor], values: Sequence[Value | None]) -> Paths | None:
    """Return the paths after an activation, or None when this is none."""
    first = values[0] if values else None
    if first is None:
        return None
    if call.name in ACTIVATIONS and len(tensors) == 1:
        name, count = ACTIVATIONS[call.name]
        args = _scalars(call, count)
        return None if args is None else _activated(first.paths, name, args)
    if call.name == "gelu" and len(tensors) == 1:
        tanh = call.arg(1, "approximate", "none") == "tanh"
        return _activated(first.paths, "gelu_tanh" if tanh else "gelu", ())
    if call.name.startswith("rrelu_with_noise"):
        return _activated(
            first.paths, "rrelu", (float(call.arg(2, "lower", 1 / 8)), float(call.arg(3, "upper", 1 / 3)))
        )
    if call.name in ("_prelu_kernel", "prelu") and len(tensors) == 2:
        view = call.tracer.view(tensors[1])
        return None if view is None else _activated(first.paths, "prelu", (), view.owner.name)
    return None


def _extremum(call: Call) -> Result:
    return _elementwise(call) if has_second_operand(call) else reduce(call)


def _own_bias(call: Call, tensors: Sequence[Tensor]) -> bool:
    """Whether a linear module adds its own bias in a separate operator (done for inputs that are not contiguous)."""
    module = call.tracer.module
    if call.name != "add" or len(tensors) != 2 or len(call.args) != 2:
        return False
    if not isinstance(module, nn.Linear):
        return _functional_bias(call, tensors)
    view, bias = call.tracer.view(tensors[1]), call.tracer.owner_of(module, "bias")
    source = call.tracer.value(tensors[0]).source if call.tracer.view(tensors[0]) is None else None
    if view is None or view.owner is not bias or source != call.tracer.module_name:
        return False
    call.tracer.findings.biases.add((view.owner.name, 0))
    return True


def _functional_bias(call: Call, tensors: Sequence[Tensor]) -> bool:
    """Whether a parameter with one entry per row is added to what F.linear made of inputs that are not contiguous."""
    if call.tracer.view(tensors[0]) is not None:
        return False
    value, view = call.tracer.value(tensors[0]), call.tracer.view(tensors[1])
    if view is None or view.ndim != 1 or view.dims is None or view.owner.is_buffer or len(view.owner.shape) != 1:
        return False
    if list(value.paths.values()) != [Path()] or varying(value.ids) - {value.ids.ndim - 1}:
        return False
    name, dim = next(iter(value.paths))
    owner = call.tracer.findings.slots.owners[name]
    places = value.ids.reshape(-1) - owner.bases[dim]
    if view.owner.shape[0] != owner.shape[dim] or not np.array_equal(view.slots(0) - view.owner.bases[0], places):
        return False
    call.tracer.findings.biases.add((view.owner.name, 0))
    return True


def _free(call: Call) -> Result:
    return nothing(call.outs[0].dim(), is_filler=True) if call.outs else None


def _like(call: Call) -> Result:
    """Shaped after the first operand: its ids where the shape is the same; random and filled values fit anything."""
    first = call.args[0]
    if not isinstance(first, Tensor):
        return _free(call)
    if any(isinstance(t, Tensor) for t in call.args[1:]):
        return tie_broadcast(call, call.tensors(), call.outs[0].dim())
    if first.shape != call.outs[0].shape or call.tracer.view(first) is not None:
        return _free(call)
    value = call.tracer.value(first)
    keep = None
    if call.name == "bernoulli":
        rate = call.arg(1, "p", 0.5)  # the dispatcher leaves defaults out
        keep = float(rate) if call.inplace and call.overload == "float" else None
    return Value(value.ids, is_filler=not value.has_channels, origin=value.origin, keep=keep)


def _native_dropout(call: Call) -> Result:
    value = parameter_operand(call, call.args[0])
    rate = 1.0 - (1.0 - value.dropout) * (1.0 - float(call.args[1])) if call.arg(2, "train") in (True, None) else 0.0
    return [replace(value, dropout=rate, source=None), Value(value.ids, is_filler=not value.has_channels)]


RULES: dict[str, tuple[Rule, bool]] = {
    **{name: (_elementwise, False) for name in (*_ELEMENTWISE, *ACTIVATIONS)},
    **{name: (_free, False) for name in _FREE},
    **{name: (_like, False) for name in _LIKE},
    **{name: (rule, False) for name, rule in MOVES.items()},
    **{name: (rule, reads) for name, (rule, reads) in CONTRACTIONS.items()},
    **CONVOLUTIONS,
    **PRODUCTS,
    **BATCH_NORMS,
    **EXPERTS,
    **REDUCTIONS,
    **NORMS,
    **LOOKUPS,
    **LAYOUTS,
    **{name: (_extremum, True) for name in ("max", "min")},
    "native_dropout": (_native_dropout, True),
}
"""Operator name without namespace and trailing underscore -> its rule, and whether it reads its operands' values."""


SCALARS = scalar_operators((*_ELEMENTWISE, *ACTIVATIONS, "scatter", "index_fill", "index_add"))
"""Operators whose plain numbers must be the same before and after an edit."""


WORKS = frozenset(RULES) - frozenset((*MOVES, *CONTRACTIONS, *CONVOLUTIONS, *PRODUCTS))
"""Operators that do something to channels, so that it matters to which."""


def register_rule(operator: str, rule: Rule) -> None:
    """Give an operator a rule: which channels its outputs carry.

    A rule is called once for every call of the operator in a captured pass, after it has run. It may use

    - `call.args`, `call.kwargs`, `call.arg(index, name, default)`: what the operator was called with. Defaults are left
      out by the dispatcher, so give them again; `call.outs`: the tensors that came out, in order;
    - `call.tensors()`: all tensors among the arguments, those in lists included;
    - `call.tracer.value(tensor)`: the Value of an operand. `.ids` is an integer array with as many axes as the tensor
      has, 0 for no channel; an axis along which the ids are constant has size 1. `.has_channels`: any channel at all;
    - `call.tracer.view(tensor)`: the parameter or buffer that an operand is (a view of), else None;
    - `call.pin(ids, text, remedy)`: these channels are never removed. `text` goes on "operator aten.name in 'module'";
    - `call.tracer.findings.tie(ids, ids)`: the channels at the same places, after broadcasting, are removed together.

    It returns the Value of the output, a list of Values for several outputs, or None for outputs without channels. The
    in-place form of an operator is served by the same rule, whose answer is then written to the operand. A rule that
    raises LookupError, TypeError or ValueError pins all operands.

    Hand on ids only along axes whose elements the operator keeps apart (what it mixes, it pins), and as a new
    `Value(ids)`: one that is handed on whole still tells how its numbers were made.

    Args:
        operator: its name without namespace, overload and trailing underscore, e.g. "topk".
        rule: takes a Call (apoptosis.graph.trace.tracer) and returns Values (apoptosis.graph.trace.values).

    Raises:
        ArgumentError: the operator has a rule already, or torch knows no such operator.

    Example:
        >>> import torch
        >>> from apoptosis.graph import analyse
        >>> class Airy(nn.Module):
        ...     def forward(self, x):
        ...         return torch.special.airy_ai(x)
        >>> net, x = nn.Sequential(nn.Linear(4, 6), Airy(), nn.Linear(6, 2)), torch.zeros(3, 4)
        >>> analyse(net, (x,)).groups[0].pin.reason
        "operator aten.special_airy_ai in '1' has no rule"
        >>> register_rule("special_airy_ai", lambda call: Value(call.tracer.value(call.args[0]).ids))
        >>> analyse(net, (x,)).groups[0].pin is None
        True
        >>> del RULES["special_airy_ai"]
    """
    if not isinstance(operator, str):
        raise ArgumentError(f"operator is a {type(operator).__name__}, not the name of an operator.")
    if operator in RULES:
        raise ArgumentError(f"operator '{operator}' has a rule already; there are {len(RULES)} in all.")
    if not callable(rule):
        raise ArgumentError(f"the rule of '{operator}' is a {type(rule).__name__}, not a function of a Call.")
    if not _is_known(operator):
        near = ", ".join(get_close_matches(operator, dir(torch.ops.aten), 3)) or "none"
        raise ArgumentError(
            f"torch has no operator 'aten::{operator}' (similar names: {near}). Give the name in a pin's reason."
        )
    RULES[operator] = (rule, True)


def _is_known(operator: str) -> bool:
    """Whether torch has the operator, or its in-place form."""
    return any(hasattr(torch.ops.aten, name) for name in (operator, f"{operator}_"))
