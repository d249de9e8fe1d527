"""A progress line on a terminal or in a notebook, by tqdm or rich, whichever is there.

Holds: choosing and driving them. Elsewhere: what the line says (`Apoptosis.status`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Protocol

from apoptosis.errors import ArgumentError

LIBRARIES = ("tqdm", "rich")
_SECONDS = 0.5  # between two drawings by rich


class Line(Protocol):
    """What a progress line can do. move: to this step; say: what stands beside the bar."""

    def move(self, step: int) -> None: ...  # noqa: D102

    def say(self, text: str) -> None: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102


def check_progress(progress: object) -> str:
    """Return the library that a progress line is drawn with.

    Raises: ArgumentError: progress= is no choice, or the library is not installed.
    """
    if progress is not True and progress not in LIBRARIES:
        choices = ", ".join(map(repr, (True, False, *LIBRARIES)))
        raise ArgumentError(f"progress={progress!r} must be one of {choices}.")
    wanted = LIBRARIES if progress is True else (str(progress),)
    found = next((name for name in wanted if find_spec(name) is not None), None)
    if found is None:
        raise ArgumentError(f"progress={progress!r} needs {' or '.join(wanted)}: pip install {wanted[0]}.")
    return found


def make_line(library: str, total: int | None, name: str = "apoptosis") -> Line | None:
    """Return a line, or None where nobody would see it: in a file, or behind a pipe. total: steps, None if unknown."""
    notebook = "ipykernel" in sys.modules
    if not notebook and not sys.stderr.isatty():
        return None
    return (_Tqdm if library == "tqdm" else _Rich)(total, name)


class _Tqdm:
    def __init__(self, total: int | None, name: str) -> None:
        if find_spec("ipywidgets") is None:  # tqdm.auto would warn that it has no widgets
            from tqdm import tqdm
        else:
            from tqdm.auto import tqdm
        self._bar: Any = tqdm(total=total, desc=name, unit="step", dynamic_ncols=True)

    def move(self, step: int) -> None:
        self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        self._bar.close()


class _Rich:
    def __init__(self, total: int | None, name: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        text = TextColumn("{task.fields[state]}", markup=False)
        times = TimeRemainingColumn(compact=True)
        parts = (TextColumn("{task.description}"), BarColumn(bar_width=12), MofNCompleteColumn(), times)
        console = Console(stderr="ipykernel" not in sys.modules)
        # A thread that draws would take time from training at moments of its own.
        self._progress: Any = Progress(*parts, text, console=console, auto_refresh=False)
        self._task = self._progress.add_task(name, total=total, state="")
        self._drawn = 0.0
        self._progress.start()

    def move(self, step: int) -> None:
        now = time.monotonic()
        if now - self._drawn > _SECONDS:
            self._drawn = now
            self._progress.update(self._task, completed=step, refresh=True)
        else:
            self._progress.update(self._task, completed=step)

    def say(self, text: str) -> None:
        self._progress.update(self._task, state=text)

    def close(self) -> None:
        self._progress.refresh()
        self._progress.stop()


class Reporter:
    """Keeps a line up to date: moved at every step, worded anew when something has happened."""

    def __init__(self, line: Line) -> None:
        self._line, self._last = line, object()  # nothing of the run's, which has to end when its user drops it

    def update(self, step: int, state: object, words: Callable[[], str]) -> None:
        """Move to a step. state: compared with the last one to see whether there is something new to say; words: it."""
        if state != self._last:
            self._last = state
            self._line.say(words())
        self._line.move(step)

    def close(self) -> None:
        """End the line."""
        self._line.close()


def make_reporter(library: str, total: int | None) -> Reporter | None:
    """Return a line that is kept up to date, or None where nobody would see it."""
    line = make_line(library, total)
    return None if line is None else Reporter(line)
