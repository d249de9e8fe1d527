"""Neuron types: for every elementwise activation of torch.nn its formula, Lipschitz constant and symmetry.

Holds: one table of scalar functions φ with their scalar arguments, named as in torch.nn.functional, arguments in
the order of the torch.nn constructor, and the check of their claims. A new one is a row here and
nothing else: captures recognise it by its operators, or by its module's class where it has none. Elsewhere: types of
the user's own (graph.trace.activations), merging (criteria).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from apoptosis.errors import ArgumentError

Scalars = tuple[float, ...]

# max |φ'|, rounded up in the last digit: GELU at √2 is Φ(√2) + √2 N(√2); SiLU and Mish found by bisection on φ''.
_GELU, _GELU_TANH, _SILU, _MISH = 1.1289042, 1.1289931, 1.0998394, 1.0884982
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805


@dataclass(frozen=True, slots=True, kw_only=True)
class Symmetry:
    """What merges φ allows exactly (docs/theory.md, the three "merge" theorems).

    homogeneous: φ(s x) = s φ(x) for every s > 0. reflection: c with φ(-x) = c - φ(x) for every x (0.0 for odd
    functions, 1.0 for the sigmoid), None where there is no such c.
    """

    homogeneous: bool = False
    reflection: float | None = None


_NONE, _ODD, _HOMOGENEOUS = Symmetry(), Symmetry(reflection=0.0), Symmetry(homogeneous=True)
_LINEAR, _POINT = Symmetry(homogeneous=True, reflection=0.0), Symmetry(reflection=1.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NeuronType:
    """One elementwise activation.

    name: as in torch.nn.functional. defaults: values of the scalar arguments left out. phi: the function, on tensors.
    lipschitz, jump, symmetry: of the scalar arguments, with |φ(a) - φ(b)| <= lipschitz |a - b| + jump for all a, b
    (jump is 0 for continuous functions; an infinite constant means that no bound holds).
    module: the class in torch.nn, "" where there is none. slopes: a weight per channel takes the place of the argument.
    operators: of aten, each of which computes φ by itself and is called with the scalar arguments behind its operand.
    composed: the module computes φ by several operators, and is recognised by its class.
    """

    name: str
    module: str
    phi: Callable[..., Tensor]
    lipschitz: Callable[..., float]
    symmetry: Callable[..., Symmetry]
    defaults: Scalars = ()
    jump: Callable[..., float] = lambda *_: 0.0
    slopes: bool = False
    operators: tuple[str, ...] = ()
    composed: bool = False

    def fill(self, args: Sequence[float]) -> Scalars:
        """Return all scalar arguments, the ones left out at their defaults.

        Raises: ArgumentError: too many arguments.
        """
        if len(args) > len(self.defaults):
            raise ArgumentError(f"activation '{self.name}' takes {len(self.defaults)} arguments, {len(args)} given.")
        return (*args, *self.defaults[len(args) :])


def _elu(x: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    return torch.where(x > 0, scale * x, scale * alpha * torch.expm1(input_scale * x.clamp(max=0)))


def _elu_lipschitz(alpha: float, scale: float, input_scale: float) -> float:
    return abs(scale) * max(1.0, abs(alpha * input_scale)) if input_scale >= 0 else math.inf


def _elu_symmetry(alpha: float, scale: float, input_scale: float) -> Symmetry:
    return _HOMOGENEOUS if alpha == 0 or input_scale == 0 else _NONE


def _softplus(x: Tensor, beta: float, threshold: float) -> Tensor:
    return F.softplus(x, beta, threshold)


def _softplus_jump(beta: float, threshold: float) -> float:
    return abs(math.log1p(math.exp(-threshold)) / beta) if threshold > -700 else math.inf


def _sloped(slope: float) -> Symmetry:
    return _LINEAR if slope == 1.0 else _HOMOGENEOUS


def _hardtanh_symmetry(low: float, high: float) -> Symmetry:
    point = low + high  # φ(-x) = (low + high) - φ(x) would need the kink at 0 to be the centre
    if low == 0.0 and high == math.inf:
        return _HOMOGENEOUS
    return Symmetry(reflection=0.0) if point == 0.0 else _NONE


def _entry(
    name: str,
    module: str,
    phi: Callable[..., Tensor],
    lipschitz: float | Callable[..., float],
    symmetry: Symmetry | Callable[..., Symmetry],
    *,
    operators: tuple[str, ...] | None = None,
    **more: Any,
) -> NeuronType:
    """Return one row of the table. What does not depend on the arguments is given as it is, not as a function.

    operators: None: one, of the same name.
    """
    return NeuronType(
        name=name,
        module=module,
        phi=phi,
        lipschitz=lipschitz if callable(lipschitz) else lambda *_: lipschitz,
        symmetry=symmetry if callable(symmetry) else lambda *_: symmetry,
        operators=(name,) if operators is None else operators,
        **more,
    )


def _slope_lipschitz(slope: float) -> float:
    return max(1.0, abs(slope))


_BUILT_IN = (
    _entry("identity", "Identity", lambda x: x, 1.0, _LINEAR, operators=()),
    _entry("relu", "ReLU", F.relu, 1.0, _HOMOGENEOUS),
    _entry("relu6", "ReLU6", F.relu6, 1.0, _NONE),
    _entry("leaky_relu", "LeakyReLU", F.leaky_relu, _slope_lipschitz, _sloped, defaults=(0.01,)),
    # operators=() of these four: rules/table.py reads their arguments in ways of its own
    _entry("prelu", "PReLU", F.leaky_relu, _slope_lipschitz, _sloped, defaults=(0.25,), slopes=True, operators=()),
    _entry(  # in training every element draws its own slope: equal inputs give unequal outputs, nothing merges
        "rrelu",
        "RReLU",
        lambda x, lower, upper: F.rrelu(x, lower, upper, training=False),
        lambda lower, upper: max(1.0, abs(lower), abs(upper)),
        _NONE,
        defaults=(1 / 8, 1 / 3),
        operators=(),
    ),
    _entry("gelu", "GELU", F.gelu, _GELU, _NONE, operators=()),
    _entry("gelu_tanh", "GELU", lambda x: F.gelu(x, approximate="tanh"), _GELU_TANH, _NONE, operators=()),
    _entry(
        "threshold",
        "Threshold",
        F.threshold,
        1.0,
        lambda at, value: _HOMOGENEOUS if at == value == 0 else _NONE,
        defaults=(0.0, 0.0),
        jump=lambda at, value: abs(at - value),
    ),
    _entry("hardtanh", "Hardtanh", F.hardtanh, 1.0, _hardtanh_symmetry, defaults=(-1.0, 1.0)),
    _entry("tanh", "Tanh", torch.tanh, 1.0, _ODD),
    _entry("softsign", "Softsign", F.softsign, 1.0, _ODD, operators=(), composed=True),
    _entry("tanhshrink", "Tanhshrink", F.tanhshrink, 1.0, _ODD, operators=(), composed=True),
    _entry("softshrink", "Softshrink", F.softshrink, 1.0, lambda x: _LINEAR if x == 0 else _ODD, defaults=(0.5,)),
    _entry(
        "hardshrink",
        "Hardshrink",
        F.hardshrink,
        1.0,
        lambda lambd: _LINEAR if lambd <= 0 else _ODD,
        defaults=(0.5,),
        jump=lambda lambd: max(0.0, lambd),
    ),
    _entry("sigmoid", "Sigmoid", torch.sigmoid, 0.25, _POINT),
    _entry("hardsigmoid", "Hardsigmoid", F.hardsigmoid, 1 / 6, _POINT),
    _entry("logsigmoid", "LogSigmoid", F.logsigmoid, 1.0, _NONE, operators=("log_sigmoid", "log_sigmoid_forward")),
    # beyond the threshold softplus is the identity: a step of log(1 + e^-threshold) / beta
    _entry("softplus", "Softplus", _softplus, 1.0, _NONE, defaults=(1.0, 20.0), jump=_softplus_jump),
    # the operator's own arguments alpha, scale, input_scale; nn.ELU has the first alone
    _entry("elu", "ELU", _elu, _elu_lipschitz, _elu_symmetry, defaults=(1.0, 1.0, 1.0)),
    _entry("celu", "CELU", F.celu, lambda alpha: 1.0 if alpha > 0 else math.inf, _NONE, defaults=(1.0,)),
    _entry("selu", "SELU", F.selu, _SELU_SCALE * _SELU_ALPHA, _NONE),
    _entry("silu", "SiLU", F.silu, _SILU, _NONE),
    _entry("mish", "Mish", F.mish, _MISH, _NONE),
    _entry("hardswish", "Hardswish", F.hardswish, 1.5, _NONE),
)

_REGISTRY: dict[str, NeuronType] = {entry.name: entry for entry in _BUILT_IN}

NEURON_TYPES: MappingProxyType[str, NeuronType] = MappingProxyType(_REGISTRY)
"""Every neuron type by name, the built-in ones first."""

NOT_ELEMENTWISE = ("GLU", "MultiheadAttention", "Softmin", "Softmax", "Softmax2d", "LogSoftmax")
"""Activations of torch.nn whose channels depend on one another: no neuron type, nothing merges through them."""


def neuron_type(name: str) -> NeuronType:
    """Look a neuron type up.

    Raises: ArgumentError: there is none of that name; the message lists what there is.

    Example:
        >>> neuron_type("sigmoid").lipschitz(), neuron_type("tanh").symmetry().reflection
        (0.25, 0.0)
    """
    if name not in NEURON_TYPES:
        raise ArgumentError(f"no neuron type '{name}'; there are {', '.join(sorted(NEURON_TYPES))}.")
    return NEURON_TYPES[name]


def register_neuron_type(kind: NeuronType) -> None:
    """Add a neuron type; `register_activation` does so together with the module that computes it.

    Raises: ArgumentError: the name is taken, or a claim about φ does not hold on a grid over [-30, 30] at the
    default arguments; the message gives the place.
    """
    if not kind.name or kind.name in _REGISTRY:
        raise ArgumentError(f"neuron type '{kind.name}' is there already; there are {', '.join(sorted(_REGISTRY))}.")
    fault = broken_claim(kind)
    if fault:
        raise ArgumentError(f"neuron type '{kind.name}' is not what is said of it: {fault}")
    _REGISTRY[kind.name] = kind


def broken_claim(kind: NeuronType) -> str:
    """Check on a grid what a neuron type claims about φ, at its default arguments.

    Returns: the first claim that fails, with the place; "" when all hold.

    Example:
        >>> broken_claim(neuron_type("tanh"))
        ''
    """
    x = torch.linspace(-30, 30, 24_001, dtype=torch.float64, device="cpu")
    y, args = _values(kind, x), kind.defaults
    if y is None:
        return "phi does not take a float64 tensor to one of the same shape."
    if not bool(torch.isfinite(y).all()):
        return f"phi({float(x[~torch.isfinite(y)][0]):g}) is not finite."
    apart = torch.randperm(len(x), generator=torch.Generator().manual_seed(0), device="cpu")
    shuffled = _values(kind, x[apart])
    if shuffled is None or not _close(shuffled, y[apart]).all():
        return "phi is not elementwise, or not the same twice."
    lipschitz, jump = kind.lipschitz(*args), kind.jump(*args)
    if not lipschitz >= 0.0 or not jump >= 0.0:
        return f"the Lipschitz constant {lipschitz:g} and the jump {jump:g} cannot be negative."
    for step in (1, 7, 400, 12_000):
        excess = (y[step:] - y[:-step]).abs() - (lipschitz * (x[step:] - x[:-step]) * (1 + 1e-9) + jump + 1e-12)
        if bool((excess > 0).any()):
            at = int(excess.argmax())
            return f"the Lipschitz constant {lipschitz:g} does not hold between {x[at]:g} and {x[at + step]:g}."
    symmetry = kind.symmetry(*args)
    for scale in (0.3, 2.5) if symmetry.homogeneous else ():
        scaled = _values(kind, scale * x)
        same = _close(scaled, scale * y) if scaled is not None else torch.zeros(1, dtype=torch.bool, device="cpu")
        if not same.all():
            return f"not homogeneous: phi({scale:g} x) is not {scale:g} phi(x) at x = {float(x[~same][0]):g}."
    if symmetry.reflection is not None:
        same = _close(y.flip(0), symmetry.reflection - y)
        if not same.all():
            return f"no reflection: phi(-x) is not {symmetry.reflection:g} - phi(x) at x = {float(x[~same][0]):g}."
    return ""


def _values(kind: NeuronType, x: Tensor) -> Tensor | None:
    """φ on a grid; None where it gives something else than numbers of the same shape."""
    with torch.no_grad():
        y = kind.phi(x.clone(), *kind.defaults)
    return y if isinstance(y, Tensor) and y.shape == x.shape and y.dtype == x.dtype else None


def _close(a: Tensor, b: Tensor) -> Tensor:
    return torch.isclose(a, b, rtol=1e-9, atol=1e-9)
