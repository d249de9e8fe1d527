"""What is known of the tensors of the running pass, by the memory they lie in.

Holds: from a tensor to the parameter it is a view of, or to the value on record; in-place writes and the views
that share their memory. Elsewhere: operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apoptosis.graph.explain import Code, Reason
from apoptosis.graph.trace.ids import ChannelIds, TensorInfo, View
from apoptosis.graph.trace.values import CONSTANT, INPUT, SIZE_LIMIT, Origin, Value, collapse, drop_paths, nothing
from apoptosis.model.module_state import storage_of
from apoptosis.records import IntArray

Geometry = tuple[int, tuple[int, ...], tuple[int, ...]]
Mark = tuple[int, Geometry, int]
"""A tensor as it is now: its memory, its place there, and how often it was written to."""
Pad = tuple[tuple[int, ...], str]
"""Sizes and mode as torch.nn.functional.pad takes them."""


@dataclass(slots=True)
class _Block:
    """One storage: the values of the views of it that were met; `keep` keeps its memory from being given out again."""

    keep: Any
    values: dict[Geometry, Value] = field(default_factory=dict)


def geometry(tensor: Tensor) -> Geometry:
    """Return where in its memory a tensor lies, and how."""
    return int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())


def _strided(flat: IntArray, at: Geometry) -> IntArray:
    offset, shape, stride = at
    return np.lib.stride_tricks.as_strided(flat[offset:], shape, [8 * s for s in stride])


class StorageMap:
    """Values and parameters by storage. `pin(ids, why)` is called for what cannot be followed.

    Attributes: kept: the way to what the model keeps from pass to pass, by its place; read_kept: those that the pass
        asked for. written: names of buffers that channels were written to in place.
    """

    def __init__(
        self,
        ids: ChannelIds,
        tensors: Mapping[str, Tensor],
        inputs: Iterable[Tensor],
        pin: Callable[[IntArray, Code | Reason], None],
    ) -> None:
        self._channel_ids = ids
        self._pin = pin
        self._blocks: dict[int, _Block] = {}
        self._parameters: dict[int, list[tuple[int, TensorInfo]]] = {}
        self._keep: list[Any] = []
        self._element_sizes: dict[int, int] = {}
        self._computed: dict[int, Any] = {}
        self._kept: int | None = None
        self._multiplied: dict[tuple[int, Geometry], tuple[tuple[Tensor, ...], tuple[int, ...]]] = {}
        self._tensors = tensors
        for name, tensor in tensors.items():
            self._add(tensor, ids.tensors[name], int(tensor.storage_offset()))
        self._originals = frozenset(self._parameters)
        self._pin_overlaps()
        self._inputs = {self._storage(t)[0] for t in inputs}
        self.kept: dict[tuple[int, Geometry], Any] = {}
        self.read_kept: set[Any] = set()
        self.written: set[str] = set()

    def _storage(self, tensor: Tensor) -> tuple[int, Any]:
        storage = storage_of(tensor)
        if storage is None:  # known by identity
            self._keep.append(tensor)
            return id(tensor), tensor
        return storage._cdata, storage

    def _add(self, tensor: Tensor, info: TensorInfo, start: int) -> None:
        key, storage = self._storage(tensor)
        self._keep.append(storage)
        self._element_sizes[key] = tensor.element_size()
        self._parameters.setdefault(key, []).append((start, info))

    def _pin_overlaps(self) -> None:
        """Pin parameters that lie in one another's memory without being one tensor."""
        for owned in self._parameters.values():
            for (first, left), (second, right) in pairwise(sorted(owned, key=lambda item: item[0])):
                if second < first + left.span:
                    why = Code.SHARED_MEMORY(one=left.name, other=right.name)
                    self._pin(np.concatenate([left.ids(), right.ids()]), why)

    def view(self, tensor: Tensor) -> View | None:
        """Return which part of which parameter or buffer this tensor is, or None."""
        if not self._parameters or tensor.layout is not torch.strided:
            return None
        owned = self._parameters.get(self._storage(tensor)[0])
        if owned is None:
            return None
        offset = int(tensor.storage_offset())
        size = self._element_sizes[self._storage(tensor)[0]]
        if tensor.element_size() != size:  # its numbers taken for others: offsets and strides count other units
            for start, info in owned:
                if start * size <= offset * tensor.element_size() < (start + info.span) * size:
                    return View(info, tensor.dim(), tuple(tensor.shape), None, False)
        for start, info in owned:
            if start <= offset < start + info.span:
                return self._channel_ids.view(info, offset - start, tensor)
        return None

    def adopt(self, copy: Tensor, original: Tensor) -> bool:
        """Treat a copy of a parameter's view as the parameter: laid out alike, or whole in another order."""
        view = self.view(original)
        if view is None:
            return False
        if (how := self.computed_weight(original)) is not None:
            self.note_computed(copy, how)
        owned = self._parameters[self._storage(original)[0]]
        start, layout = next((s, o) for s, o in owned if o.name == view.info.name)
        if copy.stride() == original.stride():
            shift = int(copy.storage_offset()) - int(original.storage_offset())
            self._add(copy, layout, start + shift)
            return True
        if copy.element_size() != original.element_size() or layout.raw is not None or len(layout.shape) not in (2, 3):
            return False
        axes = [list(found) for _, found in view.dims or ()]
        runs = sorted(a for found in axes for a in found)
        if any(len(found) > 1 for found in axes) or runs != [a for a, n in enumerate(view.shape) if n > 1]:
            return False
        if [view.shape[found[0]] if found else 1 for found in axes] != list(layout.shape):
            return False  # a part of it, or several axes as one
        stride = tuple(copy.stride(a[0]) if a else 1 for a in axes)
        self._add(copy, replace(layout, stride=stride, raw=layout), int(copy.storage_offset()))
        return True

    def note_computed(self, copy: Tensor, how: Any) -> None:
        """Note how the copy of a parameter was computed from it."""
        self._computed[self._storage(copy)[0]] = how

    def computed_weight(self, tensor: Tensor) -> Any:
        """Return how what stands for a parameter was computed from it; None for the parameter itself."""
        return self._computed.get(self._storage(tensor)[0])

    def multiplied(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """Note that a tensor is the product of two others, element by element."""
        tensors = (out, a, b)
        if not any(tensor.is_inference() for tensor in tensors):  # which do not count what is written to them
            known = tuple(tensor._version for tensor in tensors)
            self._multiplied[self._storage(out)[0], geometry(out)] = (tensors, known)

    def factors(self, out: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return what a tensor is the product of, element by element; None where any of the three was written to."""
        tensors, known = self._multiplied.get((self._storage(out)[0], geometry(out)), ((), ()))
        if not tensors or tuple(tensor._version for tensor in tensors) != known:
            return None
        return tensors[1], tensors[2]

    def raw_and_used(self, tensor: Tensor, info: TensorInfo) -> tuple[Tensor, Tensor]:
        """Return a parameter, and what stands for it and `tensor` is a view of, both laid out as the parameter."""
        start = next(s for s, o in self._parameters[self._storage(tensor)[0]] if o.name == info.name)
        return self._tensors[info.name].detach(), tensor.detach().as_strided(info.shape, info.stride, start)

    def look_up(self, copy: Tensor, original: Tensor) -> bool:
        """Treat matrices that were picked by number from a stack (a whole parameter of three axes) as the stack."""
        view = self.view(original)
        if view is None or not view.whole or view.ndim != 3 or view.info.is_buffer or not copy.is_contiguous():
            return False
        layout = replace(view.info, shape=tuple(copy.shape), stride=tuple(copy.stride()), raw=view.info, looked_up=(0,))
        self._add(copy, layout, int(copy.storage_offset()))
        return True

    def start(self, tensor: Tensor, info: TensorInfo) -> int | None:
        """Return where in its memory the parameter begins that a tensor is a view of; None in a copy in other order."""
        found = next((s, o) for s, o in self._parameters[self._storage(tensor)[0]] if o.name == info.name)
        return found[0] if found[1].raw is None else None

    def same(self, tensor: Tensor, info: TensorInfo) -> bool:
        """Whether the tensor lies in the memory of this parameter or buffer."""
        return any(o.name == info.name for _, o in self._parameters.get(self._storage(tensor)[0], ()))

    def place(self, tensor: Tensor) -> int:
        """Return a number that identifies the memory a tensor lies in, within this pass."""
        return self._storage(tensor)[0]

    def shared(self, a: Tensor, b: Tensor) -> bool:
        """Whether two tensors lie in one storage."""
        return self._storage(a)[0] == self._storage(b)[0]

    def at(self, tensor: Tensor) -> tuple[int, Geometry]:
        """Return the memory that a tensor lies in, and where in it."""
        return self._storage(tensor)[0], geometry(tensor)

    def is_other(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the memory of no parameter, buffer or input."""
        key = self._storage(tensor)[0]
        return key not in self._parameters and key not in self._inputs

    def is_owned(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the memory of a parameter or buffer."""
        return self._storage(tensor)[0] in self._parameters

    def recorded(self, tensor: Tensor) -> Value | None:
        """Return the value on record for exactly this view, or None."""
        block = self._blocks.get(self._storage(tensor)[0])
        return block.values.get(geometry(tensor)) if block is not None else None

    def value(self, tensor: Tensor) -> Value:
        """Return what is known of a tensor that is no parameter."""
        key, _ = self._storage(tensor)
        block = self._blocks.get(key)
        if block is None:
            return nothing(tensor.dim(), INPUT if key in self._inputs else CONSTANT)
        at = geometry(tensor)
        if (key, at) in self.kept:
            self.read_kept.add(self.kept[key, at])
        found = block.values.get(at)
        if found is None and key in self._inputs and not any(value.has_channels for value in block.values.values()):
            return nothing(tensor.dim(), INPUT)
        if found is None:
            for value in block.values.values():
                self._pin(value.ids, Code.VIEW_LEFT)
            found = nothing(tensor.dim(), Origin("a view that cannot be followed"))
        return found

    def put(self, tensor: Tensor, value: Value) -> None:
        """Record the value of a new tensor (or of a new view)."""
        key, storage = self._storage(tensor)
        if key in self._parameters:
            return
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = _Block(storage)
        block.values[geometry(tensor)] = value

    def write(self, tensor: Tensor, value: Value) -> None:
        """Record that `tensor` was overwritten in place; views that share its memory follow."""
        key, _ = self._storage(tensor)
        if key in self._parameters:
            self._write_parameter(key, tensor, value)
            return
        block, at = self._blocks.get(key), geometry(tensor)
        if block is None:
            self.put(tensor, value)
            return
        old = block.values.get(at)
        others = [g for g in block.values if g != at]
        if not others:
            block.values[at] = value
        elif old is not None and np.array_equal(old.ids, value.ids):
            for other in others:
                found = block.values[other]
                paths = drop_paths([found.paths])
                block.values[other] = Value(found.ids, origin=found.origin, paths=paths, multiple=value.multiple)
            block.values[at] = value
        else:
            self._rebuild(tensor, block, value)

    def keep_owned(self, tensor: Tensor) -> None:
        """Ignore the next write to a parameter: the tensor still stands for the parameter."""
        self._kept = self._storage(tensor)[0]

    def _write_parameter(self, key: int, tensor: Tensor, value: Value) -> None:
        kept, self._kept = self._kept, None
        if kept == key:
            return
        view = self.view(tensor)
        if view is not None and value.has_channels:
            self.written.add(view.info.name)
        if view is not None and not (view.info.is_buffer and key in self._originals):
            self._pin(view.info.ids(), Code.OVERWRITTEN(name=view.info.name))

    def _rebuild(self, tensor: Tensor, block: _Block, value: Value) -> None:
        size = tensor.untyped_storage().nbytes() // max(1, tensor.element_size())
        if size > SIZE_LIMIT:
            for found in (*block.values.values(), value):
                self._pin(found.ids, Code.WRITES_LARGE)
            block.values = {g: nothing(len(g[1])) for g in block.values}
            return
        flat = np.zeros(size, dtype=np.int64)
        for at, found in block.values.items():
            _strided(flat, at)[...] = found.ids
        _strided(flat, geometry(tensor))[...] = value.ids
        paths = drop_paths([found.paths for found in (*block.values.values(), value)])
        for at, found in list(block.values.items()):
            ids = collapse(np.array(_strided(flat, at)))
            block.values[at] = Value(
                ids, is_filler=found.is_filler and value.is_filler, origin=value.origin, paths=paths
            )
        block.values[geometry(tensor)] = replace(value, ids=collapse(np.array(_strided(flat, geometry(tensor)))))


class Entries:
    """Whether an operator reads the very input of its module, padded or not, so that a hook sees what it reads."""

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


class Outputs:
    """Which element of a module's output every element of a tensor is, so that a hook on the module sees it.

    Views of an output are followed, and plain copies of such views; what is written to in between is not.
    """

    def __init__(self, memory: StorageMap) -> None:
        self._memory = memory
        self._made: dict[tuple[int, int], tuple[str, Geometry]] = {}  # by memory and number of writes to it
        self._copies: dict[tuple[int, int], tuple[Geometry, Tensor, int]] = {}

    def made(self, name: str, output: Any) -> None:
        """Note the output of a module; of modules that return the same tensor the innermost counts."""
        if isinstance(output, Tensor) and output.layout is torch.strided and not output.is_inference():
            self._made.setdefault((self._memory.place(output), output._version), (name, geometry(output)))

    def copied(self, source: Tensor, copy: Tensor) -> None:
        """Note that a tensor is a copy of another one, element by element."""
        if source.layout is torch.strided and not source.is_inference() and not copy.is_inference():
            at = self._memory.place(copy), copy._version
            self._copies[at] = geometry(copy), source.detach(), source._version

    def elements(self, tensor: Tensor) -> tuple[str, int, IntArray] | None:
        """Return the module, the size of its output's last axis, and by element of the tensor its number in the output.

        None where the tensor is no part of one output, unchanged, or is very large.
        """
        if tensor.layout is not torch.strided or tensor.is_inference() or tensor.is_complex():
            return None
        size = tensor.untyped_storage().nbytes() // max(1, tensor.element_size())
        if size > SIZE_LIMIT:
            return None
        at = self._memory.place(tensor), tensor._version
        if at in self._made:
            name, where = self._made[at]
            shape = where[1]
            width, numbers = shape[-1] if shape else 1, np.arange(np.prod(shape, dtype=np.int64)).reshape(shape)
        elif at in self._copies and self._copies[at][1]._version == self._copies[at][2]:
            where, source, _ = self._copies[at]
            found = self.elements(source)
            if found is None:
                return None
            name, width, numbers = found
        else:
            return None
        flat = np.full(size, -1, dtype=np.int64)
        _strided(flat, where)[...] = numbers
        own = np.array(_strided(flat, geometry(tensor)))
        return None if bool((own < 0).any()) else (name, width, own)
