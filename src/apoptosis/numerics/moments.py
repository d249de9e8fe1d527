"""Streaming moments: count, mean and Gram matrix of C channels, mergeable across batches, windows and ranks.

Holds: the arithmetic. Elsewhere: collecting rows (observe), Triangle (numerics.triangle).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from apoptosis.errors import ArgumentError, NonFiniteError, ShapeError
from apoptosis.numerics.linalg import true_float32
from apoptosis.numerics.triangle import Triangle

_STATE_KEYS = ("num_rows", "num_examples", "exact", "mean", "scatter")
_ROWS = 256  # that are converted to float64 at once, for their mean


class Moments:
    """Count, mean and centred Gram matrix of `num_channels` channels, accumulated on the data's device.

    Half of the matrix is stored (numerics.triangle), in float32 where all products are, else in float64; the mean is
    float64.

    Every batch is centred by its own mean and joined by Chan's formula, so large means do not cancel:

        scatter = scatter_a + scatter_b + n_a n_b / (n_a + n_b) d dᵀ,   d = mean_b - mean_a

    Any split of the same rows into batches, in any order, gives the same moments up to round-off.

    Attributes:
        num_channels: C. num_rows: rows seen. num_examples: examples they came from (positions of one image are
        correlated, so this is the number that says how much has been seen). exact: all products were in float64.

    Example:
        >>> moments = Moments(2)
        >>> moments.update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> moments.mean.tolist(), moments.covariance()[0, 0].item()
        ([2.0, 0.0], 1.0)

    References: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
        Stanford CS-79-773 (1979).
    """

    __slots__ = ("_mean", "_root", "_scatter", "exact", "num_channels", "num_examples", "num_rows")

    def __init__(self, num_channels: int, *, device: torch.device | str = "cpu") -> None:
        if num_channels < 1:
            raise ArgumentError(f"Moments: num_channels is {num_channels}; at least one channel is needed.")
        self.num_channels = num_channels
        self.num_rows = 0
        self.num_examples = 0
        self.exact = True
        self._mean = torch.zeros(num_channels, dtype=torch.float64, device=device)
        self._scatter = Triangle(num_channels, device=device)
        self._root: Tensor | None = torch.zeros(0, num_channels, dtype=torch.float64, device=device)

    @property
    def device(self) -> torch.device:
        """Where the accumulators live."""
        return self._mean.device

    @property
    def mean(self) -> Tensor:
        """Mean of the rows, (channels,) float64; zeros before the first row."""
        return self._mean.clone()

    def update(
        self, rows_NC: Tensor, *, exact: bool = False, examples: int | None = None, checked: bool = True
    ) -> None:
        """Add N rows.

        Args:
            rows_NC: (rows, channels), any floating dtype; no gradient is recorded.
            exact: take the products in float64. Otherwise the centred rows are multiplied and summed in float32: a
                variance below about (6e-8 |mean|)² or 1e-7 of the largest one is not resolved.
            examples: how many examples the rows came from; None: one each.
            checked: False adds the rows without a check, which would wait for the device; call `check` later.

        Raises:
            ShapeError: rows_NC is not (rows, num_channels).
            NonFiniteError: a row holds NaN or infinity, or a product overflows; nothing is added.
        """
        if rows_NC.ndim != 2 or rows_NC.shape[1] != self.num_channels:
            raise ShapeError(
                f"Moments.update: rows of shape {tuple(rows_NC.shape)}, expected (N, {self.num_channels})."
            )
        num_rows = rows_NC.shape[0]
        if num_rows == 0:
            return
        if self.num_rows == 0 and rows_NC.device != self.device:
            self._move(rows_NC.device)
        with true_float32(rows_NC.device):
            rows = rows_NC.detach()
            keeps_root = exact and rows.dtype == torch.float64
            if exact:
                rows = rows.double()
            elif rows.dtype not in (torch.float32, torch.float64):
                rows = rows.float()
            mean = _mean(rows)
            total = self.num_rows + num_rows
            step = mean - self._mean if self.num_rows else torch.zeros_like(mean)
            weight = self.num_rows * num_rows / total
            # The step between the means rides along as one more row: one product does the batch and Chan's term.
            work = torch.empty(num_rows + 1, self.num_channels, dtype=rows.dtype, device=rows.device)
            torch.sub(rows, mean.to(rows.dtype), out=work[:num_rows])
            work[num_rows] = step.to(rows.dtype) * weight**0.5
            work = work.double() if exact else work.float()
            if self.num_rows == 0:
                self._scatter = Triangle(self.num_channels, dtype=work.dtype, device=self.device)
            elif self._scatter.dtype != work.dtype:
                work, self._scatter = work.double(), self._scatter.to(dtype=torch.float64)
            if checked:  # no entry of a Gram matrix is larger than its diagonal
                squares = torch.stack([part.square().sum(0) for part in torch.split(work, _ROWS)]).sum(0)
                _check(mean, squares + self._scatter.diagonal(), "; the batch is not added")
            self._scatter.add_gram(work.to(self.device))
            self._add_root(work if keeps_root else None)
            self._mean.add_(step, alpha=num_rows / total) if self.num_rows else self._mean.copy_(mean)
        self.exact = self.exact and exact
        self.num_rows = total
        self.num_examples += num_rows if examples is None else examples

    def check(self) -> None:
        """Check what was added with checked=False.

        Raises: NonFiniteError: some row held NaN or infinity; these moments are then lost.
        """
        _check(self._mean, self._scatter.diagonal())

    def merge(self, other: Moments) -> None:
        """Add the rows that `other` has seen, on this object's device.

        Raises: ShapeError: the numbers of channels differ.
        """
        if other.num_channels != self.num_channels:
            raise ShapeError(f"Moments.merge: {other.num_channels} channels into {self.num_channels}.")
        if other.num_rows == 0:
            return
        if self.num_rows == 0:
            self._move(other.device)
        total = self.num_rows + other.num_rows
        step = other._mean.to(self.device) - self._mean
        if self.num_rows == 0 or other._scatter.dtype == torch.float64:
            self._scatter = self._scatter.to(dtype=other._scatter.dtype)
        self._scatter.add(other._scatter)
        link = (step * (self.num_rows * other.num_rows / total) ** 0.5)[None]
        self._add_root(None if other._root is None else torch.cat([other._root.to(self.device), link]))
        self._scatter.add_outer(step, self.num_rows * other.num_rows / total)
        self._mean.add_(step, alpha=other.num_rows / total)
        self.exact = self.exact and other.exact
        self.num_rows = total
        self.num_examples += other.num_examples

    @property
    def resolution(self) -> float:
        """Variance, relative to a channel's own, below which these moments are round-off: 4 float32 eps, or C eps."""
        if self.exact:
            return self.num_channels * torch.finfo(torch.float64).eps
        return 4.0 * torch.finfo(torch.float32).eps

    def covariance(self) -> Tensor:
        """Return E[(z - μ)(z - μ)ᵀ] of the sample, divided by the number of rows: (channels, channels); a copy."""
        self._need_rows()
        return self._scatter.full(1.0 / self.num_rows)

    def covariances(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the covariance of some channels with others, (rows, columns) float64; a copy."""
        self._need_rows()
        return self._scatter.block(rows, columns, 1.0 / self.num_rows)

    def variances(self) -> Tensor:
        """Return the diagonal of the covariance, (channels,) float64; a copy."""
        self._need_rows()
        return self._scatter.diagonal().double() / self.num_rows

    def energies(self, weight_OC: Tensor) -> Tensor:
        """Return the diagonal of W Σ Wᵀ, Σ the covariance: (out,) float64, from products in the type of W.

        No more is written out than what a few hundred outputs need.
        """
        self._need_rows()
        found = torch.zeros(len(weight_OC), dtype=torch.float64, device=self.device)
        for start in range(0, len(weight_OC), _ROWS):
            weight = weight_OC[start : start + _ROWS].to(self.device)
            with true_float32(self.device):
                products = self._scatter.products(weight).mul_(weight)
            found[start : start + _ROWS] = products.sum(1, dtype=torch.float64)
        return found / self.num_rows

    def root(self) -> Tensor | None:
        """Return F (at most channels, channels) with FᵀF = covariance, or None unless all rows were float64 and exact.

        Made from the rows by orthogonal steps: it knows each channel to round-off of its rms, where the covariance
        knows variances to round-off, the rms to the root of that.
        """
        self._need_rows()
        return None if self._root is None else self._root / self.num_rows**0.5

    def second_moment(self) -> Tensor:
        """Return the uncentred second moment E[z zᵀ] of the sample: (channels, channels)."""
        return self.covariance().addr_(self._mean, self._mean)

    def without_dropout(self, p: float) -> Moments:
        """Undo what dropout does to the moments: as observed before an elementwise dropout of probability p.

        Dropout scales what survives by 1/(1-p): means and off-diagonals of the second moment stay (in expectation),
        the diagonal grows by 1/(1-p). Only the expectation is restored: a variance that comes out below zero is cut
        there, and the matrix need not be positive semidefinite. Good for energies and single variances; never fit a
        mix to it, which amplifies what is left of the masks on the off-diagonals.

        Raises: ArgumentError: p is not in [0, 1).
        """
        if not 0.0 <= p < 1.0:
            raise ArgumentError(f"Moments.without_dropout: p is {p}; it must lie in [0, 1).")
        out = self.copy()
        square = self._mean.square() * self.num_rows
        out._root = None
        diagonal = out._scatter.diagonal().double()
        out._scatter.set_diagonal(((diagonal + square) * (1.0 - p) - square).clamp_min_(0.0))
        return out

    def select(self, index: Tensor) -> Moments:
        """Return the moments of the channels `index` (kept,) alone, in that order.

        Raises: ArgumentError: index is empty.
        """
        index = index.to(self.device)
        if index.numel() == 0:
            raise ArgumentError("Moments.select: no channel is named.")
        scatter = Triangle.of(self._scatter.block(index, index), dtype=self._scatter.dtype)
        return self._alike(self._mean[index], scatter, None if self._root is None else self._root[:, index])

    def copy(self) -> Moments:
        """Return the same moments, to be updated apart from these."""
        return self._alike(self._mean.clone(), self._scatter.copy(), self._root)  # the root is never written to

    def in_float64(self) -> Moments:
        """Return a copy that sums in float64 from now on."""
        out = self.copy()
        out._scatter = out._scatter.to(dtype=torch.float64)
        return out

    def _alike(self, mean_C: Tensor, scatter_CC: Triangle, root_KC: Tensor | None) -> Moments:
        return self._made(mean_C, scatter_CC, self.num_rows, self.num_examples, self.exact, root_KC)

    @classmethod
    def _made(
        cls, mean: Tensor, scatter: Triangle, num_rows: int, num_examples: int, exact: bool, root: Tensor | None = None
    ) -> Moments:
        out = cls(mean.numel(), device=mean.device)
        out._mean, out._scatter, out._root = mean, scatter, root
        out.num_rows, out.num_examples, out.exact = num_rows, num_examples, exact
        return out

    def counted(self, num_rows: int, num_examples: int) -> Moments:
        """Return the same mean, covariance and root as of other numbers of rows and examples."""
        out = self.copy()
        share = num_rows / self.num_rows
        out.num_rows, out.num_examples = num_rows, num_examples
        out._scatter.scale(share)
        out._root = None if out._root is None else out._root * share**0.5
        return out

    @classmethod
    def of_second_moment(cls, matrix_CC: Tensor, *, num_rows: int, exact: bool) -> Moments:
        """Return moments of mean zero with a given second moment.

        Args:
            matrix_CC: (channels, channels), symmetric positive semidefinite.
            num_rows: from which it was estimated.
            exact: whether its products were in float64.
        """
        scatter = Triangle.of(matrix_CC, dtype=torch.float64)
        scatter.scale(num_rows)
        return cls._made(matrix_CC.new_zeros(len(matrix_CC), dtype=torch.float64), scatter, num_rows, num_rows, exact)

    @classmethod
    def of(cls, mean_C: Tensor, scatter_CC: Tensor, num_rows: int, num_examples: int, *, exact: bool) -> Moments:
        """Return moments of known sums: the mean and the scatter around it, float64 (channels, channels)."""
        return cls._made(mean_C, Triangle.of(scatter_CC), num_rows, num_examples, exact)

    def set_root(self, rows_NC: Tensor | None) -> None:
        """Set the root of the scatter: centred rows F with FᵀF = scatter, more exact than it; None: not known."""
        self._root = None if rows_NC is None else rows_NC.new_zeros(0, self.num_channels)
        self._add_root(rows_NC)

    def root_around(self, centre_C: Tensor) -> Tensor | None:
        """Return F with FᵀF = scatter_around(centre), (at most channels + 1, channels); None as for `root`."""
        if self._root is None:
            return None
        link = (self._mean - centre_C.to(self._mean)) * float(self.num_rows) ** 0.5
        return torch.cat([self._root, link[None]])

    def scatter_around(self, centre_C: Tensor) -> Tensor:
        """Return Σ (z - c)(z - c)ᵀ over the rows, (channels, channels) float64."""
        if self.num_rows == 0:
            return torch.zeros(self.num_channels, self.num_channels, dtype=torch.float64, device=self.device)
        step = self._mean - centre_C.to(self._mean)
        return self._scatter.full().addr_(step, step, alpha=float(self.num_rows))

    def state_dict(self) -> dict[str, Tensor]:
        """Return counts, mean (channels,) and scatter (channels, channels): copies, ready for safetensors."""
        return {
            "num_rows": torch.tensor(self.num_rows, dtype=torch.int64, device="cpu"),
            "num_examples": torch.tensor(self.num_examples, dtype=torch.int64, device="cpu"),
            "exact": torch.tensor(self.exact, dtype=torch.bool, device="cpu"),
            "mean": self._mean.clone(),
            "scatter": self._scatter.full(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state written by `state_dict`, on this object's device.

        Raises:
            ArgumentError: a key is missing or unknown.
            ShapeError: the state is of another number of channels.
            NonFiniteError: the state holds NaN or infinity.
        """
        if set(state) != set(_STATE_KEYS):
            raise ArgumentError(f"Moments.load_state_dict: keys {sorted(state)}, expected {sorted(_STATE_KEYS)}.")
        mean, scatter = state["mean"], state["scatter"]
        if mean.shape != (self.num_channels,) or scatter.shape != (self.num_channels, self.num_channels):
            raise ShapeError(f"Moments.load_state_dict: state of {tuple(mean.shape)}, expected ({self.num_channels},).")
        if not bool(torch.isfinite(mean).all() and torch.isfinite(scatter).all()):
            raise NonFiniteError("Moments.load_state_dict: the state holds NaN or infinity.")
        self._mean = mean.to(self.device, torch.float64, copy=True)
        self.num_rows, self.num_examples = int(state["num_rows"]), int(state["num_examples"])
        self.exact = bool(state["exact"])
        own = scatter.to(self.device)
        single = not self.exact and torch.equal(own.float().double(), own.double())  # as it was before it was written
        self._scatter = Triangle.of(own, dtype=torch.float32 if single else torch.float64)
        self._root = None if self.num_rows else scatter.new_zeros(0, self.num_channels).to(self.device, torch.float64)

    def _add_root(self, rows_NC: Tensor | None) -> None:
        """Add centred rows to the root; None: rows that are rounded more coarsely, after which no root is known."""
        if self._root is None or rows_NC is None:
            self._root = None
            return
        stacked = torch.cat([self._root, rows_NC])
        self._root = stacked if len(stacked) <= self.num_channels else torch.linalg.qr(stacked, mode="r").R

    def _move(self, device: torch.device) -> None:
        self._mean, self._scatter = self._mean.to(device), self._scatter.to(device=device)
        self._root = None if self._root is None else self._root.to(device)

    def _need_rows(self) -> None:
        if self.num_rows == 0:
            raise ArgumentError("Moments: no rows have been added yet; there is no covariance of nothing.")

    def __repr__(self) -> str:
        return f"Moments({self.num_channels} channels, {self.num_rows} rows, {self.num_examples} examples)"


def _check(mean_C: Tensor, squares_C: Tensor, where: str = "") -> None:
    if not bool(torch.isfinite(mean_C.sum() + squares_C.sum(dtype=torch.float64))):
        raise NonFiniteError(
            f"the rows hold NaN or infinity (or overflow when squared){where}. Leave out steps that the gradient "
            "scaler skips, or lower the learning rate."
        )


def _mean(rows_NC: Tensor) -> Tensor:
    """Return the mean row in float64; on the CPU a few rows at a time, as torch would make a float64 copy of them."""
    if rows_NC.device.type != "cpu" or rows_NC.dtype == torch.float64 or len(rows_NC) <= _ROWS:
        return rows_NC.mean(0, dtype=torch.float64)
    total = torch.zeros(rows_NC.shape[1], dtype=torch.float64, device="cpu")
    for start in range(0, len(rows_NC), _ROWS):
        total += rows_NC[start : start + _ROWS].double().sum(0)
    return total / len(rows_NC)
