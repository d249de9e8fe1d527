"""Nested values as JSON plus tensors, and back: one way for optimizer state, apoptosis state and the user's extras.

Holds: `pack`, `unpack`, and what a skeleton is made of. Elsewhere: files
(file.py) and what a checkpoint holds (checkpoint/save_load.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from apoptosis.errors import CheckpointError

_MARK = "$"  # a JSON object with this key stands for something that JSON has no word for
_CONTENT = {"float": "value", "tensor": "name", "tuple": "items", "dict": "items", "counter": "items"}


def pack(value: object, name: str, tensors: dict[str, Tensor]) -> Any:
    """Split a tree into a JSON-able skeleton and tensors.

    Args:
        value: None, bool, int, float (infinite ones and NaN too), str, dense tensors; in lists, tuples, dictionaries
            and counters, nested at will.
        name: what the tree is called; begins the names of its tensors, and errors say it.
        tensors: receives the tensors by name.

    Returns: the skeleton.

    Raises: CheckpointError: a value of another type, by its place in the tree.

    Example:
        >>> found = {}
        >>> pack({"lr": (0.1, float("inf")), "w": torch.ones(2)}, "state", found)["lr"]
        {'$': 'tuple', 'items': [0.1, {'$': 'float', 'value': 'inf'}]}
        >>> list(found)
        ['state.w']
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_MARK: "float", "value": str(float(value))}
    if isinstance(value, Tensor):
        return {_MARK: "tensor", "name": _add_tensor(value, name, tensors)}
    if isinstance(value, tuple):
        return {_MARK: "tuple", "items": [pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        kind = "counter" if isinstance(value, Counter) else "dict"
        if kind == "dict" and _MARK not in value and all(isinstance(key, str) for key in value):
            return {key: pack(item, f"{name}.{key}", tensors) for key, item in value.items()}
        items = [[pack(k, f"a key of {name}", tensors), pack(v, f"{name}.{k}", tensors)] for k, v in value.items()]
        return {_MARK: kind, "items": items}
    raise CheckpointError(
        f"cannot save '{name}', which is of type {type(value).__name__}: a checkpoint holds tensors, numbers, strings, "
        "None, and lists, tuples and dictionaries of them."
    )


def unpack(skeleton: Any, tensors: Mapping[str, Tensor], place: str = "an entry") -> Any:
    """Put a tree together again. Inverse of `pack`.

    Args: place: what the skeleton is called in errors.

    Raises: CheckpointError: a skeleton that `pack` does not write, or one that names a missing tensor.
    """
    if isinstance(skeleton, list):
        return [unpack(item, tensors, f"{place}.{i}") for i, item in enumerate(skeleton)]
    if not isinstance(skeleton, dict):
        return skeleton
    if _MARK not in skeleton:
        return {key: unpack(item, tensors, f"{place}.{key}") for key, item in skeleton.items()}
    kind = skeleton[_MARK]
    content = skeleton.get(_CONTENT.get(kind, "")) if isinstance(kind, str) else None
    pairs = isinstance(content, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in content)
    try:
        if kind == "float" and content in ("inf", "-inf", "nan"):
            return float(content)
        if kind == "tensor" and isinstance(content, str):
            return tensors[content]
        if kind == "tuple" and isinstance(content, list):
            return tuple(unpack(content, tensors, place))
        if kind in ("dict", "counter") and pairs:
            items = dict(unpack(content, tensors, place))
            return Counter(items) if kind == "counter" else items
    except (KeyError, TypeError) as error:  # a missing tensor, a key that is a list
        raise CheckpointError(f"its manifest is damaged: {place[:120]} ({str(error)[:200]!r}).") from error
    raise CheckpointError(f"its manifest is damaged: {place[:120]} is {str(skeleton)[:80]!r}.")


class _Named(dict[str, Tensor]):
    """Has a tensor of every name, and keeps the names that it was asked for."""

    def __missing__(self, name: str) -> Tensor:
        return self.setdefault(name, torch.empty(0, device="cpu", dtype=torch.float32))


def named_tensors(skeleton: Any, place: str) -> list[str]:
    """Return the names of the tensors that a skeleton is put together with.

    Raises: CheckpointError: a skeleton that `pack` does not write.

    Example:
        >>> named_tensors({"w": {"$": "tensor", "name": "state.w"}, "lr": {"$": "float", "value": "inf"}}, "state")
        ['state.w']
    """
    found = _Named()
    unpack(skeleton, found, place)
    return list(found)


def _add_tensor(tensor: Tensor, name: str, tensors: dict[str, Tensor]) -> str:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CheckpointError(f"cannot save '{name}': a checkpoint holds dense tensors with data, not {tensor.layout}.")
    unique, count = name, 1
    while unique in tensors:
        count += 1
        unique = f"{name}#{count}"
    tensors[unique] = tensor.detach()
    return unique
