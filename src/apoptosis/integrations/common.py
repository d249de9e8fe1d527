"""What callbacks of trainers have in common: options, the example input, and going on with a run.

Holds: that. Elsewhere: the trainers (one module each), widths in folders (widths_file.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apoptosis.distributed.wrappers import unwrapped
from apoptosis.engine import Apoptosis
from apoptosis.errors import ArgumentError
from apoptosis.interrupts import restoring
from apoptosis.surgery.undo_log import UndoLog
from apoptosis.surgery.widening import may_widen, widen

ROWS = 8
"""Examples of the first batch that captures run on; checkpoints hold them."""


def check_options(who: str, options: Iterable[str], own: Sequence[str]) -> None:
    """Refuse options that Apoptosis does not have.

    Args: who: the callback's name. own: options that are not handed on, because the trainer decides them.

    Raises: ArgumentError: with those that there are.
    """
    known = [name for name in inspect.signature(Apoptosis).parameters if name not in own]
    for name in options:
        if name not in known:
            raise ArgumentError(f"{who} has no option {name!r}; it has {', '.join(known)}.")


def first_rows(given: Any) -> Any:
    """Return an input with its first examples alone, where all of its tensors have as many; detached copies.

    Example:
        >>> first_rows({"x": torch.zeros(32, 3), "scale": torch.tensor(2.0)})["x"].shape
        torch.Size([8, 3])
    """
    tensors: list[Tensor] = []
    _mapped(given, tensors.append)
    rows = ROWS if len({tensor.shape[0] for tensor in tensors if tensor.dim()}) == 1 else None
    return _mapped(given, lambda tensor: (tensor if not tensor.dim() else tensor[:rows]).detach().clone())


def moved(given: Any, device: torch.device | str) -> Any:
    """Return an input on a device."""
    return _mapped(given, lambda tensor: tensor.to(device))


def _mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return nested lists, tuples and mappings (a tokenizer's, too) with a function of each tensor in its place."""
    if isinstance(value, Tensor):
        return function(value)
    if hasattr(value, "keys"):
        return {key: _mapped(value[key], function) for key in value.keys()}
    return type(value)(_mapped(entry, function) for entry in value) if type(value) in (list, tuple) else value


@contextmanager
def at_full_width(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Give a model the widths that it was built with inside the block, and everything back after it, bitwise.

    A trainer loads the weights of a checkpoint before a run can be made. An `Apoptosis` is made at full width, from
    where its goal counts, and takes over the state of a narrower model then.

    Args: model: with or without its wrappers. optimizers: of it.
    """
    inner, log = unwrapped(model), UndoLog()
    with restoring(log.undo):
        if may_widen(inner):
            widen(log, inner, optimizers)
        try:
            yield
        finally:
            log.undo()
