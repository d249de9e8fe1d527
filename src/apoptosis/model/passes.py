"""Forward passes that the library runs by itself, and compiled models.

Holds: the one context in which they run and which leaves no trace on the model, telling such a pass from the
user's own, keeping it from waiting for other processes, running compiled parts eagerly where they must be watched,
forgetting what was compiled for other shapes. Elsewhere: what a pass is run for (graph, evaluate, planner.sampling),
what it may change (module_state).
"""

from __future__ import annotations

import random
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from apoptosis.distributed.sharded import unsharded_forward
from apoptosis.errors import ArgumentError, CaptureError
from apoptosis.interrupts import restoring
from apoptosis.model.module_state import ModuleState

_RUNNING = threading.local()
_DYNAMO = "torch._dynamo"  # loaded before anything can have been compiled
_EAGER: set[int] = set()  # windows that need compiled code to run eagerly: the stance is one for the process
_STANCE: list[Any] = []  # what the first of them set


@contextmanager
def marked_internal() -> Iterator[None]:
    """Mark what runs inside as the library's own (`is_internal_forward`), and run compiled parts eagerly in it."""
    depth = getattr(_RUNNING, "depth", 0)

    def undo() -> None:
        _RUNNING.depth = depth
        _restore_stance()

    with restoring(undo):
        _RUNNING.depth = depth + 1
        if _DYNAMO not in sys.modules:
            yield
            return
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using `torch.compile")  # about global hooks: those of a capture
            yield


@contextmanager
def internal_passes(
    model: nn.Module,
    *,
    training: bool = False,
    drop: bool = False,
    as_is: bool = False,
    seed: int | None = None,
    grad: bool = False,
) -> Iterator[ModuleState]:
    """Run passes of the library's own: whatever one of them changes is afterwards as it was.

    Put back are the modes of all modules, buffers, attributes of modules and what is reached through them (hidden
    states, membrane potentials, caches, collected losses, counters), tensors written in place, gradients and random
    generators (see module_state). Buffers are clones meanwhile. Parameters that are spread over processes are full,
    plain ones inside, and no pass waits for another process otherwise. An interrupt may come anywhere.

    Args:
        model: what is run.
        training: the mode of all modules.
        drop: whether dropout modules take part in training mode.
        as_is: every module but dropout keeps its own mode, as in the user's passes: parts may be frozen.
        seed: of all random generators inside; None: they go on from where they are.
        grad: whether autograd records the passes.

    Yields: what was there, and is put back.
    """
    with unsharded_forward(model):
        before = ModuleState(model)

        def undo() -> None:
            before.restore()
            torch.clear_autocast_cache()  # casts made here are of another graph, or of none

        with restoring(undo), marked_internal(), before.written, unsynchronised(model), torch.set_grad_enabled(grad):
            for module in model.modules():  # train() may be overridden and do more
                mode = module.training if as_is else training
                module.training = mode and (drop or not isinstance(module, _DropoutNd))
            _clone_buffers(model)
            if seed is not None:
                _seed(model, seed)
            torch.clear_autocast_cache()  # it may hold casts of weights from before the last step
            yield before


def _clone_buffers(model: nn.Module) -> None:
    clones: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):  # which keeps its own elsewhere; what is written is put back
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = clones.setdefault(id(buffer), buffer.detach().clone())


def _seed(model: nn.Module, seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds every device, now or once it is begun with
    for device in {p.device for p in model.parameters() if p.device.type == "cuda"}:
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def is_internal_forward() -> bool:
    """Whether the forward pass that runs now in this thread is one of the library's own.

    Hooks of the user's run in those too, as hooks may compute weights or outputs. One that counts, or that collects
    features for a loss, asks here first.

    Example:
        >>> from torch import nn
        >>> features = []
        >>> net = nn.Linear(2, 2)
        >>> _ = net.register_forward_hook(lambda m, x, y: None if is_internal_forward() else features.append(y))
        >>> with marked_internal():
        ...     _ = net(torch.ones(1, 2))
        >>> _ = net(torch.ones(1, 2))
        >>> len(features)
        1
    """
    return getattr(_RUNNING, "depth", 0) > 0


is_own_pass = is_internal_forward  # its name before


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
        forward = vars(module).get("forward")
        if getattr(forward, "__func__", None) is _BatchNorm.forward:
            continue  # by a context around this one
        if type(module).forward is nn.SyncBatchNorm.forward and forward is None:
            own.append(module)
        elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise CaptureError(
                f"module '{name}' ({type(module).__name__}) is an nn.SyncBatchNorm with a forward pass of its own, "
                "which may wait for other processes where these do not run it. Use nn.SyncBatchNorm itself, or "
                "nn.BatchNorm2d."
            )
    with restoring(lambda: [vars(module).pop("forward", None) for module in own]):
        for module in own:
            vars(module)["forward"] = MethodType(_BatchNorm.forward, module)
        yield


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
            self._leave = weakref.finalize(self, _release, id(self))  # a window that is never closed ends with its run
            self._leave.atexit = False

    def end(self) -> None:
        """Put back the stance from before, once no window needs it any more."""
        if self._leave is not None:
            self._leave()
            self._leave = None


def _release(key: int) -> None:
    _EAGER.discard(key)
    _restore_stance()


def _restore_stance() -> None:
    """Put back the stance unless a window needs it, or a pass of the library's own runs, which has set another."""
    if _EAGER or not _STANCE or is_internal_forward():
        return
    stance = _STANCE.pop()
    now = getattr(sys.modules.get(f"{_DYNAMO}.eval_frame"), "_stance", None)
    if now is stance.stance:
        stance.__exit__(None, None, None)


def check_not_inference(model: nn.Module, who: str) -> None:
    """Refuse to make tensors that could not be trained, or to change those that cannot be.

    Args: model: whose parameters are looked at. who: for the message.

    Raises: ArgumentError: torch.inference_mode() is on, or a parameter or buffer was made under it.
    """
    if torch.is_inference_mode_enabled():
        raise ArgumentError(
            f"{who} under torch.inference_mode() would leave a network that cannot be trained. Call it outside, or use "
            "torch.no_grad()."
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise ArgumentError(
                f"'{name}' was made under torch.inference_mode(), so that it can be neither changed nor trained. Build "
                "and load the model outside, or under torch.no_grad()."
            )


def compile_seconds() -> float:
    """Return what torch has spent on compiling since `forget_compiled`, seconds of wall time; 0.0 for nothing.

    Torch counts it itself, for all that is compiled in the process.
    """
    reported = getattr(sys.modules.get(f"{_DYNAMO}.utils"), "calculate_time_spent", None)
    return float(reported().get("total_wall_time", 0.0)) if reported is not None else 0.0


def forget_compiled() -> None:
    """Drop what torch has compiled: code for old shapes counts against its limit, beyond which it compiles no more."""
    if _DYNAMO in sys.modules:
        torch.compiler.reset()


def device_of(model: nn.Module) -> torch.device:
    """Return where a model computes: the device of its first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
