"""Channel ids: one integer for every position along every axis of every parameter and buffer.

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
    """One parameter or buffer: how its elements lie in memory, and the first id of each axis.

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
        """Return the ids along `dim`."""
        return np.arange(self.bases[dim], self.bases[dim] + self.shape[dim], dtype=np.int64)

    def ids(self) -> IntArray:
        """Return every id of every axis longer than one."""
        parts = [self.axis(dim) for dim in range(len(self.shape)) if self.shape[dim] > 1]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class View:
    """A tensor that is a view of a parameter.

    dims: per axis of the parameter, (start, {axis of the view: step}); None when an axis of the view runs over several
    axes of the parameter. whole: same shape, strides and offset as the parameter. nested: where dims is None and an
    axis runs over several axes of the parameter, one within the other: per axis of the parameter, (start, {axis of the
    view: offset at each place}). looked_up: axes of the parameter of which only some positions are there, by numbers
    that are data.
    """

    info: TensorInfo
    ndim: int
    shape: tuple[int, ...]
    dims: tuple[tuple[int, Mapping[int, int]], ...] | None
    whole: bool
    nested: tuple[tuple[int, Mapping[int, IntArray]], ...] | None = None
    looked_up: tuple[int, ...] = ()

    def places(self) -> list[dict[int, IntArray]]:
        """Return per axis of the parameter, by axis of the view, the ids at its places; empty where not followed."""
        if self.nested is not None:
            parts = [(start, dict(steps)) for start, steps in self.nested]
        else:
            sizes = [np.arange(size, dtype=np.int64) for size in self.shape]
            parts = [(start, {a: sizes[a] * step for a, step in steps.items()}) for start, steps in self.dims or ()]
        bases = self.info.bases
        return [{a: bases[d] + start + offset for a, offset in found.items()} for d, (start, found) in enumerate(parts)]

    def varied(self) -> list[int]:
        """Return the axes of the parameter along which this view runs."""
        return [] if self.dims is None else [dim for dim, (_, steps) in enumerate(self.dims) if steps]

    def axes(self, dim: int) -> frozenset[int]:
        """Return the axes of the view that run along `dim` of the parameter."""
        return frozenset() if self.dims is None else frozenset(self.dims[dim][1])

    def ids(self, dim: int) -> IntArray:
        """Return the id of `dim` at each position of the view; axes of size 1 where it does not depend."""
        assert self.dims is not None
        start, steps = self.dims[dim]
        out = np.full((1,) * self.ndim, self.info.bases[dim] + start, dtype=np.int64)
        for axis, step in steps.items():
            shape = [1] * self.ndim
            shape[axis] = self.shape[axis]
            out = out + step * np.arange(self.shape[axis], dtype=np.int64).reshape(shape)
        return out

    def sole(self, axis: int) -> IntArray | None:
        """Return the ids along one axis of the view when it runs along exactly one axis of the parameter, else None."""
        if self.dims is None:
            return None
        found = [dim for dim in self.varied() if axis in self.axes(dim)]
        if len(found) != 1 or len(self.axes(found[0])) != 1:
            return None
        return self.ids(found[0]).reshape(-1)


def _locate(info: TensorInfo, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> View:
    whole = shape == info.shape and stride == info.stride and offset == 0
    order = sorted((d for d in range(len(info.shape)) if info.shape[d] > 1), key=lambda d: -info.stride[d])
    start = [0] * len(info.shape)
    steps: list[dict[int, int]] = [{} for _ in info.shape]
    rest = offset
    for dim in order:
        start[dim], rest = divmod(rest, info.stride[dim])
    mixed = rest != 0
    for axis, (size, step) in enumerate(zip(shape, stride, strict=True)):
        if size <= 1 or step == 0:
            continue
        dim = next((d for d in order if info.stride[d] <= step and step % info.stride[d] == 0), -1)
        if dim < 0:
            mixed = True
            break
        steps[dim][axis] = step // info.stride[dim]
    for dim in order:
        last = start[dim] + sum(step * (shape[axis] - 1) for axis, step in steps[dim].items())
        mixed = mixed or last >= info.shape[dim]
    if mixed:
        return View(info, len(shape), shape, None, whole, _nested(info, start, order, shape, stride))
    return View(info, len(shape), shape, tuple(zip(start, steps, strict=True)), whole)


def _nested(
    info: TensorInfo, start: Sequence[int], order: Sequence[int], shape: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[tuple[int, Mapping[int, IntArray]], ...] | None:
    """Follow each axis of a view through the axes of its parameter, one within the other; None where it leaves them."""
    found: list[dict[int, IntArray]] = [{} for _ in info.shape]
    last = list(start)
    for axis, (size, step) in enumerate(zip(shape, stride, strict=True)):
        rest = np.arange(size, dtype=np.int64) * step
        for dim in order:
            place, rest = np.divmod(rest, info.stride[dim])
            if bool(place.any()):
                found[dim][axis] = place
                last[dim] += int(place.max())
        if bool(rest.any()):
            return None
    if any(last[dim] >= info.shape[dim] for dim in order):
        return None
    return tuple(zip(start, found, strict=True))


def _of_copy(view: View, layout: TensorInfo) -> View:
    """Turn a view of a copy into the same view of the copied parameter."""
    assert layout.raw is not None
    gone = layout.looked_up
    dims = view.dims and tuple((0, {}) if d in gone else found for d, found in enumerate(view.dims))
    nested = view.nested and tuple((0, {}) if d in gone else found for d, found in enumerate(view.nested))
    return replace(view, info=layout.raw, dims=dims, nested=nested, whole=False, looked_up=gone)


class ChannelIds:
    """All ids of a model. Id 0 is never given out: it stands for no channel.

    left_out: buffers that have none, as their numbers are those of one pass.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], buffers: Iterable[str], left_out: frozenset[str] = frozenset()
    ) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self.num_ids = 1
        names = frozenset(buffers)
        for name, tensor in tensors.items():
            if name in left_out:  # numbers stay free for it, so that others keep theirs
                self.num_ids += sum(tensor.shape)
                continue
            bases = []
            for size in tensor.shape:
                bases.append(self.num_ids)
                self.num_ids += size
            # captures run on clones of the buffers, which are laid out densely
            layout = torch.empty_like(tensor, device="meta") if name in names else tensor
            shape, stride = tuple(tensor.shape), tuple(layout.stride())
            self.tensors[name] = TensorInfo(
                name, shape, stride, tuple(bases), name in names, is_complex=tensor.is_complex()
            )
        self._num_owned = self.num_ids
        self._starts: IntArray | None = None
        self._axis: list[tuple[str, int]] = []
        self._cache: dict[tuple[TensorInfo, int, tuple[int, ...], tuple[int, ...]], View] = {}

    def fresh(self, count: int) -> IntArray:
        """Give out ids that belong to no tensor, for what is no position and goes as a whole (a head of scores)."""
        ids = np.arange(self.num_ids, self.num_ids + count, dtype=np.int64)
        self.num_ids += count
        return ids

    def is_fresh(self, ids: IntArray) -> bool:
        """Whether none of the ids (zeros aside) belongs to a tensor."""
        return not bool(((ids > 0) & (ids < self._num_owned)).any())

    def is_owned(self, ids: IntArray) -> bool:
        """Whether all of the ids belong to tensors."""
        return bool(((ids > 0) & (ids < self._num_owned)).all())

    def axes_of(self, ids: IntArray) -> list[tuple[str, int, IntArray]]:
        """Return (tensor, dim, which of the ids lie on that axis); ids of no tensor are passed over."""
        if self._starts is None:
            rows = [(base, name, dim) for name, o in self.tensors.items() for dim, base in enumerate(o.bases)]
            self._starts = np.array([row[0] for row in rows], dtype=np.int64)
            self._axis = [(name, dim) for _, name, dim in rows]
        owned = (ids > 0) & (ids < self._num_owned)
        places = np.where(owned, np.searchsorted(self._starts, ids, side="right") - 1, -1)
        return [(*self._axis[int(place)], places == place) for place in np.unique(places) if place >= 0]

    def view(self, info: TensorInfo, offset: int, tensor: Tensor) -> View:
        """Return `tensor` as a view of `parameter`, `offset` elements after the parameter's first."""
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        key = (info, offset, shape, stride)
        found = self._cache.get(key)
        if found is None:
            found = _locate(info, offset, shape, stride)
            found = self._cache[key] = found if info.raw is None else _of_copy(found, info)
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
