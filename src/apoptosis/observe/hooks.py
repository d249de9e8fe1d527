"""The one thing a window puts on the user's modules.

Lives here: a hook that does not travel with copies. Does not live here: what hooks do (window.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Hook:
    """A hook that copies and pickles of the user's modules lose: they carry one that does nothing."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> None:
        """Do what the hook is for."""
        self._function(*args)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inert, ()


def _inert(*args: object) -> None:
    """Stand in a copy for a hook of the original."""


def _make_inert() -> Callable[..., None]:
    return _inert
