"""Slots: one integer for every position along every axis of every parameter and buffer.

Holds: the numbering, and the answer to "which positions of which parameter is this tensor a view of".
Elsewhere: activations, operators.

A view is recognised by its storage and its strides, so that any chain of views of a parameter needs no rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from apoptosis.records import IntArray


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One parameter or buffer: how its elements lie in memory, and the first slot of each axis.

    raw: set on the layout of a copy whose elements lie in another order: the parameter itself. looked_up: axes of which
    such a copy holds some positions, by numbers that are data.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    bases: tuple[int, ...]
    is_buffer: bool
    raw: TensorInfo | None = None
    looked_up: tuple[int, ...] = ()
    is_complex: bool = False

    @property
    def span(self) -> int:
        """Number of storage elements from the first to the last one."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))

    def axis(self, dim: int) -> IntArray:
        """Return the slots along `dim`."""
        return np.arange(self.bases[dim], self.bases[dim] + self.shape[dim], dtype=np.int64)

    def slots(self) -> IntArray:
        """Return every slot of every axis longer than one."""
        parts = [self.axis(dim) for dim in range(len(self.shape)) if self.shape[dim] > 1]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class View:
    """A tensor that is a view of an owner.

    dims: per axis of the owner, (start, {axis of the view: step}); None when an axis of the view runs over several
    axes of the owner. whole: same shape, strides and offset as the owner.
    nested: where dims is None and an axis runs over several axes of the owner, one within the other: per axis of the
    owner, (start, {axis of the view: offset at each place}). looked_up: axes of the owner of which only some positions
    are there, by numbers that are data.
    """

    owner: TensorInfo
    ndim: int
    shape: tuple[int, ...]
    dims: tuple[tuple[int, Mapping[int, int]], ...] | None
    whole: bool
    nested: tuple[tuple[int, Mapping[int, IntArray]], ...] | None = None
    looked_up: tuple[int, ...] = ()

    def places(self) -> list[dict[int, IntArray]]:
        """Return per axis of the owner, by axis of the view, the slots at its places; empty where not followed."""
        if self.nested is not None:
            parts = [(start, dict(steps)) for start, steps in self.nested]
        else:
            sizes = [np.arange(size, dtype=np.int64) for size in self.shape]
            parts = [(start, {a: sizes[a] * step for a, step in steps.items()}) for start, steps in self.dims or ()]
        bases = self.owner.bases
        return [{a: bases[d] + start + offset for a, offset in found.items()} for d, (start, found) in enumerate(parts)]

    def varied(self) -> list[int]:
        """Return the axes of the owner along which this view runs."""
        return [] if self.dims is None else [dim for dim, (_, steps) in enumerate(self.dims) if steps]

    def axes(self, dim: int) -> frozenset[int]:
        """Return the axes of the view that run along `dim` of the owner."""
        return frozenset() if self.dims is None else frozenset(self.dims[dim][1])

    def slots(self, dim: int) -> IntArray:
        """Return the slot of `dim` at each position of the view; axes of size 1 where it does not depend."""
        assert self.dims is not None
        start, steps = self.dims[dim]
        out = np.full((1,) * self.ndim, self.owner.bases[dim] + start, dtype=np.int64)
        for axis, step in steps.items():
            shape = [1] * self.ndim
            shape[axis] = self.shape[axis]
            out = out + step * np.arange(self.shape[axis], dtype=np.int64).reshape(shape)
        return out

    def sole(self, axis: int) -> IntArray | None:
        """Return the slots along one axis of the view when it runs along exactly one axis of the owner, else None."""
        if self.dims is None:
            return None
        found = [dim for dim in self.varied() if axis in self.axes(dim)]
        if len(found) != 1 or len(self.axes(found[0])) != 1:
            return None
        return self.slots(found[0]).reshape(-1)


def _locate(owner: TensorInfo, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> View:
    whole = shape == owner.shape and stride == owner.stride and offset == 0
    order = sorted((d for d in range(len(owner.shape)) if owner.shape[d] > 1), key=lambda d: -owner.stride[d])
    start = [0] * len(owner.shape)
    steps: list[dict[int, int]] = [{} for _ in owner.shape]
    rest = offset
    for dim in order:
        start[dim], rest = divmod(rest, owner.stride[dim])
    mixed = rest != 0
    for axis, (size, step) in enumerate(zip(shape, stride, strict=True)):
        if size <= 1 or step == 0:
            continue
        dim = next((d for d in order if owner.stride[d] <= step and step % owner.stride[d] == 0), -1)
        if dim < 0:
            mixed = True
            break
        steps[dim][axis] = step // owner.stride[dim]
    for dim in order:
        last = start[dim] + sum(step * (shape[axis] - 1) for axis, step in steps[dim].items())
        mixed = mixed or last >= owner.shape[dim]
    if mixed:
        return View(owner, len(shape), shape, None, whole, _nested(owner, start, order, shape, stride))
    return View(owner, len(shape), shape, tuple(zip(start, steps, strict=True)), whole)


def _nested(
    owner: TensorInfo, start: Sequence[int], order: Sequence[int], shape: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[tuple[int, Mapping[int, IntArray]], ...] | None:
    """Follow each axis of a view through the axes of its owner, one within the other; None where it leaves them."""
    found: list[dict[int, IntArray]] = [{} for _ in owner.shape]
    last = list(start)
    for axis, (size, step) in enumerate(zip(shape, stride, strict=True)):
        rest = np.arange(size, dtype=np.int64) * step
        for dim in order:
            place, rest = np.divmod(rest, owner.stride[dim])
            if bool(place.any()):
                found[dim][axis] = place
                last[dim] += int(place.max())
        if bool(rest.any()):
            return None
    if any(last[dim] >= owner.shape[dim] for dim in order):
        return None
    return tuple(zip(start, found, strict=True))


def _of_copy(view: View, layout: TensorInfo) -> View:
    """Say of a view of a copy what it is of the parameter that was copied."""
    assert layout.raw is not None
    gone = layout.looked_up
    dims = view.dims and tuple((0, {}) if d in gone else found for d, found in enumerate(view.dims))
    nested = view.nested and tuple((0, {}) if d in gone else found for d, found in enumerate(view.nested))
    return replace(view, owner=layout.raw, dims=dims, nested=nested, whole=False, looked_up=gone)


class Slots:
    """All slots of a model. Slot 0 is never given out.

    left_out: buffers that have none, as their numbers are those of one pass.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], buffers: Iterable[str], left_out: frozenset[str] = frozenset()
    ) -> None:
        self.owners: dict[str, TensorInfo] = {}
        self.num_slots = 1
        names = frozenset(buffers)
        for name, tensor in tensors.items():
            if name in left_out:  # numbers stay free for it, so that others keep theirs
                self.num_slots += sum(tensor.shape)
                continue
            bases = []
            for size in tensor.shape:
                bases.append(self.num_slots)
                self.num_slots += size
            # captures run on clones of the buffers, which are laid out densely
            layout = torch.empty_like(tensor, device="meta") if name in names else tensor
            shape, stride = tuple(tensor.shape), tuple(layout.stride())
            self.owners[name] = TensorInfo(
                name, shape, stride, tuple(bases), name in names, is_complex=tensor.is_complex()
            )
        self._num_owned = self.num_slots
        self._starts: IntArray | None = None
        self._axis: list[tuple[str, int]] = []
        self._cache: dict[tuple[TensorInfo, int, tuple[int, ...], tuple[int, ...]], View] = {}

    def fresh(self, count: int) -> IntArray:
        """Give out slots that belong to no tensor: what is one thing without being a position (a head of scores)."""
        slots = np.arange(self.num_slots, self.num_slots + count, dtype=np.int64)
        self.num_slots += count
        return slots

    def is_fresh(self, slots: IntArray) -> bool:
        """Whether none of the slots (zeros aside) belongs to a tensor."""
        return not bool(((slots > 0) & (slots < self._num_owned)).any())

    def is_owned(self, slots: IntArray) -> bool:
        """Whether all of the slots belong to tensors."""
        return bool(((slots > 0) & (slots < self._num_owned)).all())

    def axes_of(self, slots: IntArray) -> list[tuple[str, int, IntArray]]:
        """Return (tensor, dim, which of the slots lie on that axis); slots of no tensor are passed over."""
        if self._starts is None:
            rows = [(base, name, dim) for name, o in self.owners.items() for dim, base in enumerate(o.bases)]
            self._starts = np.array([row[0] for row in rows], dtype=np.int64)
            self._axis = [(name, dim) for _, name, dim in rows]
        owned = (slots > 0) & (slots < self._num_owned)
        places = np.where(owned, np.searchsorted(self._starts, slots, side="right") - 1, -1)
        return [(*self._axis[int(place)], places == place) for place in np.unique(places) if place >= 0]

    def view(self, owner: TensorInfo, offset: int, tensor: Tensor) -> View:
        """Return `tensor` as a view of `owner`, `offset` elements after the owner's first."""
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        key = (owner, offset, shape, stride)
        found = self._cache.get(key)
        if found is None:
            found = _locate(owner, offset, shape, stride)
            found = self._cache[key] = found if owner.raw is None else _of_copy(found, owner)
        return found


def named_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Return all parameters and buffers by first name, the further names of tied ones, and the names of buffers."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    buffers: list[str] = []
    seen: dict[int, str] = {}
    for is_buffer, named in (
        (False, model.named_parameters(remove_duplicate=False)),
        (True, model.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in named:
            if id(tensor) in seen:
                aliases[name] = seen[id(tensor)]
                continue
            seen[id(tensor)] = name
            tensors[name] = tensor
            if is_buffer:
                buffers.append(name)
    return tensors, aliases, buffers
