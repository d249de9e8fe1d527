"""Whether the last training pass has not had its backward pass yet: shapes cannot change then.

Holds: a mark on the graph of the user's last training pass, and hooks that notice its backward pass.
Elsewhere: which passes count (window.py), what follows (engine).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from apoptosis.observe.hooks import is_wrapped

UNFINISHED = (
    "step() was called between a forward pass and its backward pass, which needs the parameters as they are. Call it "
    "after optimizer.step() (in Lightning in on_train_batch_end, not in on_before_zero_grad), and run passes that are "
    "not trained under torch.no_grad()."
)
_KEY = "apoptosis"
_MOST = 4  # tensors of a pass that get such a hook


class _Mark:
    """An object that lives as long as the graph that holds it."""

    __slots__ = ("__weakref__",)


class Unfinished:
    """Follows the last training pass of a model: `begin`, `ask` on tensors inside, `end` on what it returned."""

    def __init__(self) -> None:
        self._mark: weakref.ref[_Mark] | None = None
        self._handles: list[RemovableHandle] = []
        self._came = True

    def begin(self) -> None:
        """Note that a training pass begins."""
        self.release()
        self._mark, self._came = None, False

    def ask(self, x: Tensor) -> None:
        """Notice the backward pass at a tensor inside of the pass."""
        if len(self._handles) < _MOST and x.requires_grad and not is_wrapped(x):
            self._handles.append(x.register_hook(self._note))  # type: ignore[no-untyped-call]  # torch's own

    def _note(self, _: Tensor) -> None:
        self._came = True

    def end(self, outputs: Iterable[Tensor]) -> None:
        """Note what the pass returned, with the graph that backward needs."""
        for x in outputs:
            if not x.requires_grad or is_wrapped(x):
                continue
            if x.grad_fn is not None and self._mark is None:
                mark = _Mark()
                held: Any = x.grad_fn.metadata  # a dict that lives as long as the graph; typed as a method
                held[_KEY] = mark
                self._mark = weakref.ref(mark)
            self._handles.append(x.register_hook(self._note))  # type: ignore[no-untyped-call]  # torch's own

    def release(self) -> None:
        """Remove every hook; what is known is kept."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def waits(self) -> bool:
        """Whether the graph of the last training pass still exists, without a backward pass so far."""
        return not self._came and self._mark is not None and self._mark() is not None
