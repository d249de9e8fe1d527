"""The command `apoptosis`: train, compare, inspect, plan, report, ship.

Holds: the entry point, which needs none of the optional packages, and what it says where torch cannot be loaded.
Elsewhere: any command.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

_LEAST = 512 * 2**20  # bytes of address space below which loading torch ends the process without an exception
_SHORT_OF_MEMORY = "there is not enough memory to load the libraries; raise the limit (ulimit -v)"
_SHORT = ("failed to map", "cannot allocate", "out of memory", "can't start new thread")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 done, 2 bad input, 130 interrupted, 141 output unread; failures are one line."""
    run = _loaded()
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def _loaded() -> Callable[[Sequence[str]], int]:
    """Import the commands, and torch with them; if that fails, print one line and end."""
    if _limit() < _LEAST:
        _end(2, _SHORT_OF_MEMORY)
    is_main = threading.current_thread() is threading.main_thread()
    waits = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if waits:  # an exception would come out of the midst of a library's import
        signal.signal(
            signal.SIGINT, lambda *_: _end(130, "interrupted while the libraries were loaded; nothing was started")
        )
    try:
        from apoptosis.tools.cli.app import run
    except MemoryError:
        _end(2, _SHORT_OF_MEMORY)
    except ModuleNotFoundError as error:
        _end(2, f"{error}; install the command with: pip install 'torch-apoptosis[cli]'")
    except (ImportError, OSError, RuntimeError) as error:
        if not any(part in text.lower() for text in _texts(error) for part in _SHORT):
            raise
        _end(2, _SHORT_OF_MEMORY)
    if waits:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run


def _texts(error: BaseException | None) -> Iterator[str]:
    """Yield the text of an error and of its causes."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


def _limit() -> float:
    """Return the bytes of address space that the process may have."""
    try:
        import resource
    except ImportError:  # not on Windows
        return float("inf")
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return float("inf") if soft == resource.RLIM_INFINITY else float(soft)


def _end(status: int, text: str) -> NoReturn:
    """Print why, and end at once: with libraries half imported an orderly end may fail."""
    os.write(2, f"apoptosis: error: {text}\n".encode())
    os._exit(status)
