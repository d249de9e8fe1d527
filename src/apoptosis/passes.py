"""Forward passes that the library runs by itself, and compiled models.

Lives here: telling such a pass from the user's own, keeping it from waiting for other processes, running compiled parts
eagerly where they must be watched, forgetting what was compiled for other shapes. Does not live here: what a pass is
run for (graph, probe, observe).
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from apoptosis.errors import CaptureError

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


@contextmanager
def unsynchronised(model: nn.Module) -> Iterator[None]:
    """Let nn.SyncBatchNorm normalise by this rank's rows alone in the passes inside, as nn.BatchNorm does.

    Its own pass exchanges statistics, and ranks need not make as many passes of the library's own as others; on the CPU
    it has none at all.

    Raises: CaptureError: a subclass with a forward pass of its own, of several processes.
    """
    own: list[nn.Module] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.SyncBatchNorm):
            continue
        if type(module).forward is nn.SyncBatchNorm.forward and "forward" not in vars(module):
            own.append(module)
        elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise CaptureError(
                f"module '{name}' ({type(module).__name__}) is an nn.SyncBatchNorm with a forward pass of its own, "
                "which may wait for other processes where these do not run it. Use nn.SyncBatchNorm itself, or "
                "nn.BatchNorm2d."
            )
    try:
        for module in own:
            vars(module)["forward"] = MethodType(_BatchNorm.forward, module)
        yield
    finally:
        for module in own:
            vars(module).pop("forward", None)


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
