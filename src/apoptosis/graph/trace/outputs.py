"""The tensors inside what a model takes and returns, each with its path.

Holds: tensors by name. Elsewhere: what containers and objects consist of (outputs), what becomes of the
tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from inspect import isawaitable
from typing import Any

from torch import Tensor, nn

from apoptosis.errors import CaptureError
from apoptosis.model.outputs import parts

_LEAVES = (str, bytes, int, float, complex, bool, type, nn.Module)


def tensors_in(obj: Any) -> Iterator[Tensor]:
    """Yield every tensor inside nested sequences, mappings, dataclasses and plain objects."""
    for _, tensor in named_in(obj):
        yield tensor


def named_in(obj: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor with its path: "", "[1]", "logits", "cache.layers[0].keys".

    Raises: CaptureError: something that is still to run (a generator) would have to be used up to look into it.

    Example:
        >>> import torch
        >>> [path for path, _ in named_in({"logits": torch.zeros(1), "states": (torch.zeros(1), None)})]
        ['logits', 'states[0]']
    """
    seen: set[int] = set()
    todo = [(name, obj)]
    while todo:
        path, item = todo.pop()
        if isinstance(item, Tensor):
            yield path, item
        elif item is not None and not isinstance(item, _LEAVES) and id(item) not in seen:
            seen.add(id(item))
            todo.extend(reversed(_parts(path, item)))


def _parts(path: str, item: Any) -> list[tuple[str, Any]]:
    if not isinstance(item, Mapping | list | tuple) and (isinstance(item, Iterator) or isawaitable(item)):
        where = f" at '{path}'" if path else ""
        raise CaptureError(
            f"the model returns a {type(item).__name__}{where}, which runs only when it is read: what it computes "
            "cannot be followed. Let forward return a list or a tuple."
        )
    return parts(path, item)


def reached(outputs: Iterable[Tensor]) -> set[int]:
    """Return the ids of the leaves of the graph that autograd has recorded behind some tensors: trained parameters."""
    found: set[int] = set()
    seen: set[Any] = set()
    todo = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.add(id(leaf))
        todo += [other for other, _ in node.next_functions if other is not None]
    return found
