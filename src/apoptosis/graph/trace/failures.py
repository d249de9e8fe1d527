"""Errors of a model that fails while it is captured: where, at which operator, and the remedy.

Holds: reading a traceback, hints for common errors. Elsewhere: running the model (capture.py).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

from apoptosis.errors import CaptureError, StructureChangedError, one_line
from apoptosis.model import module_state

_TORCH = os.path.dirname(torch.__file__)
_HERE = os.path.dirname(os.path.dirname(__file__))  # all of graph
_PASSED = module_state.__file__  # operators pass through it, too
_NO_DATA = (
    "without data (meta, fake) a pass cannot read numbers or sizes off its values (.item(), if on a tensor, nonzero): "
    "give a model with data; one on the meta device may get through as a fake one"
)
# Parts of a message, lower case -> what to do; the first that fits counts.
_HINTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("more than 1 value per channel",), "example_input needs at least two examples, BatchNorm cannot train on one"),
    (("meta tensors", "datadependentoutput", "dynamicoutputshape", "_local_scalar_dense", "'meta' backend",
      "meta_nonzero"), _NO_DATA),
    (("device type for autocast",), "it cannot run on the meta device: build it on the fake device instead"),
    (("convert all tensors to faketensors",), "build the inputs under the FakeTensorMode of the model"),
    (("same device", "different from other tensors on", "device of input", "expected device"),
     "put example_input on the model's device"),
    (("out of memory",), "a smaller example_input needs less; its values and its number of examples do not matter"),
    (("required positional argument", "required keyword-only argument", "you have to specify", "must be specified"),
     "example_input must hold all that forward needs: a tuple of positional or a dict of keyword arguments"),
    (("positional argument", "unexpected keyword argument"),
     "a tuple is taken as positional arguments, a dict as keyword arguments; a batch of (inputs, labels) is too much"),
    (("same dtype", "scalar type", "tensor for argument #1 'indices'", "dtype mismatch", "have same dtype"),
     "example_input must have the dtype that the model takes"),
    (("shapes cannot be multiplied", "expected input", "size mismatch", "must match the size", "weight of size",
      "normalized_shape", "invalid for input of size", "index out of range", "sizes of tensors must match"),
     "example_input must have the shape the model trains on"),
)  # fmt: skip
# What torch says of an operator that cannot take a width, lower case.
_MULTIPLES = ("multiple of", "multiples of", "divisible by 8", "divisible by 16")
_ALIGN = "The operator takes widths in multiples alone: use align=8, or leave the group out with exclude=."
_SPLIT = (
    "Split by a size of a tensor, chunk(), or an int attribute of the module; name one that is a multiple of a width "
    "with register_attributes(); or leave the group out with exclude=."
)
_LITERAL = "Look for a literal width or index in the model's forward, or leave the group out with exclude=."


class Fault(NamedTuple):
    """What is wrong with a model after an edit. brief: in words; the others as in CaptureError."""

    brief: str
    remedy: str = _LITERAL
    module: str = ""
    places: tuple[str, ...] = ()
    group: str = ""


def fault_of(error: Exception) -> Fault:
    """Return what an error says of an edited model.

    Example:
        >>> from apoptosis.errors import ShapeError
        >>> fault_of(ShapeError("'a' would have to be two numbers at once.")).brief
        "'a' would have to be two numbers at once"
    """
    text = (str(error) or type(error).__name__).rstrip(".")
    if not isinstance(error, CaptureError | StructureChangedError):
        return Fault(text)
    return Fault(error.brief or text, error.remedy or _LITERAL, error.module, error.places, error.group)


def failure(error: BaseException, model: nn.Module, mode: str, operator_code: CodeType) -> CaptureError:
    """Return the error for a failure of the model's own forward pass on the example input.

    Args:
        error: what the pass raised, with its traceback.
        model: the model.
        mode: "training" or "evaluation".
        operator_code: of the function through which every operator runs, as its argument `func`.

    Returns: with the model, the module that was running, the user's line, the operator, what was raised, the remedy.
    """
    names = {id(module): name for name, module in model.named_modules()}
    module = where = operator = ""
    for frame, line in _frames(error):
        own = frame.f_locals.get("self")
        module = names.get(id(own), module) if isinstance(own, nn.Module) else module
        path = frame.f_code.co_filename
        if not path.startswith((_TORCH, _HERE, _PASSED, "<")):
            where = f"{os.path.basename(path)}:{line}"
        if frame.f_code is operator_code:
            operator = frame.f_locals["func"]._schema.name.replace("::", ".")
    called, at = f" ({where})" if where else "", f", at operator {operator}" if operator else ""
    inside = f", in '{module}'" if module else ""
    message, hint = _message(error, model)
    place = (inside or (", in forward" if where else "")) + called + at
    brief = f"{place.removeprefix(', ')}: {message}" if place else message
    text = f"{type(model).__name__} fails on example_input in {mode} mode{inside}{called}{at}: {message}"
    remedy = after_edit(error, split=operator.startswith("aten.split"))
    return CaptureError(
        f"{text}; {hint}" if hint else text, module=module, places=(where,), brief=brief.rstrip("."), remedy=remedy
    )


def after_edit(error: BaseException, *, split: bool = False) -> str:
    """Return what to do about an edit after which the forward pass raised an error of torch's.

    split: where it splits a tensor.

    Example:
        >>> after_edit(RuntimeError("strides should be multiple of 16 bytes"))
        'The operator takes widths in multiples alone: use align=8, or leave the group out with exclude=.'
    """
    said = str(error).lower()
    return _ALIGN if any(words in said for words in _MULTIPLES) else _SPLIT if split else _LITERAL


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """Yield the frames of a traceback below the one that caught it, outermost first."""
    trace = error.__traceback__.tb_next if error.__traceback__ is not None else None
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _message(error: BaseException, model: nn.Module) -> tuple[str, str]:
    """Return the first line of what was raised, and the way out where what torch says is known."""
    whole = f"{type(error).__name__} {error}".lower()
    hint = next((hint for parts, hint in _HINTS if any(part in whole for part in parts)), "")
    if "argument" in hint:
        hint += f"; forward takes {_arguments(model)}"
    return one_line(error), hint


def _arguments(model: nn.Module) -> Any:
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):
        return "what its code says"
