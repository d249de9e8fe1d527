"""How kept channels stand in for the rest, and what that costs a consumer.

Holds: least-squares mixing, the error curve of an order. Elsewhere: orders and factorisations (linalg.py), where the
moments come from, tolerances (criteria), the fold (surgery).
All of it is float64, but for a curve that may be asked for in float32. G is a Gram matrix over channels: the covariance
where an offset can be folded, else the uncentred second moment.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import lstsq
from torch import Tensor

from apoptosis.errors import ShapeError
from apoptosis.numerics.linalg import EPS, TINY, Factor

Blocks = Callable[[Tensor, Tensor], Tensor]  # rows, columns -> that block of a symmetric matrix, a new tensor
_BLOCK = 128  # columns of a triangular factor that are multiplied at once
_COLUMNS = 64  # of a matrix that are looked at at once
_OUTPUTS = 256  # rows of a weight that are taken to the type of a product at once


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
    curve = torch.zeros(num + 1, dtype=torch.float64, device="cpu")  # summed from the small end: it keeps its digits
    curve[: factor.rank] = torch.from_numpy(np.cumsum(columns.numpy()[::-1])[::-1].copy())
    return curve


def solve_mix(block: Blocks, keep_K: Tensor, num_channels: int, ridge: float | None = None) -> Tensor:
    """Least squares: the best linear stand-in for every channel from the kept ones.

    mix_K,R = G_KK⁻¹ G_KR by Cholesky on the matrix scaled to unit diagonal, with a ridge; where that fails, by a
    truncated eigendecomposition. Kept columns are exactly the identity.

    Args:
        block: gives G at some rows and columns as a new float64 tensor.
        keep_K: (kept,) int64, on the device of G.
        num_channels: rows of G.
        ridge: relative to every channel's own variance; give the resolution of the moments, else more kept channels
            than the data have directions turn round-off into large weights. None: channels * eps.

    Returns: (kept, channels) float64.
    """
    level = num_channels * EPS if ridge is None else ridge
    return _mix(keep_K, num_channels, lambda removed: _solve_blocks(block, keep_K, removed, level))


def solve_mix_of_root(root_NC: Tensor, keep_K: Tensor) -> Tensor:
    """Return the mix (kept, channels) of solve_mix for G = FᵀF, from F: kept columns are exactly the identity.

    Kept channels that depend on one another to round-off share the work (least norm on the scale of unit columns).
    """
    keep = keep_K.to(root_NC.device)

    def solve(removed: Tensor) -> Tensor:
        left = root_NC[:, keep]
        size = left.norm(dim=0)
        inverse = torch.where(size > 0, 1.0 / size, 0.0)
        columns, target = (left * inverse).cpu().numpy(), root_NC[:, removed].cpu().numpy()
        solved = lstsq(columns, target, root_NC.shape[1] * EPS, lapack_driver="gelsy")[0]
        return torch.from_numpy(solved).to(root_NC.device) * inverse[:, None]

    return _mix(keep, root_NC.shape[1], solve if root_NC.shape[0] else None)


def _mix(keep_K: Tensor, num: int, solve: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Return a mix, (kept, channels): the identity on kept channels; of the removed ones what `solve` returns."""
    removed = complement(keep_K, num)
    solved = solve(removed) if keep_K.numel() and removed.numel() and solve is not None else None
    mix = torch.zeros(keep_K.numel(), num, dtype=torch.float64, device=keep_K.device)  # once solving needs no memory
    if solved is not None:
        mix[:, removed] = solved
    mix[torch.arange(keep_K.numel(), device=mix.device), keep_K] = 1.0
    return mix


def mean_offset(mean_C: Tensor, keep_K: Tensor, mix_KC: Tensor) -> Tensor:
    """Return the offset that makes a mix exact in the mean, μ - mixᵀ μ_K: (channels,), zero for kept channels."""
    offset = mean_C - mean_C[keep_K] @ mix_KC
    offset[keep_K] = 0.0
    return offset


def stands_for_itself(mix_KC: Tensor, keep_K: Tensor) -> bool:
    """Whether a mix leaves every kept channel as it is."""
    for start in range(0, keep_K.numel(), _COLUMNS):
        own = mix_KC[:, keep_K[start : start + _COLUMNS]]
        here = torch.arange(own.shape[1], device=own.device)
        if not bool((own[here + start, here] == 1.0).all()) or int(own.count_nonzero()) != own.shape[1]:
            return False
    return True


def complement(keep: Tensor, num_channels: int) -> Tensor:
    """Return the channels not in `keep`, sorted, (removed,) int64."""
    mask = torch.ones(num_channels, dtype=torch.bool, device=keep.device)
    mask[keep] = False
    return mask.nonzero().flatten()


def _solve_blocks(block: Blocks, keep_K: Tensor, removed_R: Tensor, ridge: float) -> Tensor:
    """Return G_KK⁻¹ G_KR, (kept, removed) float64, from blocks of G that are written out one after the other.

    Solved on the unit-diagonal scale, in place; channels of zero energy get coefficient zero.
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
    inverse = torch.where(scale > TINY, 1.0 / scale.clamp_min(TINY), 0.0)
    matrix.mul_(inverse[:, None]).mul_(inverse)
    matrix.diagonal().fill_(1.0 + ridge)
    return matrix, inverse
