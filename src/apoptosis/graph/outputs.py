"""The tensors inside what a model takes and returns, each with the way to it.

Lives here: walking nested containers and objects. Does not live here: what becomes of the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from inspect import isawaitable
from typing import Any

from torch import Tensor, nn

from apoptosis.errors import CaptureError

_LEAVES = (str, bytes, int, float, complex, bool, type, nn.Module)


def tensors_in(obj: Any) -> Iterator[Tensor]:
    """Yield every tensor inside nested sequences, mappings, dataclasses and plain objects."""
    for _, tensor in named_in(obj):
        yield tensor


def named_in(obj: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor with the way to it: "", "[1]", "logits", "cache.layers[0].keys".

    Raises: CaptureError: something that is still to run (a generator) would have to be used up to look into it.

    Example:
        >>> import torch
        >>> [way for way, _ in named_in({"logits": torch.zeros(1), "states": (torch.zeros(1), None)})]
        ['logits', 'states[0]']
    """
    seen: set[int] = set()
    todo = [(name, obj)]
    while todo:
        way, item = todo.pop()
        if isinstance(item, Tensor):
            yield way, item
        elif item is not None and not isinstance(item, _LEAVES) and id(item) not in seen:
            seen.add(id(item))
            todo.extend(reversed(_parts(way, item)))


def _parts(way: str, item: Any) -> list[tuple[str, Any]]:
    if isinstance(item, Mapping):
        return [(_join(way, key), value) for key, value in item.items()]
    if isinstance(item, (list, tuple, set, frozenset)):
        return [(f"{way}[{i}]", value) for i, value in enumerate(item)]
    if isinstance(item, Iterator) or isawaitable(item):
        where = f" at '{way}'" if way else ""
        raise CaptureError(
            f"the model returns a {type(item).__name__}{where}, which runs only when it is read: what it computes "
            "cannot be followed. Let forward return a list or a tuple."
        )
    if is_dataclass(item):
        return [(_join(way, f.name), getattr(item, f.name, None)) for f in fields(item)]
    slots = [s for c in type(item).__mro__ for s in _names(vars(c).get("__slots__", ()))]
    found = {s: getattr(item, s, None) for s in slots if not s.startswith("__")} | dict(getattr(item, "__dict__", {}))
    return [(_join(way, key), value) for key, value in found.items()]


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _join(way: str, key: object) -> str:
    return f"{way}.{key}" if way else str(key)
