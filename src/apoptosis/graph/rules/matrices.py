"""A parameter as the matrix of a contraction.

Holds: which axes of the parameter are contracted and put out, and their ids. Elsewhere: what a
contraction does to channels (rules/contraction.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from apoptosis.graph.trace.ids import TensorInfo, View
from apoptosis.records import IntArray


@dataclass(slots=True)
class Matrix:
    """A parameter in a contraction: the ids along its contracted and its other axis, and where these lie.

    select: the places along further axes of the parameter, of which the contraction reads this one slice.
    """

    info: TensorInfo
    dim_in: int
    dim_out: int
    columns: IntArray
    rows: IntArray
    select: tuple[tuple[int, int], ...] = ()

    @property
    def whole(self) -> bool:
        """Whether every row and column is read (of the slice that is)."""
        return (self.columns.size, self.rows.size) == (self.info.shape[self.dim_in], self.info.shape[self.dim_out])


def as_matrix(view: View, axis_in: int, axis_out: int) -> Matrix | None:
    """Read a view as a matrix of one parameter; None when its axes are not axes of the parameter."""
    info = view.info
    if view.dims is None or view.looked_up:
        return None
    found: dict[int, tuple[int, IntArray]] = {}
    for axis in (axis_in, axis_out):
        if view.shape[axis] > 1:
            ids = view.sole(axis)
            dims = [d for d in view.varied() if axis in view.axes(d)]
            if ids is None:
                return None
            found[axis] = (dims[0], ids)
    taken = {dim for dim, _ in found.values()}
    for axis, wanted in ((axis_in, len(info.shape) - 1), (axis_out, 0)):
        if axis not in found:  # an axis of size 1: the parameter's axis that is left over
            dim = wanted if wanted not in taken else next((d for d in range(len(info.shape)) if d not in taken), -1)
            if dim < 0 or len(info.shape) != 2:
                return None
            taken.add(dim)
            found[axis] = (dim, np.array([info.bases[dim] + view.dims[dim][0]], dtype=np.int64))
    (dim_in, columns), (dim_out, rows) = found[axis_in], found[axis_out]
    rest = (d for d in range(len(info.shape)) if d not in (dim_in, dim_out) and info.shape[d] > 1)
    select = tuple((d, view.dims[d][0]) for d in rest)
    return None if dim_in == dim_out else Matrix(info, dim_in, dim_out, columns, rows, select)


def as_kernel(view: View) -> tuple[int, ...] | None:
    """Return the parameter's axis along each axis of a convolution's weight, -1 where none runs along it.

    None unless the whole parameter is read, every axis of it along one axis of the weight.
    """
    if view.whole:
        return tuple(range(view.ndim))
    if view.dims is None or view.looked_up:
        return None
    found = [-1] * view.ndim
    for dim, (start, steps) in enumerate(view.dims):
        size = view.info.shape[dim]
        if size == 1:
            continue
        axis, step = next(iter(steps.items()), (0, 0))
        if start or len(steps) != 1 or step != 1 or view.shape[axis] != size or found[axis] >= 0:
            return None
        found[axis] = dim
    wide = any(dim < 0 and size > 1 for dim, size in zip(found[1:], view.shape[1:], strict=True))  # expanded
    return None if wide else tuple(found)


@dataclass(slots=True)
class Stack:
    """A parameter as several matrices side by side. rows: the id of each place of what is put out.

    others: the ids along the axes that number the matrices.
    """

    matrix: Matrix
    rows: IntArray
    others: IntArray


def as_stack(view: View, axis_in: int, axis_out: int) -> Stack | None:
    """Read a view as matrices that are all contracted in one product: one per entry of the batch, or per block of rows.

    Blocks of rows lie one after the other, so that the places within a block are the innermost axis along them.
    """
    info, places = view.info, view.places()
    columns = [(dim, found[axis_in]) for dim, found in enumerate(places) if axis_in in found]
    rows = [(dim, found[axis_out]) for dim, found in enumerate(places) if axis_out in found]
    if len(columns) != 1 or not rows or info.is_buffer:
        return None
    dim_in, dim_out = columns[0][0], max(rows, key=lambda part: int((np.diff(part[1]) != 0).sum()))[0]
    ids = dict(rows)[dim_out]
    if dim_in in dict(rows) or {dim_in, dim_out} & set(view.looked_up):
        return None
    if any(len(places[dim]) != 1 for dim in (dim_in, dim_out)):
        return None
    if not (np.array_equal(columns[0][1], info.axis(dim_in)) and np.array_equal(np.unique(ids), info.axis(dim_out))):
        return None
    rest = [info.axis(d) for d in range(len(info.shape)) if d not in (dim_in, dim_out) and info.shape[d] > 1]
    if not rest:
        return None
    matrix = Matrix(info, dim_in, dim_out, info.axis(dim_in), info.axis(dim_out))
    return Stack(matrix, ids, np.concatenate(rest))
