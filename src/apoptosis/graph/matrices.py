"""A parameter as the matrix of a contraction.

Lives here: which axes of the parameter are contracted and put out, and their slots. Does not live here: what a
contraction does to channels (rules_contract.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from apoptosis.graph.slots import Owner, View
from apoptosis.records import IntArray


@dataclass(slots=True)
class Matrix:
    """A parameter in a contraction: the slots along its contracted and its other axis, and where these lie.

    select: the places along further axes of the parameter, of which the contraction reads this one slice.
    """

    owner: Owner
    dim_in: int
    dim_out: int
    columns: IntArray
    rows: IntArray
    select: tuple[tuple[int, int], ...] = ()

    @property
    def whole(self) -> bool:
        """Whether every row and column is read (of the slice that is)."""
        return (self.columns.size, self.rows.size) == (self.owner.shape[self.dim_in], self.owner.shape[self.dim_out])


def as_matrix(view: View, axis_in: int, axis_out: int) -> Matrix | None:
    """Read a view as a matrix of one parameter; None when its axes are not axes of the parameter."""
    owner = view.owner
    if view.dims is None:
        return None
    found: dict[int, tuple[int, IntArray]] = {}
    for axis in (axis_in, axis_out):
        if view.shape[axis] > 1:
            slots = view.sole(axis)
            dims = [d for d in view.varied() if axis in view.axes(d)]
            if slots is None:
                return None
            found[axis] = (dims[0], slots)
    taken = {dim for dim, _ in found.values()}
    for axis, wanted in ((axis_in, len(owner.shape) - 1), (axis_out, 0)):
        if axis not in found:  # an axis of size 1: the parameter's axis that is left over
            dim = wanted if wanted not in taken else next((d for d in range(len(owner.shape)) if d not in taken), -1)
            if dim < 0 or len(owner.shape) != 2:
                return None
            taken.add(dim)
            found[axis] = (dim, np.array([owner.bases[dim] + view.dims[dim][0]], dtype=np.int64))
    (dim_in, columns), (dim_out, rows) = found[axis_in], found[axis_out]
    rest = (d for d in range(len(owner.shape)) if d not in (dim_in, dim_out) and owner.shape[d] > 1)
    select = tuple((d, view.dims[d][0]) for d in rest)
    return None if dim_in == dim_out else Matrix(owner, dim_in, dim_out, columns, rows, select)
