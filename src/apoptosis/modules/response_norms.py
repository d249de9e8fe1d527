"""Global response normalisation that loses channels: the formula, and which modules compute it.

Holds: recognising a module that computes it, by its numbers.
Elsewhere: norms that divide by a mean square or a variance (norms.py), finding it in a forward pass (graph).

Every channel x_j of an image is scaled by its share of what all channels respond:
y = gain x g / (mean of g + ε) + bias + x, g_j the root of the sum of squares of x_j over positions. Where each channel
that went was s_j x_k for one kept channel k, the mean over all channels is a weighted sum over the kept ones, weights
being sums of |s_j|.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_PAIRS = (("weight", "bias"), ("gamma", "beta"))
_EPS = (1e-6, 1e-5, 1e-8)  # that implementations write out
_CLOSE = 1e-5
_POSITIONS = (2, 3)


class Response(NamedTuple):
    """How a module lays a global response norm out. axis: of the channels, 1 or -1; gain, bias: names of parameters."""

    axis: int
    eps: float
    gain: str
    bias: str


def response(x: Tensor, layout: Response, gain: Tensor, bias: Tensor, weights: Tensor, width: int) -> Tensor:
    """Compute the norm of x, (examples, channels, ...) or (examples, ..., channels).

    weights: (channels,), how often each one's response counts in the sum over `width` channels.
    """
    last = x.movedim(layout.axis, -1)
    size: Tensor = torch.linalg.vector_norm(last, dim=tuple(range(1, last.dim() - 1)), keepdim=True)
    mean = (size * weights.to(x.device, x.dtype)).sum(-1, keepdim=True) / width
    y: Tensor = gain.reshape(-1) * (last * (size / (mean + layout.eps))) + bias.reshape(-1) + last
    return y.movedim(-1, layout.axis)


_TRIED: weakref.WeakKeyDictionary[type, dict[Hashable, Response | None]] = weakref.WeakKeyDictionary()
"""By class, what modules alike in all plain attributes and in the shapes of their parameters turned out to compute."""


def computes_response(module: nn.Module) -> Response | None:
    """Return the layout of a module that computes a global response norm and nothing else, None for any other.

    Recognised by its parameters and by its numbers, on a copy whose gain and bias are not zero; what the module's own
    parameters hold does not matter, so that they may be fake. Modules of one class that are alike are tried once.
    """
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    names = next((pair for pair in _PAIRS if set(pair) == set(parameters)), None)
    if names is None or module._buffers or module._modules or type(module).__module__.startswith("torch."):
        return None
    gain, bias = (parameters[name] for name in names)
    wide = [dim for dim, size in enumerate(gain.shape) if size > 1]
    if gain.shape != bias.shape or len(wide) != 1 or gain.is_meta:
        return None
    if not gain.is_floating_point() or gain.dtype in (torch.float16, torch.bfloat16):
        return None
    key = _key(module, parameters)
    tried = _TRIED.setdefault(type(module), {})
    if key is None or key not in tried:
        found = _tried(module, names)
        if key is None:
            return found
        tried[key] = found
    return tried[key]


def _key(module: nn.Module, parameters: Mapping[str, Tensor]) -> Hashable:
    """Return what all that a module computes depends on; None where it holds more than plain values and parameters."""
    own = {name: value for name, value in vars(module).items() if name not in _STANDARD}
    plain = all(value is None or isinstance(value, bool | int | float | str | tuple) for value in own.values())
    shapes = tuple((name, tuple(p.shape), p.dtype, p.device) for name, p in parameters.items())
    try:
        key = type(module).forward.__code__, module.training, shapes, tuple(sorted(own.items()))
        hash(key)
    except (AttributeError, TypeError):  # a forward pass that is no function, a tuple of lists
        return None
    return key if plain else None


_STANDARD = frozenset(vars(nn.Module()))


def _tried(module: nn.Module, names: tuple[str, str]) -> Response | None:
    own = vars(module).get("eps")
    for axis in (-1, 1):
        for eps in dict.fromkeys((own, *_EPS) if type(own) is float else _EPS):
            found = Response(axis, eps, *names)
            if _agrees(module, found):
                return found
    return None


def _agrees(module: nn.Module, layout: Response) -> bool:
    draw = torch.Generator().manual_seed(0)
    own = module._parameters[layout.gain]
    assert own is not None
    width, device = own.numel(), torch.device("cpu") if hasattr(own, "fake_mode") else own.device
    shape = (2, *_POSITIONS, width) if layout.axis == -1 else (2, width, *_POSITIONS)
    for size in (1.0, 10.0 * layout.eps):
        try:
            with torch.no_grad():
                drawn = {  # beside a bias small inputs would lose their digits
                    name: torch.randn(p.shape, generator=draw, dtype=torch.float64, device="cpu")
                    * (size if name == layout.bias else 1.0)
                    for name, p in module._parameters.items()
                    if p is not None
                }
                copied = _copy(module, {name: p.to(device, own.dtype) for name, p in drawn.items()})
                x = torch.randn(shape, generator=draw, dtype=torch.float64, device="cpu") * size
                x = x.to(device, own.dtype)
                got = copied.forward(x)
                gain, bias = (copied._parameters[name].double() for name in (layout.gain, layout.bias))
                want = response(x.double(), layout, gain, bias, gain.new_ones(width), width)
        except Exception:  # noqa: BLE001  # the user's forward may raise anything: then it is no such norm
            return False
        if not isinstance(got, Tensor) or got.shape != x.shape:
            return False
        if bool(((got.double() - want).abs() > _CLOSE * (want.abs() + size)).any()):
            return False
    return True


def _copy(module: nn.Module, parameters: Mapping[str, Tensor]) -> Any:
    """Copy a module, with these tensors in the places of its parameters."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    memo = {id(p): nn.Parameter(parameters[name], requires_grad=False) for name, p in own.items()}
    return copy.deepcopy(module, memo)
