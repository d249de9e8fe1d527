"""A journal of changes to the user's objects that can be undone bitwise.

Lives here: the exchange of a tensor's content under its identity, attribute and dictionary writes, and their undoing.
Does not live here: what to write (values.py, optimizers.py, checkpoint.py).
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from apoptosis.sharded import exchange, is_sharded


class Journal:
    """Write through it, then either `undo` everything in reverse order or `forget`.

    Tensors keep their identity (and with it their place in optimizers, ties and references) and their hooks; only
    storage and shape are exchanged. The old storage is never written to, so undoing is bitwise.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._undo)

    def set_tensor(self, tensor: Tensor, value: Tensor, grad: Tensor | None = None) -> None:
        """Give `tensor` the storage and shape of `value`, and `grad` as its gradient."""
        # `tensor.data = value` would fail in the backward pass after next while an old graph lives, and
        # `torch.utils.swap_tensors` refuses weak references and loses hooks; `set_` does neither.
        old, old_grad = tensor.detach(), tensor.grad if tensor.is_leaf else None
        self._undo.append(lambda: _exchange(tensor, old, old_grad))
        _exchange(tensor, value, grad)

    def set_attribute(self, module: nn.Module, name: str, value: object) -> None:
        """Set a plain attribute of a module, its `__class__` included; undoing takes away one that was not there."""
        own = name == "__class__" or name in vars(module)
        old = getattr(module, name) if own else None
        setattr(module, name, value)
        self._undo.append((lambda: setattr(module, name, old)) if own else (lambda: delattr(module, name)))

    def set_item(self, mapping: MutableMapping[Any, Any], key: object, value: object) -> None:
        """Set an item of a dictionary, the keys' order included in what is undone."""
        old = dict(mapping)
        self._undo.append(lambda: _restore(mapping, old))
        mapping[key] = value

    def call(self, function: Callable[[Any], None], old: object, new: object) -> None:
        """Call a setter with a new value; undoing calls it with the old one."""
        function(new)
        self._undo.append(lambda: function(old))

    def replace_items(self, mapping: MutableMapping[Any, Any], items: MutableMapping[Any, Any]) -> None:
        """Give a dictionary other contents under its identity."""
        old = dict(mapping)
        self._undo.append(lambda: _restore(mapping, old))
        _restore(mapping, items)

    def undo(self) -> None:
        """Undo everything, last change first. Harmless when nothing was written."""
        while self._undo:
            self._undo.pop()()
        torch.clear_autocast_cache()

    def forget(self) -> None:
        """Let go of the old values."""
        self._undo.clear()


def _exchange(tensor: Tensor, value: Tensor, grad: Tensor | None) -> None:
    with torch.no_grad():
        if tensor.is_leaf:
            tensor.grad = None
        if is_sharded(tensor):
            exchange(tensor, value)
        else:
            tensor.set_(value)  # type: ignore[call-overload]  # torch's stub knows storages alone
        if grad is not None:
            tensor.grad = grad


def _restore(mapping: MutableMapping[Any, Any], items: MutableMapping[Any, Any]) -> None:
    mapping.clear()
    mapping.update(items)
