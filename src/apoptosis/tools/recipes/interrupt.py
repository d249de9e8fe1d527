"""Stopping between two steps instead of inside one.

Holds: a flag that SIGINT and SIGTERM raise. Elsewhere: what is saved then.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """Raised between two steps of an epoch, in answer to an interrupt: the state is whole and can be saved."""


class Interrupt:
    """A context in which the first SIGINT or SIGTERM only sets `requested`; a later one interrupts at once.

    Outside the main thread, where handlers cannot be set, it does nothing.

    Attributes: requested: a signal came. insisted: a second one came, of several processes, which agree on where to
        stop: there only the third interrupts at once.

    Args: grace: of several processes seconds in which a second signal is the first once more: launchers pass on what a
        terminal has sent to all processes already. 0 for one process alone.
    """

    def __init__(self, *, grace: float = 0.0) -> None:
        self.requested = self.insisted = False
        self._grace, self._since = grace, 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and now - self._since < self._grace:
            return
        if self.insisted or (self.requested and not self._grace):
            raise KeyboardInterrupt
        self.insisted, self.requested, self._since = self.requested, True, now
