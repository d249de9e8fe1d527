"""JSON from files that may be damaged or forged, read with one kind of error.

Holds: parsing within limits. Elsewhere: what the values have to be.
"""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 100  # of values within values; far less than what Python can recurse to


def parse(text: str | bytes | bytearray) -> Any:
    """Parse strict JSON: no NaN, no infinities, and nothing nested deeper than MAX_DEPTH.

    Raises: ValueError: in one line, what is wrong.

    Example:
        >>> parse('{"a": [1, 2.5]}')
        {'a': [1, 2.5]}
        >>> parse("[" * 1000 + "]" * 1000)
        Traceback (most recent call last):
        ValueError: nested deeper than 100 levels
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Refuse values within values beyond MAX_DEPTH, without recursion.

    Raises: ValueError: they are.
    """
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
