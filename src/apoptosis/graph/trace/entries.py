"""What a running module was called with, and what it pads before an operator reads it.

Holds: whether an operator reads the very input of its module, so that a hook on the module sees what it reads.
Elsewhere: operators.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from apoptosis.graph.trace.storage import Geometry, StorageMap, geometry

Mark = tuple[int, Geometry, int]
"""A tensor as it is now: its memory, its place there, and how often it was written to."""
Pad = tuple[tuple[int, ...], str]
"""Sizes and mode as torch.nn.functional.pad takes them."""


class Entries:
    """Marks of tensors, and of what was padded."""

    def __init__(self, memory: StorageMap) -> None:
        self._memory = memory
        self._pads: dict[Mark, tuple[Mark, Pad]] = {}

    def mark(self, tensor: Any) -> Mark | None:
        """Return the mark of a tensor; None of what is none, or does not count its writes (made in inference mode)."""
        if not isinstance(tensor, Tensor) or tensor.is_inference():
            return None
        try:
            return self._memory.place(tensor), geometry(tensor), tensor._version
        except RuntimeError:  # a tensor without strides
            return None

    def padded(self, source: Tensor, out: Tensor, sizes: tuple[int, ...], mode: str) -> None:
        """Note that a tensor is another one, padded along its last axes."""
        before, after = self.mark(source), self.mark(out)
        if before is not None and after is not None:
            self._pads[after] = (before, (sizes, mode))

    def pads_from(self, entry: Mark | None, tensor: Tensor) -> tuple[Pad, ...] | None:
        """Return what turns the tensor marked `entry` into this one; () for the same, None where it is another."""
        found: list[Pad] = []
        mark = self.mark(tensor)
        while entry is not None and mark is not None:
            if mark == entry:
                return tuple(reversed(found))
            if mark not in self._pads:
                return None
            mark, pad = self._pads[mark]
            found += [pad] if any(pad[0]) else []
        return None
