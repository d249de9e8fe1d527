"""A log of changes to the user's objects by which they can be undone bitwise.

Holds: the exchange of a tensor's content under its identity, attribute and dictionary writes, and their undoing.
Elsewhere: what to write (values.py, optimizers.py, checkpoint/save_load.py).
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apoptosis.distributed.protocol import kind_of_tensor
from apoptosis.distributed.sharded import is_sharded
from apoptosis.interrupts import uninterrupted
from apoptosis.model.module_state import set_version


class UndoLog:
    """Write through it, then either `undo` everything in reverse order or `forget`.

    Tensors keep their identity (and with it their place in optimizers, ties and references) and their hooks; only
    storage and shape are exchanged. The old storage is never written to, so undoing is bitwise.

    How to undo a change is on record before it is made, and every entry can be undone more than once, whether its
    change was made or not: an interrupt may come anywhere, in `undo` too, which is then called again.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def __len__(self) -> int:
        return len(self._undo)

    def set_tensor(self, tensor: Tensor, value: Tensor, grad: Tensor | None = None) -> None:
        """Give `tensor` the storage and shape of `value`, and `grad` as its gradient."""
        # `tensor.data = value` would fail in the backward pass after next while an old graph lives, and
        # `torch.utils.swap_tensors` refuses weak references and loses hooks; `set_` does neither.
        old, old_grad = tensor.detach(), tensor.grad if tensor.is_leaf else None
        version = None if is_sharded(tensor) or tensor.is_inference() else tensor._version
        self._undo.append(lambda: _exchange(tensor, old, old_grad, version))
        _exchange(tensor, value, grad)

    def set_attribute(self, module: nn.Module, name: str, value: object) -> None:
        """Set a plain attribute of a module, its `__class__` included; undoing takes away one that was not there."""
        if name == "__class__":
            kind = type(module)
            self._undo.append(lambda: object.__setattr__(module, name, kind))
        elif name in vars(module):  # put back past setters of the user's, which may have been what failed
            self._undo.append(partial(vars(module).__setitem__, name, vars(module)[name]))
        else:
            self._undo.append(lambda: _remove(module, name))
        setattr(module, name, value)

    def remove_attribute(self, module: nn.Module, name: str) -> None:
        """Take a plain attribute off a module; undoing sets it again."""
        if name in vars(module):
            self._undo.append(partial(vars(module).__setitem__, name, vars(module)[name]))
            _remove(module, name)

    def set_item(self, mapping: MutableMapping[Any, Any], key: object, value: object) -> None:
        """Set an item of a dictionary, the keys' order included in what is undone."""
        old = dict(mapping)
        self._undo.append(lambda: _restore(mapping, old))
        mapping[key] = value

    def call(self, function: Callable[[Any], object], old: object, new: object) -> None:
        """Call a setter with a new value; undoing calls it with the old one."""
        self._undo.append(partial(function, old))
        function(new)

    def replace_items(self, mapping: MutableMapping[Any, Any], items: MutableMapping[Any, Any]) -> None:
        """Give a dictionary other contents under its identity."""
        old = dict(mapping)
        self._undo.append(lambda: _restore(mapping, old))
        _restore(mapping, items)

    def undo(self) -> None:
        """Undo everything, last change first. Harmless when nothing was written, and when it is called again.

        Raises: what a setter of the user's raises, once all the rest is undone.
        """
        failed: list[Exception] = []
        with uninterrupted():
            while self._undo:
                try:
                    self._undo[-1]()
                except Exception as error:  # noqa: BLE001 - raised below, once the rest is undone
                    failed.append(error)
                self._undo.pop()
        torch.clear_autocast_cache()
        if failed:
            raise failed[0]

    def forget(self) -> None:
        """Let go of the old values."""
        self._undo.clear()


def _exchange(tensor: Tensor, value: Tensor, grad: Tensor | None, version: int | None = None) -> None:
    """Exchange storage, shape and gradient. version: of the tensor when it had these numbers, for graphs made then."""
    with torch.no_grad():
        if tensor.is_leaf:
            tensor.grad = None
        kind_of_tensor(tensor).swap_local_(tensor, value)
        if grad is not None:
            tensor.grad = grad
    if version is not None:
        set_version(tensor, version)


def _remove(module: nn.Module, name: str) -> None:
    if name in vars(module):
        delattr(module, name)


def _restore(mapping: MutableMapping[Any, Any], items: MutableMapping[Any, Any]) -> None:
    mapping.clear()
    mapping.update(items)
