"""Forward passes that the library runs by itself, and compiled models.

Lives here: telling such a pass from the user's own, running compiled parts eagerly where they must be watched,
forgetting what was compiled for other shapes. Does not live here: what a pass is run for (graph, probe, observe).
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_RUNNING = threading.local()
_DYNAMO = "torch._dynamo"  # loaded before anything can have been compiled
_EAGER: set[int] = set()  # who needs compiled code to run eagerly: the stance is one for the process, as they are many
_STANCE: list[Any] = []  # what the first of them set


@contextmanager
def own_pass() -> Iterator[None]:
    """Mark the passes inside as the library's own, and run compiled parts of the model eagerly in them."""
    depth = getattr(_RUNNING, "depth", 0)
    _RUNNING.depth = depth + 1
    try:
        if _DYNAMO not in sys.modules:
            yield
            return
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using `torch.compile")  # about global hooks: those of a capture
            yield
    finally:
        _RUNNING.depth = depth
        _put_back()


def is_own_pass() -> bool:
    """Whether the forward pass that runs now in this thread is one of the library's own.

    Hooks of the user's run in those too, as hooks may compute weights or outputs. One that counts, or that collects
    features for a loss, asks here first.

    Example:
        >>> from torch import nn
        >>> features = []
        >>> net = nn.Linear(2, 2)
        >>> _ = net.register_forward_hook(lambda m, x, y: None if is_own_pass() else features.append(y))
        >>> with own_pass():
        ...     _ = net(torch.ones(1, 2))
        >>> _ = net(torch.ones(1, 2))
        >>> len(features)
        1
    """
    return getattr(_RUNNING, "depth", 0) > 0


class Eager:
    """Runs everything that was compiled eagerly from `begin` to `end`: compiled code passes by hooks added later.

    The stance of torch's compiler is one for the process, so that a compiled function around the model, or a compiled
    training step, is covered. A stance that the user sets in between is left as it is.
    """

    def __init__(self) -> None:
        self._leave: Any = None

    def begin(self) -> None:
        """Set the stance; does nothing where nothing can have been compiled, or where it is set already."""
        if self._leave is None and _DYNAMO in sys.modules:
            if not _STANCE:
                _STANCE[:] = [torch.compiler.set_stance("force_eager")]
            _EAGER.add(id(self))
            self._leave = weakref.finalize(self, _leave, id(self))  # a window that nobody closes ends with its owner
            self._leave.atexit = False

    def end(self) -> None:
        """Put back the stance from before, once nobody needs it any more."""
        if self._leave is not None:
            self._leave()
            self._leave = None


def _leave(key: int) -> None:
    _EAGER.discard(key)
    _put_back()


def _put_back() -> None:
    """Put back the stance unless somebody needs it, or a pass of the library's own runs, which has set another."""
    if _EAGER or not _STANCE or is_own_pass():
        return
    stance = _STANCE.pop()
    now = getattr(sys.modules.get(f"{_DYNAMO}.eval_frame"), "_stance", None)
    if now is stance.stance:
        stance.__exit__(None, None, None)


def compile_seconds() -> float:
    """Return what torch has spent on compiling since `forget_compiled`, seconds of wall time; 0.0 for nothing.

    Torch counts it itself, for all that is compiled in the process.
    """
    told = getattr(sys.modules.get(f"{_DYNAMO}.utils"), "calculate_time_spent", None)
    return float(told().get("total_wall_time", 0.0)) if told is not None else 0.0


def forget_compiled() -> None:
    """Drop what torch has compiled: code for old shapes counts against its limit, beyond which it compiles no more."""
    if _DYNAMO in sys.modules:
        torch.compiler.reset()
