"""Arguments that users pass, checked before anything else happens, with one clear line each.

Holds: validation of the arguments of Apoptosis and shrink_. Elsewhere: anything that needs a capture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, get_args

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from apoptosis.distributed.wrappers import Unwrapped, unwrap
from apoptosis.errors import ArgumentError
from apoptosis.model.passes import check_not_inference
from apoptosis.records import Frozen, NormWidths

_SEEDS = 2**40  # as many windows and ranks draw from generators of their own, whose seeds have 64 bits
_LOGGERS = {  # what a logger of another library has -> what makes a function of it
    "add_scalar": "apoptosis.events.to_tensorboard(writer) makes one of a SummaryWriter.",
    "log_metrics": "apoptosis.events.to_mlflow(logger) makes one of what has log_metrics().",
    "log": "apoptosis.events.to_wandb(run) makes one of what has log().",
}


def check_model(model: object) -> Unwrapped:
    """Check that it is a module with data in it, and take its wrappers off.

    Raises: ArgumentError: no module, a wrapper that removal does not reach through, parameters without shape or data,
    or torch.inference_mode().
    """
    if not isinstance(model, nn.Module):
        remedy = " Give the module that was exported." if type(model).__name__ == "ExportedProgram" else ""
        raise ArgumentError(f"model is a {type(model).__name__}, not a torch.nn.Module.{remedy}")
    unwrapped = unwrap(model)
    for name, module in unwrapped.model.named_modules():
        forward = vars(module).get("forward")
        if "make_graphed_callables" in str(getattr(forward, "__qualname__", "")):
            raise ArgumentError(
                f"module '{name}' replays a CUDA graph (torch.cuda.make_graphed_callables), which keeps computing "
                "with the tensors that it was recorded with. Give the model before it is graphed; "
                "torch.compile(mode='reduce-overhead') records its graphs again after an event."
            )
    check_data(model)
    check_not_inference(unwrapped.model, "removing channels")
    return unwrapped


def check_data(model: nn.Module) -> None:
    """Check that all parameters and buffers have shapes and data.

    Raises: ArgumentError: one is lazy, lies on the meta device or is fake.
    """
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            if nn.parameter.is_lazy(tensor):
                raise ArgumentError(f"{kind} '{name}' is lazy: run the model once so that it gets its shape.")
            where = _without_data(tensor)
            if where:
                raise ArgumentError(
                    f"{kind} '{name}' {where}, so that nothing can be measured. "
                    "Materialise the model (model.to_empty(device=...), then initialise or load it); "
                    "`apoptosis inspect` needs none."
                )


def _without_data(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "lies on the meta device"
    return "is a FakeTensor, without data" if isinstance(tensor, FakeTensor) else ""


def check_optimizers_given(
    optimizer: Optimizer | Sequence[Optimizer] | None, *, trains: nn.Module | None = None
) -> tuple[Optimizer, ...]:
    """Take one optimizer, a sequence of them, or None.

    Raises: ArgumentError: something else, or none that holds a parameter of `trains`, where that is given.
    """
    if optimizer is None:
        found: tuple[Any, ...] = ()
    else:
        several: Any = optimizer
        plain = not isinstance(several, Sequence) or isinstance(several, str | bytes)
        found = (optimizer,) if plain else tuple(dict.fromkeys(several))
    for entry in found:
        if not isinstance(entry, Optimizer):
            raise ArgumentError(f"optimizer is a {type(entry).__name__}, not a torch.optim.Optimizer.{_wrapped(entry)}")
        if not isinstance(getattr(entry, "param_groups", None), list):
            raise ArgumentError(f"optimizer: {type(entry).__name__} has no list param_groups.{_wrapped(entry)}")
    if trains is not None:
        own = {id(parameter) for parameter in trains.parameters()}
        held = {id(p) for entry in found for group in entry.param_groups for p in group["params"]}
        if not held & own:
            why = "none holds a parameter of the model" if found else "none was given"
            raise ArgumentError(f"optimizer: {why}. Make it from model.parameters(); shrink_() works without one.")
    return found


def _wrapped(entry: object) -> str:
    """Say which optimizer an object wraps, if it does."""
    for name, value in getattr(entry, "__dict__", {}).items():
        if isinstance(value, Optimizer):
            return f" Give its .{name} ({type(value).__name__}), if it keeps no tensors as large as parameters itself."
    return ""


def check_others(
    criterion: object,
    seed: object,
    calibration: object = None,
    *,
    log: object = None,
    logits: object = None,
    norm_widths: object = "pinned",
    frozen: object = "keep",
) -> tuple[int, float | None]:
    """Check the types of the remaining arguments; returns the seed as an int and the calibration as a float.

    Raises: ArgumentError: naming the argument.
    """
    if not isinstance(criterion, str):
        raise ArgumentError(f"criterion={criterion!r} must be the name of a criterion.")
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < _SEEDS:
        raise ArgumentError(f"seed={seed!r} must be a whole number in 0 <= seed < 2**40.")
    if norm_widths not in get_args(NormWidths):
        raise ArgumentError(f"norm_widths={norm_widths!r} must be {' or '.join(map(repr, get_args(NormWidths)))}.")
    if frozen not in get_args(Frozen):
        raise ArgumentError(f"frozen={frozen!r} must be {' or '.join(map(repr, get_args(Frozen)))}.")
    for name, value in (("log", log), ("logits", logits)):
        if value is not None and not callable(value):
            adapter = next((f" {hint}" for has, hint in _LOGGERS.items() if name == "log" and hasattr(value, has)), "")
            raise ArgumentError(f"{name}={value!r} must be a function, or None.{adapter}")
    if calibration is None:
        return int(seed), None
    value = float(calibration) if isinstance(calibration, Real) else math.nan
    if isinstance(calibration, bool) or not 0 <= value < math.inf:
        raise ArgumentError(f"calibration={calibration!r} must be a finite number >= 0, or None.")
    return int(seed), value


def check_exclude(exclude: Iterable[str]) -> tuple[str, ...]:
    """Check that they are names or wildcards, not one bare string. Raises: ArgumentError."""
    if isinstance(exclude, str):
        raise ArgumentError(f"exclude={exclude!r}: give a sequence of names, for instance exclude=({exclude!r},).")
    found = tuple(exclude) if isinstance(exclude, Iterable) else (exclude,)
    for name in found:
        if not isinstance(name, str):
            raise ArgumentError(f"exclude: {name!r} is no name of a group; give a sequence of strings.")
    return found


def check_numbers(
    *, tolerance: float | None, align: int, total_steps: int | None = None, budget: float | None = None
) -> tuple[float | None, int, int | None, float | None]:
    """Check the ranges of the numeric arguments; NumPy scalars are numbers too.

    Returns: tolerance, align, total_steps and budget as plain floats and ints, which arithmetic and JSON can rely on.

    Raises: ArgumentError: naming the argument, its value and its range.
    """
    checks = (
        ("tolerance", tolerance, tolerance is None or (_number(tolerance) and 0 <= tolerance < 1), "in 0 <= t < 1"),
        ("budget", budget, budget is None or (_number(budget) and 0 < budget < 1), "a share in 0 < b < 1"),
        ("total_steps", total_steps, total_steps is None or _whole(total_steps), "a whole number >= 1, or None"),
        ("align", align, _whole(align), "a whole number >= 1"),
    )
    for name, value, good, wanted in checks:
        if not good:
            raise ArgumentError(f"{name}={value!r} must be {wanted}.")
    return (
        None if tolerance is None else float(tolerance),
        int(align),
        None if total_steps is None else int(total_steps),
        None if budget is None else float(budget),
    )


def check_limits(*, min_width: float, max_removed: float) -> dict[str, float]:
    """Check what bounds the widths: min_width, a share below 1 or a number of channels; max_removed, a share.

    Returns: both by name, as floats.

    Raises: ArgumentError: naming the argument, its value and its range.
    """
    checks = (
        (
            "min_width",
            min_width,
            _number(min_width) and (0 <= min_width < 1 or _whole(min_width)),
            "a share in 0 <= w < 1, or a number of channels",
        ),
        ("max_removed", max_removed, _number(max_removed) and 0 < max_removed <= 1, "a share in 0 < r <= 1"),
    )
    for name, value, good, wanted in checks:
        if not good:
            raise ArgumentError(f"{name}={value!r} must be {wanted}.")
    return {"min_width": float(min_width), "max_removed": float(max_removed)}


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _whole(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= 1
