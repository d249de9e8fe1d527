"""Hooks on the user's modules, and the circumstances that they are called in.

Holds: a hook that copies of a module do not carry; whether a call comes from a backward pass or a transform; what a
checkpoint can hold; messages for windows that observed nothing of use. Elsewhere: what hooks do (window.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NOTHING_SEEN = "no training pass went through the modules it observes. Call the model in training mode with gradients."
CHANGED_BY_OTHERS = (
    "the model was changed by shrink_ or by another Apoptosis, or its layers or types were changed otherwise, while "
    "its channels were observed."
)

_TABLES = (
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_hooks",
)


class Hook:
    """A hook that copies and pickles of the user's modules do not carry: they have one that does nothing.

    mark: identifies the window that it belongs to.
    """

    def __init__(self, function: Callable[..., None], mark: object = None) -> None:
        self._function, self.mark = function, mark

    def __call__(self, *args: Any) -> None:
        """Call the function."""
        self._function(*args)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inert, ()


def _inert(*args: object) -> None:
    """Replace a hook of the original in a copy; does nothing."""


def _make_inert() -> Callable[..., None]:
    return _inert


def take_off(module: nn.Module, mark: object) -> None:
    """Remove all hooks with this mark from a module."""
    forward = (module._forward_pre_hooks, module._forward_hooks)
    keys = [key for table in forward for key, hook in table.items() if isinstance(hook, Hook) and hook.mark is mark]
    for key in keys:
        for name in _TABLES:
            getattr(module, name, {}).pop(key, None)


def in_backward() -> bool:
    """Whether a backward pass is running, which computes a checkpointed segment again."""
    return torch._C._current_graph_task_id() != -1


def is_wrapped(x: Tensor) -> bool:
    """Whether a tensor belongs to a functional transform (vmap, grad), beyond which its values may not be kept."""
    functorch = torch._C._functorch
    return bool(functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x))


def is_plain(value: object) -> bool:
    """Whether a checkpoint can hold a value: nested plain containers of tensors, numbers and strings."""
    if type(value) is tuple or type(value) is list:
        return all(is_plain(item) for item in value)
    if type(value) is dict:
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, bool | int | float | str | Tensor)
