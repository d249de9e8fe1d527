"""Factorisations of Gram matrices, the orders of channels that they give, and how exactly products are taken.

Holds: pivoted and ordered Cholesky, pivoted QR of a root, forward selection, `true_float32`. Elsewhere: where moments
come from (moments.py), least squares and errors (decompose.py). All of it is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import lapack, qr, solve_triangular
from threadpoolctl import ThreadpoolController
from torch import Tensor

from apoptosis.errors import NonFiniteError, ShapeError

FloatArray = npt.NDArray[np.float64]
EPS = float(np.finfo(np.float64).eps)
TINY = 1e-150  # rms below which a channel counts as silent: its square is hardly a number any more
_COLUMNS = 64  # of a matrix that are looked at at once
_REFRESH = 64  # steps after which the running gains of a selection are computed afresh: their round-off adds up


def one_thread() -> AbstractContextManager[object]:
    """Let scipy's BLAS work on one thread.

    Its waiting threads and torch's would fight for the same cores: with both at work, the products after a
    factorisation ran ten times slower on two cores than with one thread here.
    """
    limited: AbstractContextManager[object] = _controller().limit(limits=1, user_api="blas")
    return limited


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def true_float32(device: torch.device) -> Iterator[None]:
    """Matrix products in full float32 or float64: no autocast, no TF32 or bfloat16 shortcuts, user's flags restored.

    A product rounded to ten bits would put a floor of about 1e-3 under every relative residual.
    """
    read, write, exact = _float32_switch(device)
    before = read()
    shortcut = before not in ("ieee", "none", "highest", False)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            if shortcut:
                write(exact)
            yield
        finally:
            if shortcut:
                write(before)


def _float32_switch(device: torch.device) -> tuple[Callable[[], object], Callable[[Any], None], object]:
    """Return how to read and to set the precision of float32 products on a device, and its exact setting.

    Torch before 2.9 has no switch of its own for the CPU: there the one for the whole process decides.
    """
    backends: Any = torch.backends
    backend = backends.cuda.matmul if device.type == "cuda" else getattr(backends.mkldnn, "matmul", None)
    if backend is None:
        return torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"
    name, exact = ("fp32_precision", "ieee") if hasattr(backend, "fp32_precision") else ("allow_tf32", False)
    return partial(getattr, backend, name, exact), partial(setattr, backend, name), exact


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factor:
    """G ~= factor @ factorᵀ, built one channel at a time.

    order: (channels,) int64, all channels, best to keep first; the first `rank` are the pivots.
    lower: (channels, rank) float64, lower triangular: the factor, its rows in that order.
    """

    order: Tensor
    lower: Tensor
    rank: int

    @property
    def factor(self) -> Tensor:
        """Return (channels, rank) float64, rows in the order of the channels.

        Column i is what pivot i explains of every channel beyond the pivots before it, so the remainder after k pivots
        is factor[:, k:] @ factor[:, k:]ᵀ.
        """
        out = torch.empty_like(self.lower)
        out[self.order] = self.lower
        return out


def roundoff_floor(num_channels: int) -> float:
    """Return the relative rms that stands for tolerance 0: what float64 cannot distinguish from zero.

    The residual R = G_RR - G_RK G_KK⁻¹ G_KR is a difference of sums of C products, each rounded to eps = 2.2e-16, so
    tr(W R Wᵀ) is known up to a small multiple of C eps tr(W G Wᵀ): relative rms sqrt(8 C eps), 1.3e-6 for 1024
    channels. Moments must have been taken with exact=True to mean anything at this level.

    Example:
        >>> roundoff_floor(1024) < 1.5e-6
        True
    """
    return math.sqrt(8.0 * num_channels * EPS)


def pivoted_cholesky(
    gram_CC: Tensor,
    *,
    weights_C: Tensor | None = None,
    overwrite: bool = False,
) -> Factor:
    """Order the channels by one pivoted Cholesky factorisation (LAPACK dpstrf, C³/3 multiply-adds).

    Every step takes the channel with the largest weighted remainder weights_C² * diag(S). A positive diagonal scaling
    commutes with Schur complements, so the factor returned is that of G itself, for any weights.

    Args:
        gram_CC: (channels, channels), symmetric positive semidefinite.
        weights_C: (channels,) non-negative, for instance the norms of the consumer's columns; a channel of weight
            zero has no reader and comes last. None: ones.
        overwrite: let the factor take the memory of gram_CC, where that is a float64 matrix on the CPU.

    Raises:
        ShapeError: gram_CC is not square or weights_C does not fit.
        NonFiniteError: an argument holds NaN or infinity.

    References: Higham, "Analysis of the Cholesky decomposition of a semi-definite matrix" (1990); LAPACK Working
        Note 161.
    """
    gram = _square(gram_CC, "pivoted_cholesky")
    num = gram.shape[0]
    weights = np.ones(num) if weights_C is None else _array(weights_C, "pivoted_cholesky")
    if weights.shape != (num,):
        raise ShapeError(f"pivoted_cholesky: {weights.shape[0]} weights for {num} channels.")
    scaled = gram if overwrite and gram.flags.c_contiguous else gram.copy()
    scaled *= weights[:, None]
    scaled *= weights
    largest = float(scaled.diagonal().max())
    if largest <= 0.0:
        return Factor(
            order=torch.arange(num, device="cpu"),
            lower=torch.zeros(num, 0, dtype=torch.float64, device="cpu"),
            rank=0,
        )
    # A symmetric C-ordered array is its own Fortran-ordered transpose: LAPACK works in place, nothing is copied.
    with one_thread():
        packed, pivots, rank, _ = lapack.dpstrf(scaled.T, tol=num * EPS * largest, lower=1, overwrite_a=1)
    order = pivots.astype(np.int64) - 1
    lower = torch.from_numpy(packed)[:, :rank].tril_().numpy()
    kept = weights[order]
    lower *= np.divide(1.0, kept, out=np.zeros(num), where=kept > 0)[:, None]
    return Factor(order=torch.from_numpy(order), lower=torch.from_numpy(lower), rank=int(rank))


def ordered_cholesky(gram_CC: Tensor, order: Tensor) -> Factor:
    """Factorise G in a given order of the channels, to read off the error curve of an order chosen elsewhere.

    G is replaced by G + ε diag(G), ε = channels * eps. Schur complements grow with their matrix, so the curve read from
    the factor never lies below the one of G, and above it by O(ε). Channels of which less than round-off remains once
    others are known explain nothing themselves: any remainder there would be divided by the root of round-off.

    Raises: ShapeError, NonFiniteError: as in pivoted_cholesky.
    """
    gram = _square(gram_CC, "ordered_cholesky")
    num = gram.shape[0]
    index = order.cpu().numpy()
    unit = gram[index][:, index]
    scale = np.sqrt(unit.diagonal().clip(min=0.0))
    inverse = np.divide(1.0, scale, out=np.zeros(num), where=scale > TINY)
    unit *= inverse[:, None]
    unit *= inverse
    np.clip(unit, -1.0, 1.0, out=unit)  # so that some ridge below C will do
    np.fill_diagonal(unit, 1.0 + num * EPS)
    lower = _semidefinite(unit, num * EPS)
    lower *= scale[:, None]
    return Factor(order=order.cpu().clone(), lower=torch.from_numpy(lower), rank=num)


def _semidefinite(unit: FloatArray, ridge: float) -> FloatArray:
    """Factorise a matrix of unit diagonal that may be singular up to round-off; overwrites it.

    Where LAPACK meets a pivot that is not positive, what remains of the matrix is taken on without the channels whose
    remainder is round-off by then; these keep a remainder of `ridge` or their own, on the diagonal alone.
    """
    num = unit.shape[0]
    out, open_ = np.zeros((num, num)), np.arange(num)
    rest = unit
    while open_.size:
        with one_thread():
            lower, info = lapack.dpotrf(rest.T, lower=1, clean=1)
            done = open_.size if info == 0 else int(info) - 1
            if done == num:
                return np.asarray(lower)
            out[np.ix_(open_[:done], open_[:done])] = lower[:done, :done]
            if done == open_.size:
                break
            below = solve_triangular(lower[:done, :done], rest[:done, done:], lower=True).T
            rest = rest[done:, done:] - below @ below.T
        out[np.ix_(open_[done:], open_[:done])] = below
        open_ = open_[done:]
        left = rest.diagonal()
        null = left <= 10.0 * ridge
        null[0] = True  # LAPACK would not take it
        out[open_[null], open_[null]] = np.sqrt(np.maximum(left[null], ridge))
        open_, rest = open_[~null], rest[np.ix_(~null, ~null)]
    return out


def pivoted_qr(root_NC: Tensor, weights_C: Tensor) -> Factor:
    """Order the channels as pivoted_cholesky does FᵀF, by a QR factorisation of F with column pivots.

    F knows a remainder to round-off of the rms, where FᵀF knows it to round-off of the variance: a signal of 1e-8 is
    lost there.

    Args:
        root_NC: F, (rows, channels).
        weights_C: (channels,) non-negative, as in pivoted_cholesky.

    Raises: NonFiniteError: an argument holds NaN or infinity.

    References: Golub, Van Loan, "Matrix Computations", 5.4.2.
    """
    root, weights = root_NC.detach().cpu().double(), weights_C.detach().cpu().double()
    if not bool(torch.isfinite(root).all() and torch.isfinite(weights).all()):
        raise NonFiniteError("pivoted_qr: an argument holds NaN or infinity.")
    upper, pivots = qr((root * weights).numpy(), mode="r", pivoting=True)
    upper = upper[: min(upper.shape)]
    sizes = np.abs(upper.diagonal())
    rank = int((sizes > len(pivots) * EPS * sizes.max(initial=0.0)).sum())
    upper, order = upper[:rank], torch.from_numpy(pivots.astype(np.int64))
    kept = weights[order]
    lower = torch.from_numpy(upper.T.copy()) * torch.where(kept > 0, 1.0 / kept, 0.0)[:, None]
    return Factor(order=order, lower=lower, rank=rank)


def greedy_order(gram_CC: Tensor, weight_OC: Tensor) -> Tensor:
    """Order the channels so that each next one lowers tr(W S Wᵀ) most, S the least-squares remainder.

    With S after the channels chosen so far, taking j lowers the error by ‖W s_j‖² / S_jj. Only L (chosen columns) and
    V = W L are kept: S itself is never written out, and one step costs a few products with C and O numbers, C² (O + C)
    multiply-adds for the whole order. Dearer than pivoted_cholesky, which does the same in one LAPACK call with
    diagonal weights; it sees how the consumer's columns overlap.

    Args:
        gram_CC: (channels, channels), symmetric positive semidefinite.
        weight_OC: (out, channels); stack several consumers along `out`, each divided by the rms of its output.

    Returns: (channels,) int64, best to keep first; channels beyond the numerical rank last, in their own order.

    Raises:
        ShapeError: the shapes do not fit together.
        NonFiniteError: an argument holds NaN or infinity.

    References: Chen, Cowan, Grant, "Orthogonal least squares learning algorithm" (1991).
    """
    gram, weight = _array(gram_CC, "greedy_order"), _array(weight_OC, "greedy_order")
    num = gram.shape[0]
    if gram.shape != (num, num) or weight.ndim != 2 or weight.shape[1] != num:
        raise ShapeError(f"greedy_order: gram {gram.shape} and weight {weight.shape} do not fit.")
    if weight.shape[0] > num:  # only WᵀW matters: a triangular factor has the same with C rows
        weight = np.asarray(np.linalg.qr(weight, mode="r"))
    seen = weight @ gram  # W S for the empty choice
    columns, images = np.zeros((num, num)), np.zeros((num, weight.shape[0]))
    left = gram.diagonal().copy()
    floor = num * EPS * max(float(left.max()), 0.0)
    gains = np.square(seen).sum(0)
    open_, chosen = np.ones(num, dtype=bool), []
    for step in range(num):
        usable = open_ & (left > floor)
        if not usable.any():
            break
        score = np.where(usable, gains / np.where(usable, left, 1.0), -1.0)
        best = int(score.argmax())
        past, image = columns[:step], images[:step]
        column = (gram[:, best] - past[:, best] @ past) / np.sqrt(left[best])
        moved = (seen[:, best] - past[:, best] @ image) / np.sqrt(left[best])  # W l
        cross = moved @ seen - (image @ moved) @ past  # (W l)ᵀ W S
        columns[step], images[step] = column, moved
        left = left - np.square(column)
        gains = gains - 2.0 * column * cross + np.square(column) * float(moved @ moved)
        open_[best] = False
        chosen.append(best)
        if step % _REFRESH == _REFRESH - 1:
            gains = np.square(seen - images[: step + 1].T @ columns[: step + 1]).sum(0)
    rest = np.flatnonzero(open_)
    return torch.from_numpy(np.concatenate([np.array(chosen, dtype=np.int64), rest]).astype(np.int64))


def _array(tensor: Tensor, who: str) -> FloatArray:
    array: FloatArray = tensor.detach().to("cpu", torch.float64).numpy()
    if not all(np.isfinite(array[start : start + _COLUMNS]).all() for start in range(0, len(array), _COLUMNS)):
        raise NonFiniteError(f"{who}: an argument holds NaN or infinity.")
    return array


def _square(gram_CC: Tensor, who: str) -> FloatArray:
    if gram_CC.ndim != 2 or gram_CC.shape[0] != gram_CC.shape[1]:
        raise ShapeError(f"{who}: Gram matrix of shape {tuple(gram_CC.shape)}, expected (channels, channels).")
    return _array(gram_CC, who)
