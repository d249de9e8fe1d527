"""Sketches: few rows, sums of many with random signs, whose second moments are those of all rows in expectation.

Holds: `Sketch` (streaming) and `sketched` (of one matrix). Elsewhere: where rows come from (observe).
References: Charikar, Chen, Farach-Colton, "Finding frequent items in data streams" (2002), with buckets drawn evenly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from apoptosis.errors import ShapeError
from apoptosis.numerics.devices import is_async, to_async

SKETCH_ROWS = 512  # the standard deviation of a sketched energy is sqrt(2 / SKETCH_ROWS) = 6 % of it, of an rms 3 %


class Sketch:
    """S (size, channels) of rows G (N, channels) as they come: E[SᵀS] = GᵀG, and S holds G itself while N <= size.

    Every run of `size` rows fills each of `size` buckets once, in a random order; a row is added to its bucket with a
    random sign. For every x: E‖S x‖² = ‖G x‖² and Var ‖S x‖² <= 2/size ‖G x‖⁴ (docs/theory.md, "Sketched rows").

    Args:
        num_channels: columns. size: rows kept. device: where they lie.

    Example:
        >>> sketch = Sketch(2, size=4)
        >>> sketch.add(torch.tensor([[3.0, 4.0]]), torch.Generator().manual_seed(0))
        >>> sketch.rows().square().sum().item()
        25.0
    """

    def __init__(self, num_channels: int, *, size: int = SKETCH_ROWS, device: torch.device | str = "cpu") -> None:
        self.num_channels, self.size = num_channels, size
        self.num_rows = 0
        self._empty: Tensor | None = None  # how many of them were zero, known to the device alone
        # no memory before there are rows
        self._kept = torch.zeros(1, 1, dtype=torch.float32, device=device).expand(size, num_channels)
        self._order = torch.arange(size, device="cpu")  # of the buckets, for the rows of this turn

    def add(self, rows_NC: Tensor, draws: torch.Generator, *, some_empty: bool = False) -> None:
        """Add rows, in float32. draws: of buckets and signs. some_empty: rows of zeros do not count.

        Raises: ShapeError: rows_NC is not (rows, num_channels).
        """
        if rows_NC.ndim != 2 or rows_NC.shape[1] != self.num_channels:
            raise ShapeError(f"Sketch.add: rows of shape {tuple(rows_NC.shape)}, expected (N, {self.num_channels}).")
        signs = to_async(torch.randint(0, 2, (len(rows_NC), 1), generator=draws, device="cpu") * 2 - 1, rows_NC.device)
        rows, start = rows_NC.detach(), 0
        if some_empty:
            empty = rows.float().eq(0).all(1).sum()
            self._empty = empty if self._empty is None else self._empty + empty
        if self.num_rows == 0 and len(rows):
            self._kept = self._kept.contiguous()
        while start < len(rows):
            place = self.num_rows % self.size
            if place == 0:
                self._order = torch.randperm(self.size, generator=draws, device="cpu")
            stop = min(len(rows), start + self.size - place)
            buckets = to_async(self._order[place : place + stop - start], self._kept.device)
            signed = rows[start:stop].float() * signs[start:stop]
            self._kept.index_add_(0, buckets, signed.to(self._kept.device))
            self.num_rows += stop - start
            start = stop

    def counted(self) -> int:
        """Return the number of rows that were added, without rows of zeros where `some_empty` was given."""
        return self.num_rows - (0 if self._empty is None else int(self._empty))

    def rows(self, *, last: bool = False) -> Tensor:
        """Return S without rows of zeros, (at most size, channels) float32. last: S is not needed again: no copy."""
        if not self.num_rows:
            return self._kept[:0].clone()
        good = row_sizes(self._kept, ahead=is_async(self._kept.device)).ne(0)
        return self._kept if last and bool(good.all()) else self._kept[good]

    def pool(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add the sketches of other processes. total: sums a tensor over all of them."""
        counted = total(torch.tensor([float(self.counted())], dtype=torch.float64, device=self._kept.device))
        self._kept, self.num_rows, self._empty = total(self._kept.double()).float(), int(counted.item()), None

    def state_dict(self) -> dict[str, Any]:
        """Return the sketch, exactly."""
        kept = self._kept if self.num_rows else self._kept[:0]
        empty = self.num_rows - self.counted()
        return {"num_rows": self.num_rows, "empty": empty, "kept": kept.clone(), "order": self._order.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` wrote.

        Raises: ShapeError: it is of another size.
        """
        num_rows, kept = int(state["num_rows"]), state["kept"]
        if kept.shape[1] != self.num_channels or len(kept) != (self.size if num_rows else 0):
            raise ShapeError(f"Sketch: state of {tuple(kept.shape)}, expected {tuple(self._kept.shape)}.")
        self.num_rows = num_rows
        empty = int(state.get("empty", 0))
        self._empty = torch.tensor(empty, device=self._kept.device, dtype=torch.int64) if empty else None
        if num_rows:
            self._kept = kept.to(self._kept.device, copy=True)
        self._order = state["order"].cpu().clone()


def row_sizes(rows_NC: Tensor, *, ahead: bool = False) -> Tensor:
    """Return a number for every row: 0 where all of it is zero, not finite where some of it is not, else positive.

    Sums of squares take a tenth of the time of sums of absolute values on the CPU, but underflow and overflow: those
    that did are summed again. ahead: no number may be read from the device, so that only the latter are used.

    Example:
        >>> row_sizes(torch.tensor([[0.0, 0.0], [1e-30, 0.0], [3.0, 4.0], [float("nan"), 1.0]])).gt(0).tolist()
        [False, True, True, False]
    """
    dtype = torch.float64 if rows_NC.dtype == torch.float64 else torch.float32
    found: Tensor
    if ahead:
        found = torch.linalg.vector_norm(rows_NC, 1, dim=1, dtype=dtype)
        return found
    found = torch.linalg.vector_norm(rows_NC, dim=1, dtype=dtype)
    doubtful = ~(found.ne(0) & found.isfinite())
    if bool(doubtful.any()):
        found[doubtful] = torch.linalg.vector_norm(rows_NC[doubtful], 1, dim=1, dtype=dtype)
    return found


def sketched(matrix_NC: Tensor, size: int, seed: int) -> Tensor:
    """Return a sketch of a matrix of at most `size` rows, (rows, channels) float32."""
    sketch = Sketch(matrix_NC.shape[1], size=size, device=matrix_NC.device)
    sketch.add(matrix_NC, torch.Generator().manual_seed(seed))
    return sketch.rows()
