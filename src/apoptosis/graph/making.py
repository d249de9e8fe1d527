"""Weights that are computed from one parameter before they are used, and stay as easy to fold into as the parameter.

Lives here: factors of a whole weight. Does not live here: weights of which only the rows can be followed
(rules_norm.py, `held`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from apoptosis.graph.tracer import Call


@dataclass(frozen=True, slots=True)
class Making:
    """What the copy of a parameter was multiplied by. fixed: by plain numbers of the code, which training keeps.

    numbers: where these are noted, as in values.Multiple.
    """

    factor: float = 1.0
    fixed: bool = True
    numbers: tuple[tuple[int, int, float], ...] = ()


def scaled_copy(call: Call) -> bool:
    """Let the product of a parameter and a number stand for the parameter; return whether this is one.

    The number may be a tensor of one element (a gain that is learned), but no channel.
    """
    if call.name not in ("mul", "div", "neg") or call.inplace or call.kwargs.get("rounding_mode") is not None:
        return False
    tracer = call.tracer
    wide = [t for t in call.tensors() if (v := tracer.view(t)) is not None and len(v.varied()) > 1]
    if len(wide) != 1 or wide[0].shape != call.outs[0].shape or wide[0].dtype != call.outs[0].dtype:
        return False
    weight, view = wide[0], tracer.view(wide[0])
    if view is None or view.owner.is_buffer or (call.name == "div" and call.args[0] is not weight):
        return False
    making = tracer.memory.making(weight) or Making()
    for other in call.args:
        if other is weight:
            continue
        factor = _number(call, other)
        if factor is None or factor == 0.0:
            return False
        factor = 1.0 / factor if call.name == "div" else factor
        numbers = making.numbers
        if not isinstance(other, Tensor) and tracer.numbers.at >= 0:
            numbers = (*numbers, (tracer.numbers.at, 0, -1.0 if call.name == "div" else 1.0))
        fixed = making.fixed and not isinstance(other, Tensor)
        making = replace(making, factor=making.factor * factor, fixed=fixed, numbers=numbers)
    if call.name == "neg":
        making = replace(making, factor=-making.factor)
    if not tracer.memory.adopt(call.outs[0], weight):
        return False
    tracer.memory.made(call.outs[0], making)
    return True


def _number(call: Call, other: object) -> float | None:
    """Return a factor that is the same for all elements; nan where it is not known, None for anything else."""
    if isinstance(other, bool) or not isinstance(other, int | float | Tensor):
        return None
    if not isinstance(other, Tensor):
        return float(other)
    view = call.tracer.view(other)
    if other.numel() != 1 or other.is_complex():
        return None
    if view is None and (call.tracer.value(other).live or call.tracer.value(other).origin != "a constant"):
        return None  # computed from the weight, it may be
    if view is not None:
        call.tracer.read(view.owner, "operator")
    return float("nan") if other.is_meta or isinstance(other, FakeTensor) else float(other.detach())
