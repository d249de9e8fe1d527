"""Operators that look things up or put them somewhere by position: embeddings, gather, scatter, indexing.

Holds: what reads or writes along an axis by numbers held in a tensor. Channels beside that axis pass and tie;
channels along it are executed where the numbers are literal (indexing), and pinned where they are data.
Elsewhere: movements without such numbers (rules/movement.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from apoptosis.graph.explain import Code
from apoptosis.graph.rules.broadcast import tie_broadcast
from apoptosis.graph.rules.contraction import of_stack
from apoptosis.graph.rules.normalization import parameter_operand
from apoptosis.graph.trace.operators import Result, Rule
from apoptosis.graph.trace.tracer import Call
from apoptosis.graph.trace.values import (
    Path,
    Value,
    align,
    collapse,
    drop_paths,
    expand,
    nothing,
    unpaired,
    varying,
    without_gaps,
)
from apoptosis.records import IntArray


def mixes(why: Code) -> Rule:
    """Make a rule of an operator that sees all channels at once."""
    return lambda call: call.pin_all(why)


def _has_data(tensor: Tensor) -> bool:
    """Whether numbers can be read: not on the meta device and not of a fake tensor."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def _readable(index: Tensor) -> Tensor:
    """Return positions to execute on ids; where they have no numbers, the first position stands for all."""
    return index.cpu() if _has_data(index) else torch.zeros(index.shape, dtype=torch.int64, device="cpu")


def _is_literal(call: Call, index: Tensor) -> bool:
    """Whether positions are written out in the model, so that the next pass uses the same ones whatever the input."""
    if not _has_data(index):
        return False
    view = call.view(index)
    return view.info.is_buffer if view is not None else call.value(index).origin.literal


def _as_index(call: Call, tensor: object) -> None:
    """Pin channels that serve as positions."""
    if isinstance(tensor, Tensor) and call.view(tensor) is None:
        call.pin(call.value(tensor).ids, Code.INDEX)


def embedding(call: Call) -> Result:
    """Rows by number: the columns of the table are channels, made here."""
    return _rows_of_table(call, simple=True)


def embedding_bag(call: Call) -> Result:
    """Add up rows by number."""
    return _rows_of_table(call, simple=False)


def _rows_of_table(call: Call, *, simple: bool) -> Result:
    tracer, (table, index) = call.tracer, call.args[:2]
    _as_index(call, index)
    for weights in call.tensors()[2:]:
        if tracer.view(weights) is None:
            call.pin(tracer.value(weights).ids, Code.WEIGHS_ROWS)
    out = call.outs[0]
    view = tracer.view(table)
    rest: list[Value | None] = [None] * (len(call.outs) - 1)
    if view is None or view.dims is None or len(view.info.shape) != 2:
        value = parameter_operand(call, table, [table.dim() - 1])
        if 0 in varying(value.ids):
            call.pin(value.ids, Code.LOOKED_UP)
        ids = align(value.ids[:1].reshape(-1), out.dim())
        return [Value(ids, paths=drop_paths([value.paths]), origin=value.origin), *rest]
    info, dim = view.info, next((d for d in view.varied() if 1 in view.axes(d)), 1)
    columns = view.ids(dim)[:1].reshape(-1)
    rows = view.ids(1 - dim)
    call.pin(rows, Code.TABLE_ROWS(name=info.name))
    axis = (info.name, dim)
    tracer.trace.producers.setdefault(axis, tracer.module_name or info.name.rpartition(".")[0])
    ids = align(columns, out.dim())
    linear = frozenset((axis,)) if simple else frozenset()
    return [Value(ids, paths={axis: Path() if simple else None}, linear=linear), *rest]


def _constant_along(tensor: Tensor, axis: int) -> bool:
    """Whether positions are the same all along an axis: then they do not tell its channels apart."""
    if tensor.shape[axis] <= 1 or tensor.stride(axis) == 0:
        return True
    return _has_data(tensor) and bool((tensor == tensor.narrow(axis, 0, 1)).all())


def _positions(call: Call, index: Tensor, value: Value, dim: int, *, writes: bool) -> None:
    """Pin channels that an index of the operand's own shape treats apart by number."""
    verb = "writes" if writes else "picks"
    own = call.value(index).ids if call.view(index) is None else None
    if dim in varying(value.ids):
        _as_index(call, index)
        call.pin(value.ids, Code.BY_NUMBER(verb=verb))
        return
    if own is not None and own.shape == value.ids.shape and np.array_equal(own, value.ids):
        return  # every channel has positions that were computed from itself, as a sort gives them
    _as_index(call, index)
    axes = varying(value.ids)
    if any(not _constant_along(index, axis) for axis in axes):
        call.pin(value.ids, Code.OWN_POSITIONS(verb=verb))
    elif writes and any(index.shape[axis] != call.args[0].shape[axis] for axis in axes):
        call.pin(value.ids, Code.FIRST_CHANNELS(verb=verb))  # what gather reads is seen in its ids


def _cropped(ids: IntArray, shape: Sequence[int], dim: int) -> IntArray:
    """Cut ids to the leading part of every axis but `dim`, as gather and scatter read it."""
    sizes = [n if axis == dim or n == 1 else shape[axis] for axis, n in enumerate(ids.shape)]
    return ids[tuple(slice(0, n) for n in sizes)]


def gather(call: Call) -> Result:
    """Read elements along `dim` by number."""
    tensor, index = call.args[0], call.arg(2, "index")
    dim = int(call.arg(1, "dim")) % max(1, tensor.dim())
    value = parameter_operand(call, tensor, set(range(tensor.dim())) - {dim})
    _positions(call, index, value, dim, writes=False)
    if not value.has_channels or dim in varying(value.ids):
        return nothing(call.outs[0].dim(), value.origin)
    return replace(value, ids=collapse(_cropped(value.ids, index.shape, dim)), source=None)


def scatter(call: Call) -> Result:
    """Write a source into places along `dim`, each element at its own: channels beside it tie."""
    return _written(call, by_element=True)


def index_add(call: Call) -> Result:
    """Write the slices of a source into places along `dim`: channels beside it tie."""
    return _written(call, by_element=False)


def _written(call: Call, *, by_element: bool) -> Result:
    target, dim, index, source = call.args[0], int(call.arg(1, "dim")), call.arg(2, "index"), call.arg(3, "src")
    dim %= max(1, target.dim())
    value = call.value(target)
    given: list[tuple[Tensor, Value]] = [(target, value)]
    if isinstance(source, Tensor) and source.dim() == target.dim():
        brought = parameter_operand(call, source, set(range(source.dim())) - {dim})
        given.append((source, brought))
        if any(source.shape[a] != target.shape[a] for a in varying(brought.ids) | varying(value.ids) if a != dim):
            call.pin(brought.ids, Code.INTO_PART)
            call.pin(value.ids, Code.PART_WRITTEN)
            return None
    for _, one in given:
        if index.dim() == target.dim() and by_element:
            _positions(call, index, one, dim, writes=True)
        else:
            _as_index(call, index)
            if dim in varying(one.ids):
                call.pin(one.ids, Code.BY_NUMBER(verb="writes"))
    if any(dim in varying(one.ids) for _, one in given):
        return None
    met = tie_broadcast(call, [], target.dim(), given)
    return replace(met, paths=drop_paths([one.paths for _, one in given]))


def index_fill(call: Call) -> Result:
    """index_fill: a constant at some positions."""
    target, dim = call.args[0], int(call.arg(1, "dim")) % max(1, call.args[0].dim())
    value = call.value(target)
    if dim in varying(value.ids):
        call.pin(value.ids, Code.BY_NUMBER(verb="writes"))
    return replace(value, paths=drop_paths([value.paths]), source=None, linear=frozenset(), even={})


def _without_gaps(ids: IntArray) -> IntArray:
    """Collapse the axes along which there is one channel and, for the rest, nothing: rows that were not written."""
    few = np.unique(ids[ids != 0]).size < 2  # a single channel: no telling which axis is which
    return collapse(ids) if few else without_gaps(ids)


def _overlaid(call: Call, target: Tensor, new: IntArray, mask: IntArray, source: Value) -> Result:
    """Ids `new` are written where `mask` is set (both broadcast to the target's ids)."""
    value = call.value(target)
    paths = drop_paths([value.paths, source.paths])
    if not value.has_channels:
        if source.has_channels and not value.is_filler:
            call.pin(new, Code.INTO_NONE(origin=value.origin))
        written = np.where(mask, new, 0)
        return Value(_without_gaps(written), paths=paths, is_filler=value.is_filler and source.is_filler)
    if source.is_filler and not source.has_channels:
        return replace(value, paths=paths, source=None, linear=frozenset(), even={})
    old, new, mask = np.broadcast_arrays(value.ids, new, mask)
    call.tie(np.where(mask, old, 0), new)
    call.pin(np.where(mask, unpaired(old, new), 0), Code.OVER_NONE)
    return Value(value.ids, paths=paths)


def index_put(call: Call) -> Result:
    """Write values where numbers or masks point to."""
    target, indices, source = call.args[0], list(call.arg(1, "indices")), call.arg(2, "values")
    for index in indices:
        _as_index(call, index)
    value, brought = (
        call.value(target),
        parameter_operand(call, source, [source.dim() - 1] if source.dim() else []),
    )
    if source.numel() == 1 and not brought.has_channels:
        brought = replace(brought, is_filler=True)
    if not value.has_channels and not brought.has_channels:
        return nothing(target.dim(), brought.origin, is_filler=value.is_filler and brought.is_filler)
    width = sum(i.dim() if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) else 1 for i in indices)
    shape = [n if a < width or a in varying(value.ids) else 1 for a, n in enumerate(target.shape)]
    for axis in varying(brought.ids):  # an axis behind the indexed ones lies in the target as it lies in the source
        place = target.dim() - (source.dim() - axis)
        if place >= 0:
            shape[place] = target.shape[place]
    places = tuple(slice(None) if i is None else _readable(i) for i in indices)
    expand(np.zeros((1,) * target.dim(), dtype=np.int64), shape)  # raises where it would be too large
    new, mask = torch.zeros(shape, dtype=torch.int64, device="cpu"), torch.zeros(shape, dtype=torch.bool, device="cpu")
    mask[places] = True
    new[places] = torch.from_numpy(np.array(brought.ids))
    return _overlaid(call, target, new.numpy(), mask.numpy(), brought)


def masked_scatter(call: Call) -> Result:
    """Elements of the source, in order, go where the mask is set."""
    target, mask, source = call.args[0], call.args[1], call.args[2]
    _as_index(call, mask)
    brought = call.value(source)
    if not _has_data(mask):
        for ids in (brought.ids, call.value(target).ids):
            call.pin(ids, Code.UNKNOWN_POSITIONS)
        return None
    wide = np.array(np.broadcast_to(mask.cpu().numpy(), target.shape))
    new = np.zeros(expand(np.zeros((1,) * target.dim(), dtype=np.int64), target.shape).shape, dtype=np.int64)
    new[wide] = expand(brought.ids, source.shape).reshape(-1)[: int(wide.sum())]
    axes = varying(collapse(_without_gaps(new))) | varying(call.value(target).ids)
    if any(bool((wide != wide.take([0], axis=axis)).any()) for axis in axes):
        for ids in (brought.ids, call.value(target).ids):
            call.pin(ids, Code.OWN_POSITIONS(verb="writes"))
        return None
    return _overlaid(call, target, new, wide, brought)


def index_select(call: Call) -> Result:
    """Read slices along `dim` by number."""
    tensor, index = call.args[0], call.arg(2, "index")
    dim = int(call.arg(1, "dim")) % max(1, tensor.dim())
    _as_index(call, index)
    value = parameter_operand(call, tensor, set(range(tensor.dim())) - {dim})
    if not value.has_channels or value.ids.shape[dim] == 1:
        return value
    if not _is_literal(call, index):
        call.pin(value.ids, Code.BY_DATA)
        return None
    return value.moved(collapse(value.ids.take(index.reshape(-1).cpu().numpy(), axis=dim)))


def index(call: Call) -> Result:
    """Read what numbers or masks point to."""
    tensor, indices = call.args[0], list(call.arg(1, "indices"))
    if of_stack(call, tensor, indices):
        _as_index(call, indices[0])
        return None
    axes, position = list[int](), 0
    for index in indices:
        width = index.dim() if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) else 1
        if index is not None:
            axes.extend(range(position, position + width))
        position += width
        _as_index(call, index)
    value = parameter_operand(call, tensor, set(range(tensor.dim())) - set(axes))
    if not value.has_channels:
        return nothing(call.outs[0].dim(), value.origin, is_filler=value.is_filler)
    if varying(value.ids) & set(axes) and not all(_is_literal(call, i) for i in indices if i is not None):
        call.pin(value.ids, Code.BY_DATA)
        return None
    places = tuple(slice(None) if i is None else _some(_readable(i)) for i in indices)
    return value.moved(collapse(torch.from_numpy(np.array(expand(value.ids, tensor.shape, axes)))[places].numpy()))


def _some(index: Tensor) -> Tensor:
    """Return an index of no places with the first one instead, so that the channels of an empty result are known."""
    if index.dtype not in (torch.bool, torch.uint8):
        return index if index.numel() else index.new_zeros([max(1, size) for size in index.shape])
    return index if bool(index.any()) else torch.arange(index.numel(), device="cpu").view(index.shape) == 0


def bucketize(call: Call) -> Result:
    """Compare every element with given limits."""
    value = call.value(call.args[0])
    for tensor in call.tensors()[1:]:
        call.pin(call.value(tensor).ids, Code.COMPARES)
    return replace(value, paths=drop_paths([value.paths]), source=None, linear=frozenset(), even={})


def checked(call: Call) -> Result:
    """Nothing comes of it that carries channels."""
    return None
