"""Which channels to keep, how the kept ones stand in for the rest, and what that costs a consumer.

Holds: pivoted Cholesky, least-squares mixing, the joint residual and its error curve.
Elsewhere: where the moments come from, tolerances, groups of sites (criteria.py), the fold (surgery).
All of it is float64, but for a curve that may be asked for in float32. G is a Gram matrix over channels: the covariance
where an offset can be folded, else the uncentred second moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import lapack, solve_triangular
from torch import Tensor

from apoptosis.errors import ArgumentError, NonFiniteError, ShapeError
from apoptosis.numerics.blas import one_thread

FloatArray = npt.NDArray[np.float64]
Blocks = Callable[[Tensor, Tensor], Tensor]  # rows, columns -> that block of a symmetric matrix, a new tensor
EPS = float(np.finfo(np.float64).eps)
_TINY = 1e-150  # rms below which a channel counts as silent: its square is hardly a number any more
_BLOCK = 128  # columns of a triangular factor that are multiplied at once
_COLUMNS = 64  # of a matrix that are looked at at once
_OUTPUTS = 256  # rows of a weight that are taken to the type of a product at once


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factor:
    """G ~= factor @ factorᵀ, built one channel at a time.

    order: (channels,) int64, all channels, best to keep first; the first `rank` are the pivots.
    lower: (channels, rank) float64, lower triangular: the factor, its rows in that order.
    remainder_trace: (rank + 1,) trace of that remainder for k = 0 .. rank, in the weights the order was chosen with.
    """

    order: Tensor
    lower: Tensor
    rank: int
    remainder_trace: Tensor

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
    """Return the relative rms that stands for tolerance 0: what float64 cannot tell from zero.

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
    relative_tolerance: float | None = None,
    overwrite: bool = False,
) -> Factor:
    """Order the channels by one pivoted Cholesky factorisation (LAPACK dpstrf, C³/3 multiply-adds).

    Every step takes the channel with the largest weighted remainder weights_C² * diag(S). A positive diagonal scaling
    commutes with Schur complements, so the factor returned is that of G itself, for any weights.

    Args:
        gram_CC: (channels, channels), symmetric positive semidefinite.
        weights_C: (channels,) non-negative, for instance the norms of the consumer's columns; a channel of weight
            zero is read by nobody and comes last. None: ones.
        relative_tolerance: stop where the largest weighted remainder falls below this share of the largest weighted
            diagonal; None: channels * eps.
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
        empty = torch.zeros(num, 0, dtype=torch.float64, device="cpu")
        return Factor(
            order=torch.arange(num, device="cpu"),
            lower=empty,
            rank=0,
            remainder_trace=torch.zeros(1, dtype=torch.float64, device="cpu"),
        )
    tolerance = (num * EPS if relative_tolerance is None else relative_tolerance) * largest
    # A symmetric C-ordered array is its own Fortran-ordered transpose: LAPACK works in place, nothing is copied.
    with one_thread():
        packed, pivots, rank, _ = lapack.dpstrf(scaled.T, tol=tolerance, lower=1, overwrite_a=1)
    order = pivots.astype(np.int64) - 1
    lower = torch.from_numpy(packed)[:, :rank].tril_().numpy()
    remainder = _tails(np.einsum("ij,ij->j", lower, lower))
    kept = weights[order]
    lower *= np.divide(1.0, kept, out=np.zeros(num), where=kept > 0)[:, None]
    return Factor(
        order=torch.from_numpy(order),
        lower=torch.from_numpy(lower),
        rank=int(rank),
        remainder_trace=torch.from_numpy(remainder),
    )


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
    inverse = np.divide(1.0, scale, out=np.zeros(num), where=scale > _TINY)
    unit *= inverse[:, None]
    unit *= inverse
    np.clip(unit, -1.0, 1.0, out=unit)  # so that some ridge below C will do
    np.fill_diagonal(unit, 1.0 + num * EPS)
    lower = _semidefinite(unit, num * EPS)
    lower *= scale[:, None]
    remainder = torch.from_numpy(_tails(np.einsum("ij,ij->j", lower, lower)))
    return Factor(order=order.cpu().clone(), lower=torch.from_numpy(lower), rank=num, remainder_trace=remainder)


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


def joint_error_curve(weight_OC: Tensor, factor: Factor, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """tr(W S_k Wᵀ) for every number k of kept channels at once, S_k the least-squares remainder after k pivots.

    With G = F Fᵀ in pivot order, S_k = Σ_{i >= k} f_i f_iᵀ, so the joint error is Σ_{i >= k} ‖W f_i‖²: one product
    W F and a cumulative sum, exact for everything removed together (docs/theory.md, "Error curve"). F is triangular in
    pivot order: columns are multiplied a block at a time, without the rows that are zero in all of them.

    Args:
        weight_OC: (out, channels).
        factor: of the Gram matrix at this site.
        dtype: of the product; float32 halves its cost and moves the curve by about 1e-6 of its value (nothing
            cancels in a sum of squares).

    Returns: (channels + 1,) float64, never rising; zero beyond the factor's rank.

    Raises: ShapeError: the numbers of channels differ.
    """
    num = factor.order.numel()
    if weight_OC.ndim != 2 or weight_OC.shape[1] != num:
        raise ShapeError(f"joint_error_curve: weight of shape {tuple(weight_OC.shape)} for {num} channels.")
    columns = torch.zeros(factor.rank, dtype=torch.float64, device="cpu")
    squared = (
        weight_OC.shape[0] > num and dtype == torch.float64
    )  # ‖W f‖² = fᵀ WᵀW f: cheaper for many outputs, cancels
    if squared:
        weight = weight_OC.detach().to("cpu", dtype).index_select(1, factor.order)
        weight = weight.T @ weight
        for start in range(0, factor.rank, _BLOCK):
            block = factor.lower[start:, start : start + _BLOCK]
            found = (weight[start:, start:] @ block).mul_(block).sum(0).clamp_min_(0.0)
            columns[start : start + _BLOCK] = found
    else:
        for first in range(0, weight_OC.shape[0], _OUTPUTS):
            weight = weight_OC[first : first + _OUTPUTS].detach().to("cpu", dtype).index_select(1, factor.order)
            for start in range(0, factor.rank, _BLOCK):
                block = factor.lower[start:, start : start + _BLOCK].to(dtype)
                columns[start : start + _BLOCK] += (weight[:, start:] @ block).square_().sum(0, dtype=torch.float64)
            del weight  # before the next ones
    curve = torch.zeros(num + 1, dtype=torch.float64, device="cpu")
    curve[: factor.rank + 1] = torch.from_numpy(_tails(columns.numpy()))
    return curve


def solve_mix(
    gram_CC: Tensor, keep_K: Tensor, *, mean_C: Tensor | None = None, ridge: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """Least squares: the best linear stand-in for every channel from the kept ones.

    mix_K,R = G_KK⁻¹ G_KR by Cholesky on the matrix scaled to unit diagonal, with a ridge; where that fails, by a
    truncated eigendecomposition. Kept columns are exactly the identity.

    Args:
        gram_CC: the covariance when mean_C is given, else the uncentred second moment.
        keep_K: (kept,) int64.
        mean_C: (channels,): also fit an offset μ - mixᵀ μ_K, exactly zero for kept channels.
        ridge: relative to every channel's own variance; give the resolution of the moments, else more kept channels
            than the data have directions turn round-off into large weights. None: channels * eps.

    Returns: mix (kept, channels) and offset (channels,) or None, float64 on the device of gram_CC.

    Raises: ArgumentError: keep_K is empty and there is no mean, repeats, or lies outside the channels.
    """
    gram = gram_CC.double()
    num = gram.shape[0]
    keep = _index(keep_K, num, "solve_mix").to(gram.device)
    removed = complement(keep, num)
    mix = torch.zeros(keep.numel(), num, dtype=torch.float64, device=gram.device)
    if keep.numel() and removed.numel():
        level = num * EPS if ridge is None else ridge
        mix[:, removed] = solve_blocks(lambda rows, columns: gram[rows][:, columns], keep, removed, level)
    mix[torch.arange(keep.numel(), device=gram.device), keep] = 1.0
    if mean_C is None:
        return mix, None
    mean = mean_C.double().to(gram.device)
    offset = mean - mean[keep] @ mix
    offset[keep] = 0.0
    return mix, offset


def residual_gram(
    covariance_CC: Tensor, mean_C: Tensor, keep_K: Tensor, mix_KC: Tensor, offset_C: Tensor | None
) -> Tensor:
    """R = E[(z - ẑ)(z - ẑ)ᵀ] for ẑ = z_K @ mix + offset: exact for any mix and offset, least squares or not.

    With e = z - ẑ: R = Cov(e) + E[e] E[e]ᵀ, and Cov(e) = Σ - Σ_·K M - Mᵀ Σ_K· + Mᵀ Σ_KK M is the symmetric part of
    Σ + Mᵀ (Σ_KK M - 2 Σ_K·): two products.

    Returns: (channels, channels) float64.
    """
    cov, mean, mix = covariance_CC.double(), mean_C.double(), mix_KC.double()
    num = cov.shape[0]
    keep = _index(keep_K, num, "residual_gram").to(cov.device)
    removed = torch.arange(num, device=cov.device)
    if torch.equal(mix[:, keep], torch.eye(keep.numel(), dtype=torch.float64, device=cov.device)):
        removed = complement(keep, num)  # kept channels stand for themselves: only the rest can err
    part, kept = mix[:, removed], cov[keep]
    inner = (kept[:, keep] @ part).sub_(kept[:, removed], alpha=2.0)
    block = cov[removed][:, removed] + part.T @ inner
    block = (block + block.T).mul_(0.5)
    bias = (mean - mean[keep] @ mix)[removed] - (0.0 if offset_C is None else offset_C.double()[removed])
    block += torch.outer(bias, bias)
    out = torch.zeros_like(cov)
    out[removed[:, None], removed[None, :]] = block
    if offset_C is not None and removed.numel() != num and bool(offset_C[keep].any()):
        # An offset on kept channels errs against every channel: fall back to the full mean error.
        full = mean - mean[keep] @ mix - offset_C.double()
        full_removed = torch.zeros_like(full)
        full_removed[removed] = bias
        out += torch.outer(full, full) - torch.outer(full_removed, full_removed)
    return out


def stands_for_itself(mix_KC: Tensor, keep_K: Tensor) -> bool:
    """Whether a mix leaves every kept channel as it is."""
    for start in range(0, keep_K.numel(), _COLUMNS):
        own = mix_KC[:, keep_K[start : start + _COLUMNS]]
        here = torch.arange(own.shape[1], device=own.device)
        if not bool((own[here + start, here] == 1.0).all()) or int(own.count_nonzero()) != own.shape[1]:
            return False
    return True


def site_diag(weight_OC: Tensor, residual_CC: Tensor) -> Tensor:
    """diag(W R Wᵀ): the mean squared error of every output, (out,) float64, never below zero."""
    weight = weight_OC.detach().to(residual_CC.device, torch.float64)
    if weight.ndim != 2 or weight.shape[1] != residual_CC.shape[0]:
        raise ShapeError(f"site_diag: weight of shape {tuple(weight.shape)} for {residual_CC.shape[0]} channels.")
    return ((weight @ residual_CC) * weight).sum(1).clamp_min_(0.0)


def complement(keep: Tensor, num_channels: int) -> Tensor:
    """Return the channels not in `keep`, sorted, (removed,) int64."""
    mask = torch.ones(num_channels, dtype=torch.bool, device=keep.device)
    mask[keep] = False
    return mask.nonzero().flatten()


def solve_blocks(block: Blocks, keep_K: Tensor, removed_R: Tensor, ridge: float) -> Tensor:
    """Return G_KK⁻¹ G_KR, (kept, removed) float64, from blocks of G that are written out one after the other.

    Solved on the unit-diagonal scale, in place; channels of zero energy get coefficient zero.

    Args:
        block: gives G at some rows and columns as a new float64 tensor.
        keep_K: (kept,) int64.
        removed_R: (removed,) int64.
        ridge: as in solve_mix, a number.
    """
    unit, inverse = _unit(block, keep_K, ridge)
    # LAPACK reads columns: a symmetric matrix is its own transpose, and the right side is asked for as one.
    solved = block(removed_R, keep_K).mul_(inverse).T
    lower, info = unit.mT, torch.zeros((), dtype=torch.int32, device=unit.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    if int(info) == 0:
        torch.linalg.solve_triangular(lower, solved, upper=False, out=solved)
        torch.linalg.solve_triangular(lower.mT, solved, upper=True, out=solved)
        return solved.mul_(inverse[:, None])
    unit, _ = _unit(block, keep_K, ridge)
    values, vectors = torch.linalg.eigh(unit)
    usable = values > 2.0 * ridge
    basis = vectors[:, usable]
    found: Tensor = basis @ ((basis.T @ solved) / values[usable, None])
    return found * inverse[:, None]


def _unit(block: Blocks, keep_K: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return G_KK scaled to unit diagonal, with a ridge, and what its rows and columns were multiplied by."""
    matrix = block(keep_K, keep_K)
    scale = matrix.diagonal().clamp_min(0.0).sqrt()
    inverse = torch.where(scale > _TINY, 1.0 / scale.clamp_min(_TINY), 0.0)
    matrix.mul_(inverse[:, None]).mul_(inverse)
    matrix.diagonal().fill_(1.0 + ridge)
    return matrix, inverse


def _tails(values: FloatArray) -> FloatArray:
    """Sum values[k:] for k = 0 .. n, from the small end so that the tail keeps its digits."""
    return np.concatenate([np.cumsum(values[::-1])[::-1], [0.0]])


def _array(tensor: Tensor, who: str) -> FloatArray:
    array: FloatArray = tensor.detach().to("cpu", torch.float64).numpy()
    if not all(np.isfinite(array[start : start + _COLUMNS]).all() for start in range(0, len(array), _COLUMNS)):
        raise NonFiniteError(f"{who}: an argument holds NaN or infinity.")
    return array


def _square(gram_CC: Tensor, who: str) -> FloatArray:
    if gram_CC.ndim != 2 or gram_CC.shape[0] != gram_CC.shape[1]:
        raise ShapeError(f"{who}: Gram matrix of shape {tuple(gram_CC.shape)}, expected (channels, channels).")
    return _array(gram_CC, who)


def _index(keep: Tensor, num: int, who: str) -> Tensor:
    if keep.ndim != 1 or (keep.numel() and (int(keep.min()) < 0 or int(keep.max()) >= num)):
        raise ArgumentError(f"{who}: keep must list channels between 0 and {num - 1}.")
    if torch.unique(keep).numel() != keep.numel():
        raise ArgumentError(f"{who}: keep names a channel twice.")
    return keep
