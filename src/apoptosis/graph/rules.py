"""The registry of operators that have a rule, and the rules of elementwise operators, reductions and pooling.

Lives here: what ties channels without moving or contracting them. Does not live here: data movement (rules_move.py),
contractions and batch normalisation (rules_contract.py). What is not in the registry pins whatever reaches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from apoptosis.errors import ArgumentError
from apoptosis.graph.meet import meet
from apoptosis.graph.rules_contract import CONTRACTIONS
from apoptosis.graph.rules_move import MOVES
from apoptosis.graph.scalars import scalar_operators
from apoptosis.graph.tracer import Call, Result, Rule
from apoptosis.graph.values import Path, Paths, Value, nothing, spoiled, varying

# Operators that are an activation of torch.nn by themselves: name of the neuron type, and how many of the operator's
# scalar arguments belong to it.
ACTIVATIONS: dict[str, tuple[str, int]] = {
    "relu": ("relu", 0),
    "relu6": ("relu6", 0),
    "leaky_relu": ("leaky_relu", 1),
    "threshold": ("threshold", 2),
    "hardtanh": ("hardtanh", 2),
    "tanh": ("tanh", 0),
    "softshrink": ("softshrink", 1),
    "hardshrink": ("hardshrink", 1),
    "sigmoid": ("sigmoid", 0),
    "hardsigmoid": ("hardsigmoid", 0),
    "log_sigmoid_forward": ("logsigmoid", 0),
    "log_sigmoid": ("logsigmoid", 0),
    "softplus": ("softplus", 2),
    "elu": ("elu", 3),
    "celu": ("celu", 1),
    "selu": ("selu", 0),
    "silu": ("silu", 0),
    "mish": ("mish", 0),
    "hardswish": ("hardswish", 0),
}

_ELEMENTWISE = (
    "abs acos acosh add addcdiv addcmul angle asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or "
    "bitwise_xor ceil clamp clamp_max clamp_min clip copysign cos cosh deg2rad digamma div eq erf erfc erfinv exp "
    "exp2 expm1 floor floor_divide fmax fmin fmod frac ge gt heaviside hypot i0 isfinite isinf isnan isneginf "
    "isposinf ldexp le lerp lgamma log log10 log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or "
    "logical_xor logit lt masked_fill maximum minimum mul nan_to_num ne neg nextafter polygamma pow prelu rad2deg "
    "reciprocal remainder round rrelu rsqrt rsub sgn sign signbit sin sinc sinh special_entr special_log_ndtr sqrt "
    "square sub tan trunc where xlogy _prelu_kernel rrelu_with_noise rrelu_with_noise_functional gelu"
).split()

# Position of the `dim` argument.
_REDUCTIONS = {
    "sum": 1, "mean": 1, "amax": 1, "amin": 1, "max": 1, "min": 1, "var": 1, "std": 1, "var_mean": 1, "std_mean": 1,
    "prod": 1, "all": 1, "any": 1, "argmax": 1, "argmin": 1, "logsumexp": 1, "median": 1, "nansum": 1,
    "count_nonzero": 1, "norm": 2, "linalg_vector_norm": 2,
}  # fmt: skip
_ALONG = {"_softmax": 1, "_log_softmax": 1, "_safe_softmax": 1, "softmax": 1, "log_softmax": 1, "cumsum": 1,
          "cumprod": 1, "logcumsumexp": 1}  # fmt: skip

_FREE = "empty zeros ones full rand randn scalar_tensor empty_strided".split()
_LIKE = (
    "empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty new_zeros new_ones new_full "
    "new_empty_strided fill zero bernoulli uniform normal exponential geometric log_normal cauchy random"
).split()
_POOLED = (
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d avg_pool1d "
    "avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d mkldnn_adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "fractional_max_pool2d fractional_max_pool3d max_unpool2d max_unpool3d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d "
    "upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa"
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
    tensors = call.tensors()
    values = [call.tracer.value(t) if call.tracer.view(t) is None else None for t in tensors]
    met = meet(call, tensors, call.outs[0].dim())
    known = [v for v in values if v is not None]
    if _own_bias(call, tensors):
        return replace(met, paths=known[0].paths, source=known[0].source)
    for value in known:
        if value.source is not None:
            call.tracer.findings.readers[value.source].add("operator")
    masks = [v for v in known if v.keep is not None]
    others = [v for v in known if v.keep is None]
    if call.name in ("mul", "div") and len(tensors) == len(masks) == 1:
        return replace(met, keep=masks[0].keep, free=masks[0].free)
    if call.name == "mul" and len(tensors) == 2 and len(masks) == len(others) == 1:
        rate = round(1.0 - (1.0 - others[0].dropout) * float(masks[0].keep or 0.0), 12)
        return replace(met, paths=others[0].paths, dropout=rate)
    paths = _unary_paths(call, tensors, values)
    result = replace(met, paths=paths if paths is not None else spoiled([v.paths for v in known]))
    return [result] + [result] * (len(call.outs) - 1)


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


def _own_bias(call: Call, tensors: Sequence[Tensor]) -> bool:
    """Whether a linear module adds its own bias in a separate operator (done for inputs that are not contiguous)."""
    module = call.tracer.module
    if call.name != "add" or len(tensors) != 2 or len(call.args) != 2 or not isinstance(module, nn.Linear):
        return False
    view, bias = call.tracer.view(tensors[1]), call.tracer.owner_of(module, "bias")
    source = call.tracer.value(tensors[0]).source if call.tracer.view(tensors[0]) is None else None
    if view is None or view.owner is not bias or source != call.tracer.module_name:
        return False
    call.tracer.findings.biases.add((view.owner.name, 0))
    return True


def _free(call: Call) -> Result:
    return nothing(call.outs[0].dim(), "a constant", free=True) if call.outs else None


def _like(call: Call) -> Result:
    """Shaped after the first operand: its ids where the shape is the same; random and filled values fit anything."""
    first = call.args[0]
    if not isinstance(first, Tensor):
        return _free(call)
    if any(isinstance(t, Tensor) for t in call.args[1:]):
        return meet(call, call.tensors(), call.outs[0].dim())
    if first.shape != call.outs[0].shape or call.tracer.view(first) is not None:
        return _free(call)
    value = call.tracer.value(first)
    keep = None
    if call.name == "bernoulli":
        rate = call.arg(1, "p", 0.5)  # the dispatcher leaves defaults out
        keep = float(rate) if call.inplace and call.overload == "float" else None
    return Value(value.ids, free=not value.live, origin=value.origin, keep=keep)


def _native_dropout(call: Call) -> Result:
    value = call.tracer.value(call.args[0])
    rate = 1.0 - (1.0 - value.dropout) * (1.0 - float(call.args[1])) if call.arg(2, "train") in (True, None) else 0.0
    return [replace(value, dropout=rate, source=None), Value(value.ids, free=not value.live)]


def _reduce(call: Call) -> Result:
    tensor = call.args[0]
    value = call.tracer.value(tensor)
    if any(isinstance(t, Tensor) for t in call.args[1:]):  # max(a, b)
        return _elementwise(call)
    dims = call.arg(_REDUCTIONS[call.name], "dim")
    dims = None if isinstance(dims, bool) else dims  # var(x, unbiased)
    axes = (
        list(range(tensor.dim())) if dims is None or dims == [] else dims if isinstance(dims, (list, tuple)) else [dims]
    )
    reduced = {axis % max(1, tensor.dim()) for axis in axes}
    if reduced & varying(value.ids):
        call.pin(value.ids, "reduces over channels")
        return None
    keepdim = call.outs[0].dim() == tensor.dim()
    ids = value.ids if keepdim else value.ids.reshape([n for i, n in enumerate(value.ids.shape) if i not in reduced])
    linear, largest = call.name == "mean", call.name in ("amax", "max")
    result = replace(value, ids=ids, paths=_pooled(value.paths, linear, largest), dropout=0.0, source=None, keep=None)
    return [result] * len(call.outs)


def _pooled(paths: Paths, average: bool, largest: bool) -> Paths:
    if not average and not largest:
        return spoiled([paths])
    return {
        key: None if path is None else replace(path, pooled=True, max_pool=path.max_pool or largest)
        for key, path in paths.items()
    }


def _along(call: Call) -> Result:
    tensor = call.args[0]
    value = call.tracer.value(tensor)
    if int(call.arg(_ALONG[call.name], "dim")) % max(1, tensor.dim()) in varying(value.ids):
        call.pin(value.ids, "normalises or accumulates over channels")
        return None
    return replace(value, paths=spoiled([value.paths]), dropout=0.0, source=None, keep=None)


def _pool(call: Call) -> Result:
    tensor = call.args[0]
    if "unpool" in call.name:
        value = meet(call, call.tensors()[:2], tensor.dim())
    else:
        value = call.tracer.value(tensor)
    num = next(int(c) for c in call.name if c in "123")
    if any(axis >= tensor.dim() - num for axis in varying(value.ids)):
        call.pin(value.ids, "pools over an axis that carries channels")
        return None
    largest = "max_pool" in call.name
    average = "adaptive_avg" in call.name or "nearest" in call.name or "linear" in call.name
    if call.name.startswith("avg_pool"):
        padding = call.arg(3, "padding", 0)
        average = (
            not np.any(padding) and call.arg(6, "divisor_override") is None and call.arg(4, "ceil_mode") is not True
        )
    result = replace(value, paths=_pooled(value.paths, average, largest), dropout=0.0, source=None, keep=None)
    return [result] * len(call.outs)


def _glu(call: Call) -> Result:
    """Tie the two halves: out = a sigmoid(b)."""
    tensor = call.args[0]
    value = call.tracer.value(tensor)
    dim = int(call.arg(1, "dim", -1)) % tensor.dim()
    if dim not in varying(value.ids):
        return replace(value, paths=spoiled([value.paths]), dropout=0.0, source=None, keep=None)
    first, second = np.split(value.ids, 2, axis=dim)
    call.tracer.findings.tie(first, second)
    call.pin(np.where((first == 0) != (second == 0), first + second, 0), "gates channels with values that are none")
    return Value(first, paths=spoiled([value.paths]))


RULES: dict[str, tuple[Rule, bool]] = {
    **{name: (_elementwise, False) for name in (*_ELEMENTWISE, *ACTIVATIONS)},
    **{name: (_reduce, True) for name in _REDUCTIONS},
    **{name: (_along, True) for name in _ALONG},
    **{name: (_pool, True) for name in _POOLED},
    **{name: (_free, False) for name in _FREE},
    **{name: (_like, False) for name in _LIKE},
    **{name: (rule, False) for name, rule in MOVES.items()},
    **{name: (rule, reads) for name, (rule, reads) in CONTRACTIONS.items()},
    "native_dropout": (_native_dropout, True),
    "glu": (_glu, True),
}
"""Operator name without namespace and trailing underscore -> its rule, and whether it reads its operands' values."""


SCALARS = scalar_operators((*_ELEMENTWISE, *ACTIVATIONS))
"""Operators whose plain numbers must be the same before and after an edit."""


def register_rule(operator: str, rule: Rule) -> None:
    """Give an operator of the `aten` namespace a rule.

    Args:
        operator: its name without namespace, overload and trailing underscore, e.g. "topk".
        rule: takes a Call and returns the Value of each output (None: carries no channels).

    Raises:
        ArgumentError: the operator has one already.
    """
    if operator in RULES:
        raise ArgumentError(f"operator '{operator}' has a rule already; there are {len(RULES)} in all.")
    RULES[operator] = (rule, True)
