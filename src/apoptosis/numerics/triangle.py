"""A symmetric matrix of which one half is stored: strips of rows, each from its diagonal block on.

Holds: adding products to it, and reading parts of it without building the full matrix. Elsewhere: moments
(moments.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_STRIP = 128  # rows of a strip: with fewer, products are slower; with more, more than half of the matrix is stored


class Triangle:
    """Symmetric (size, size), all zeros at first; strip i holds rows s = 128 i .. s + 127 from column s on.

    Nothing is allocated before something is added.

    Args:
        size: rows. dtype: of what is stored, float32 or float64. device: where it lies.

    Example:
        >>> matrix = Triangle(2)
        >>> matrix.add_gram(torch.tensor([[1.0, 2.0], [0.0, 3.0]]).double())
        >>> matrix.full()
        tensor([[ 1.,  2.],
                [ 2., 13.]], dtype=torch.float64)
    """

    __slots__ = ("_strips", "device", "dtype", "size")

    def __init__(self, size: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> None:
        self.size, self.dtype, self.device = size, dtype, torch.device(device)
        self._strips: list[Tensor] = []

    @classmethod
    def of(cls, matrix: Tensor, *, dtype: torch.dtype | None = None) -> Triangle:
        """Return a copy of a symmetric matrix, of which the upper half is read."""
        out = cls(matrix.shape[0], dtype=matrix.dtype if dtype is None else dtype, device=matrix.device)
        out._strips = [
            matrix[s : s + _STRIP, s:].to(out.dtype, copy=True).contiguous() for s in range(0, out.size, _STRIP)
        ]
        return out

    def copy(self) -> Triangle:
        """Return an independent copy."""
        return self._mapped(lambda strip: strip.clone(), self.dtype, self.device)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Triangle:
        """Return the matrix in another type or place; itself where it is in them."""
        dtype, device = dtype or self.dtype, device or self.device
        if dtype == self.dtype and device == self.device:
            return self
        return self._mapped(lambda strip: strip.to(device, dtype), dtype, device)

    def _mapped(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device) -> Triangle:
        out = Triangle(self.size, dtype=dtype, device=device)
        out._strips = [change(strip) for strip in self._strips]
        return out

    def _allocated(self) -> list[Tensor]:
        if not self._strips:
            starts = range(0, self.size, _STRIP)
            self._strips = [
                torch.zeros(min(_STRIP, self.size - s), self.size - s, dtype=self.dtype, device=self.device)
                for s in starts
            ]
        return self._strips

    def _at(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield first row, end and numbers of every strip."""
        for number, strip in enumerate(self._strips):
            start = number * _STRIP
            yield start, start + strip.shape[0], strip

    def add_gram(self, rows_NC: Tensor) -> None:
        """Add rowsᵀ @ rows; rows: (N, size) in the matrix's own type and place."""
        self._allocated()
        for start, stop, strip in self._at():
            strip.addmm_(rows_NC[:, start:stop].T, rows_NC[:, start:])

    def add_outer(self, vector: Tensor, scale: float) -> None:
        """Add scale * vector vectorᵀ."""
        self._allocated()
        vector = vector.to(self.device, self.dtype)
        for start, stop, strip in self._at():
            strip.addr_(vector[start:stop], vector[start:], alpha=scale)

    def add(self, other: Triangle) -> None:
        """Add another matrix."""
        if not other._strips:
            return
        for strip, own in zip(self._allocated(), other._strips, strict=True):
            strip += own.to(strip)

    def scale(self, factor: float) -> None:
        """Multiply by a number."""
        for strip in self._strips:
            strip *= factor

    def diagonal(self) -> Tensor:
        """Return the diagonal, (size,) in its own type; a copy."""
        if not self._strips:
            return torch.zeros(self.size, dtype=self.dtype, device=self.device)
        return torch.cat([strip.diagonal() for strip in self._strips])

    def set_diagonal(self, values: Tensor) -> None:
        """Write the diagonal."""
        self._allocated()
        for start, stop, strip in self._at():
            strip.diagonal().copy_(values[start:stop])

    def full(self, scale: float = 1.0) -> Tensor:
        """Return the whole matrix times a number, (size, size) float64; a new tensor."""
        out = torch.empty(self.size, self.size, dtype=torch.float64, device=self.device)
        if not self._strips:
            return out.zero_()
        for start, stop, strip in self._at():
            own = out[start:stop, start:]
            own.copy_(strip)
            own *= scale
            out[stop:, start:stop] = out[start:stop, stop:].T
        return out

    def block(self, rows: Tensor, columns: Tensor, scale: float = 1.0) -> Tensor:
        """Return the entries at some rows and columns (int64, any order) times a number, float64; a new tensor."""
        rows, columns = rows.to(self.device), columns.to(self.device)
        out = torch.zeros(len(rows), len(columns), dtype=torch.float64, device=self.device)
        for start, stop, strip in self._at():
            mine, right = _between(rows, start, stop), _between(columns, start, self.size)
            out[mine[:, None], right] = strip[rows[mine] - start][:, columns[right] - start].double()
            mirrored, below = _between(columns, start, stop), _between(rows, stop, self.size)
            found = strip[columns[mirrored] - start][:, rows[below] - start]
            out[below[:, None], mirrored] = found.double().T
        return out.mul_(scale)

    def products(self, rows_NC: Tensor) -> Tensor:
        """Return rows @ matrix, (N, size), in the type of the rows."""
        rows = rows_NC.to(self.device)
        out = torch.zeros(rows.shape[0], self.size, dtype=rows.dtype, device=self.device)
        for start, stop, strip in self._at():
            own = strip.to(rows.dtype)
            out[:, start:].addmm_(rows[:, start:stop], own)
            out[:, start:stop].addmm_(rows[:, stop:], own[:, stop - start :].T)
        return out


def _between(index: Tensor, start: int, stop: int) -> Tensor:
    """Return the places at which an index lies in [start, stop)."""
    return ((index >= start) & (index < stop)).nonzero().flatten()
