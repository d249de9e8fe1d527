"""What a network keeps in attributes from one forward pass to the next: hidden states, membrane potentials, caches.

Holds: which tensors those are, rows that fit another batch, and cutting removed channels out of them.
Elsewhere: which of their positions are channels (graph), putting back what a pass changed (module_state).

A tensor is known by its path. Of a list, entries that were not there at capture are taken for what its others are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from apoptosis.errors import ShapeError
from apoptosis.interrupts import is_out_of_memory
from apoptosis.model.module_state import Exchange, Path, Walk, name_of
from apoptosis.records import IntArray, Kept

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Rows:
    """Which axis of a kept tensor has one entry per example: as many as a tensor of the inputs has along `dim`."""

    axis: int
    leaf: int
    dim: int


@dataclass(slots=True)
class Known:
    """What captures found out about a model: rows by the path of a tensor, buffers that are rewritten by every pass.

    read: whether any of it is read by a later pass. values: by the widths of a capture, what its tensors carry.
    """

    rows: dict[Path, Rows] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    read: bool = False
    values: dict[object, Any] = field(default_factory=dict)


_KNOWN: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()


def known_of(model: nn.Module) -> Known | None:
    """Return what captures of a model found out, None before the first."""
    return _KNOWN.get(model)


def remember(model: nn.Module, known: Known) -> None:
    """Keep what a capture found out, as long as the model lives."""
    _KNOWN[model] = known


def entry_of(path: Path, table: Mapping[Path, _T]) -> _T | None:
    """Return what is known of a tensor, or of another entry of the same list."""
    found = table.get(path)
    if found is None and path and isinstance(path[-1], int):
        return next((item for other, item in table.items() if other[:-1] == path[:-1] and len(other) > 1), None)
    return found


def kept_tensors(model: nn.Module, buffers: Iterable[str], walk: Walk | None = None) -> dict[Path, Tensor]:
    """Return the tensors in plain attributes, and the named buffers, by their paths."""
    found = dict((walk or Walk(model)).tensors)
    wanted = frozenset(buffers)
    for name, tensor in model.named_buffers() if wanted else ():
        if name in wanted:
            module, _, leaf = name.rpartition(".")
            found[module, leaf] = tensor
    return found


def leaves_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors of a call, as `Rows.leaf` counts them."""
    return [leaf for leaf in tree_flatten((args, dict(kwargs)))[0] if isinstance(leaf, Tensor)]


def rows_of(shape: Sequence[int], channels: Iterable[int], leaves: Sequence[Tensor]) -> Rows | None:
    """Say which axis of a kept tensor follows the inputs, None for none.

    channels: axes along which channels lie. Of axes of one size the last before them counts: hidden states of one layer
    and one example have shape (1, 1, channels).
    """
    taken = frozenset(channels)
    first = min(taken, default=0)
    found = []
    for axis, size in enumerate(shape):
        for leaf, tensor in enumerate(leaves):
            for dim in range(min(2, tensor.dim())) if axis not in taken else ():
                if tensor.shape[dim] == size:
                    found.append((dim, (first - axis) % max(1, len(shape)), leaf, axis))
    if not found:
        return None
    dim, _, leaf, axis = min(found)
    return Rows(axis, leaf, dim)


def with_rows(tensor: Tensor, axis: int, number: int) -> Tensor:
    """Return a tensor with so many rows along an axis: the first ones, or all of them again and again."""
    index = torch.arange(number, dtype=torch.int64, device=tensor.device) % max(1, tensor.shape[axis])
    return tensor.detach().index_select(axis, index)


def fit(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, single: bool = False) -> list[Exchange]:
    """Let what a model keeps have a row for every example of a call. To be called inside `internal_passes` alone.

    single: only where it has one row, or the call one example. Returns: what was exchanged.
    """
    known = _KNOWN.get(model)
    if known is None or not known.rows:
        return []
    leaves, walk, new = leaves_of(args, kwargs), Walk(model), dict[int, Tensor]()
    for path, tensor in kept_tensors(model, known.buffers, walk).items():
        rows = entry_of(path, known.rows)
        if rows is None or rows.axis >= tensor.dim() or rows.leaf >= len(leaves) or not tensor.shape[rows.axis]:
            continue
        leaf = leaves[rows.leaf]
        wanted = leaf.shape[rows.dim] if rows.dim < leaf.dim() else tensor.shape[rows.axis]
        if wanted != tensor.shape[rows.axis] and (not single or 1 in (wanted, tensor.shape[rows.axis])):
            new[id(tensor)] = with_rows(tensor, rows.axis, wanted)
    return exchange(walk, new)


def exchange(walk: Walk, new: Mapping[int, Any]) -> list[Exchange]:
    """Replace some objects, given by their ids, wherever a model holds them."""
    found = list(exchanges(walk, new))
    for setter, _, value in found:
        setter(value)
    return found


def run_fitted(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a model on examples, with a row of what it keeps for each. To be called inside `internal_passes` alone.

    A model may start over with a batch of another size, and sizes may be alike by chance: what is kept is made to fit
    where the model fails without, or where one row would be spread over others.
    """
    known = _KNOWN.get(model)
    if known is None or not known.rows:
        return model(*args, **kwargs)
    copies = tree_map_only(Tensor, Tensor.clone, (args, dict(kwargs)))
    made = fit(model, args, kwargs, single=True)
    try:
        return model(*args, **kwargs)
    except Exception as error:  # the user's forward may raise anything
        for setter, old, _ in made:
            setter(old)
        if is_out_of_memory(error) or (not made and not fit(model, *copies)):
            raise  # lack of memory says nothing about what is kept
        try:
            return model(*copies[0], **copies[1])
        except Exception:  # noqa: BLE001 - whatever this pass raises, the user's error is that of the first one
            raise error from None


def exchanges(walk: Walk, new: Mapping[int, Any]) -> Iterator[Exchange]:
    """Yield how to replace some objects, given by their ids."""
    for container in walk.containers if new else ():
        yield from container.exchanges(new)


# ---------------------------------------------------------------------- channels


def cut(model: nn.Module, kept: Sequence[Kept], removed: IntArray) -> list[Exchange]:
    """Return how to take removed channels out of what a model keeps; nothing has changed yet.

    Args:
        model: whose attributes are looked at as they are now; what has another shape than at capture, but for its rows,
            stays.
        kept: what the capture found.
        removed: the numbers of the channels that go.

    Raises: ShapeError: of what is read later, rows would keep different numbers of channels.
    """
    table = {item.path: item for item in kept if bool(np.isin(item.labels, removed).any())}
    if not table:
        return []
    walk, new = Walk(model), dict[int, Tensor]()
    names = [f"{path[0]}.{path[1]}".lstrip(".") for path in table if len(path) == 2]
    for path, tensor in kept_tensors(model, names, walk).items():
        item = entry_of(path, table)
        if item is not None and _fits(tensor.shape, item.labels.shape):
            try:
                new[id(tensor)] = _narrowed(tensor, np.isin(item.labels, removed, invert=True))
            except ShapeError as error:
                raise ShapeError(f"'{name_of(path)}', which is kept between passes, {error}") from error
    return list(exchanges(walk, new))


def copies(
    model: nn.Module, kept: Sequence[Kept], keep: Mapping[str, Mapping[int, Tensor]], new: Mapping[str, Tensor]
) -> list[Exchange]:
    """Return how to let attributes follow the parameters and buffers that they show, or are computed from.

    Args:
        model: whose attributes are looked at.
        kept: what the capture found.
        keep: of each tensor that is edited, the positions that stay along its dims.
        new: the values that the tensors are given; what shows one of them shows the new one.
    """
    table = {item.path: item.copy_of for item in kept if item.copy_of in keep}
    if not table:
        return []
    walk, found = Walk(model), dict[int, Tensor]()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for path, tensor in walk.tensors.items():
        name = table.get(path, "")
        if not name or type(tensors.get(name)) not in (Tensor, nn.Parameter) or tensor.shape != tensors[name].shape:
            continue  # sharded ones are shown by nothing else
        if tensor.untyped_storage()._cdata == tensors[name].untyped_storage()._cdata:
            found[id(tensor)] = new[name].detach()
            continue
        part = tensor.detach()
        for dim, index in keep[name].items():
            part = part.index_select(dim, index.to(part.device))
        found[id(tensor)] = part
    return list(exchanges(walk, found))


def labels_after(item: Kept, removed: IntArray) -> IntArray:
    """Return the labels of what `cut` leaves."""
    labels, stay = item.labels, np.isin(item.labels, removed, invert=True)
    dropped, gathered = _places(stay)
    for axis, index in dropped:
        labels = labels.take(index, axis)
    return labels if gathered is None else np.take_along_axis(labels, gathered[1], gathered[0])


def _fits(shape: Sequence[int], labels: Sequence[int]) -> bool:
    return len(shape) == len(labels) and all(n in (1, size) for n, size in zip(labels, shape, strict=True))


def _narrowed(tensor: Tensor, stay: Any) -> Tensor:
    dropped, gathered = _places(stay)

    def part(x: Tensor) -> Tensor:
        for axis, index in dropped:
            x = x.index_select(axis, torch.from_numpy(index).to(x.device))
        if gathered is None:
            return x
        axis, places = gathered
        return torch.take_along_dim(x, torch.from_numpy(places).to(x.device), axis)

    with torch.no_grad():
        new = part(tensor.detach())
        if tensor.is_leaf:
            new.requires_grad_(tensor.requires_grad)
            new.grad = None if tensor.grad is None else part(tensor.grad)
    return new


def _places(stay: Any) -> tuple[list[tuple[int, IntArray]], tuple[int, IntArray] | None]:
    """Return what stays: whole positions by axis, and along one axis of what these leave, the places in every row.

    Raises: ShapeError: rows keep different numbers of places.
    """
    dropped: list[tuple[int, IntArray]] = []
    for axis in range(stay.ndim):
        along = stay.any(axis=tuple(other for other in range(stay.ndim) if other != axis))
        if not along.all():
            dropped.append((axis, np.flatnonzero(along).astype(np.int64)))
            stay = stay.take(dropped[-1][1], axis)
    if stay.all():
        return dropped, None
    for axis in reversed(range(stay.ndim)):
        counts = stay.sum(axis=axis)
        if stay.shape[axis] > 1 and (counts == counts.flat[0]).all():
            order = np.argsort(~stay, axis=axis, kind="stable").astype(np.int64)
            return dropped, (axis, order.take(np.arange(int(counts.flat[0])), axis))
    raise ShapeError("would keep other numbers of channels in one row than in another.")
