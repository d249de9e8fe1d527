"""Putting things back although interrupts may come anywhere, and lack of memory.

Holds: holding an interrupt back until a few lines are through, undoing at the end of a block, hooks on all modules
for a while, telling lack of memory from other errors. Elsewhere: what is put back (module_state, surgery).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch._C import _len_torch_dispatch_stack
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import _pop_mode

_SHORT = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")


class uninterrupted:
    """A context in which Ctrl-C waits: the handler that was set is called once it ends.

    Interrupts come to the main thread alone, and elsewhere there is nothing to do. Whatever runs inside must be able to
    run again: an interrupt may come just before the context begins.

    Example:
        >>> with uninterrupted():
        ...     pass
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._came: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if callable(before):  # else the default of the system, an ignored one, or a handler that is not Python's
                self._before = before
                signal.signal(signal.SIGINT, self._wait)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        before, self._before = self._before, None
        if before is not None:
            signal.signal(signal.SIGINT, before)
        if self._came is not None and before is not None:
            before(*self._came)

    def _wait(self, number: int, frame: FrameType | None) -> None:
        self._came = number, frame


@contextmanager
def restoring(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo` when the block ends, however it ends; torch's modes are then those of its beginning.

    It is called again where it did not end, as an interrupt may come just before it or inside: calling it again must do
    no harm. It is made before anything changes.
    """
    grad, modes, through = torch.is_grad_enabled(), _len_torch_dispatch_stack(), False

    def end() -> None:
        nonlocal through
        try:
            undo()
        finally:  # an interrupt may have come just where a context of torch's was to end
            while _len_torch_dispatch_stack() > modes:
                _pop_mode()
            torch._C._set_grad_enabled(grad)
        through = True

    try:
        try:
            yield
        finally:
            with uninterrupted():
                end()
    finally:
        if not through:
            with uninterrupted():
                end()


@contextmanager
def hooks_on_all_modules(enter: Callable[..., None], leave: Callable[..., None] | None = None) -> Iterator[None]:
    """Let every module that runs inside call `enter` before its forward pass and `leave` after it, failed or not.

    enter(module, args); leave(module, args, kwargs, output), of a pass that failed leave(module, args, None).
    """
    names = [name for name in vars(hooks) if name.startswith("_global_forward")]
    tables: list[dict[int, Any]] = [table for name in names if isinstance(table := getattr(hooks, name), dict)]

    def undo() -> None:
        keys = [key for table in tables for key, hook in table.items() if hook is enter or hook is leave]
        for key in keys:
            for table in reversed(tables):
                table.pop(key, None)

    with restoring(undo):
        hooks.register_module_forward_pre_hook(enter)
        if leave is not None:
            hooks.register_module_forward_hook(leave, with_kwargs=True, always_call=True)
        yield


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that memory ran out: Python's, torch's on any device.

    Example:
        >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."))
        True
        >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
        False
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(part in str(error).lower() for part in _SHORT):
            return True
        error = error.__cause__
    return False
