"""Products of two activations, y = Σ_c l_c r_c in several sums side by side (heads): what a reduction of l costs.

Holds: second moments that are summed over pairs, the error of a product, square roots by blocks.
Elsewhere: rows and where they come from, modules.

Positions come channel by channel: (channels, P), flattened to channels * P, each in one sum. Left and right operands
are taken at independent positions (any query meets any key), so with e = l - l_hat

    E|Σ_c e_c r_c|² = Σ_ij E[e_i e_j] E[r_i r_j]   over pairs i, j of one sum.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from apoptosis.records import IntArray


def blocks_of(sums_CP: IntArray) -> IntArray | None:
    """Label channels that run through the same sums, (channels,); None where their sums overlap only in part.

    Only channels of one label may stand in for one another.

    Example:
        >>> blocks_of(np.array([[0, 1], [0, 1], [2, 3]])).tolist()
        [0, 0, 1]
    """
    kinds, label = np.unique(sums_CP, axis=0, return_inverse=True)
    label_of_sum: dict[int, int] = {}
    for number, kind in enumerate(kinds.tolist()):
        if any(label_of_sum.setdefault(one, number) != number for one in kind):
            return None
    return np.asarray(label.reshape(-1), dtype=np.int64)


def same_sum(sums_CP: IntArray) -> Tensor:
    """Say whether two positions are in one sum, (channels * P, channels * P) bool."""
    flat = torch.from_numpy(sums_CP.reshape(-1))
    return flat[:, None] == flat[None, :]


def pooled(second: Tensor, sums_CP: IntArray) -> Tensor:
    """Average second moments of position p with position p over P, zero between channels of different sums.

    Args:
        second: (channels * P, channels * P) uncentred second moment of one operand.
        sums_CP: (channels, P), the sum that each position is in.

    Returns: (channels, channels) float64.
    """
    num, count = sums_CP.shape
    found = second.reshape(num, count, num, count).diagonal(dim1=1, dim2=3).mean(-1)
    sums = torch.from_numpy(sums_CP).to(second.device)
    return torch.where((sums[:, None, :] == sums[None, :, :]).all(-1), found, 0.0)


def joint(left: Tensor, right: Tensor, sums_CP: IntArray) -> Tensor:
    """Return J whose entries over channels R add up to E|Σ_{c in R} l_c r_c|², the cost of losing R without a stand-in.

    Args:
        left: (channels * P, channels * P), uncentred second moment of the left operand.
        right: of the right operand.
        sums_CP: (channels, P), the sum that each position is in.

    Returns: (channels, channels), symmetric positive semidefinite.
    """
    num, count = sums_CP.shape
    product = torch.where(same_sum(sums_CP).to(left.device), left * right.to(left.device), 0.0)
    return product.reshape(num, count, num, count).sum((1, 3))


def product_error(left: Tensor, right: Tensor, sums_CP: IntArray, keep_K: Tensor, mix_KC: Tensor) -> float:
    """Return E|Σ_c (l_c - l̂_c) r_c|², added up over sums, for l̂ = l_K @ mix at all P positions alike.

    Args:
        left: as in joint.
        right: as in joint.
        sums_CP: as in joint.
        keep_K: (kept,) int64.
        mix_KC: (kept, channels).
    """
    num, count = sums_CP.shape
    keep, mix = keep_K.to(left.device), mix_KC.to(left)
    change = torch.eye(num, dtype=left.dtype, device=left.device)
    change[:, keep] -= mix.T
    moved = change.any(1).nonzero().squeeze(1)
    if not len(moved):
        return 0.0
    change = change[moved]
    first = torch.einsum("rc,cpdq->rpdq", change, left.reshape(num, count, num, count))
    residual = torch.einsum("rpdq,sd->rpsq", first, change)
    positions = (moved[:, None] * count + torch.arange(count, device=left.device)).reshape(-1)
    weight = right.to(left)[positions][:, positions]
    inside = same_sum(sums_CP).to(left.device)[positions][:, positions]
    return float(torch.where(inside, residual.reshape(weight.shape) * weight, 0.0).sum().clamp_min(0.0))


def square_root(matrix_CC: Tensor, blocks_C: IntArray) -> Tensor:
    """Return W with Wᵀ W = matrix, block by block, (channels, channels) float64; negative eigenvalues count as zero."""
    out = torch.zeros_like(matrix_CC, dtype=torch.float64)
    for number in range(int(blocks_C.max()) + 1):
        index = torch.from_numpy(np.flatnonzero(blocks_C == number)).to(matrix_CC.device)
        values, vectors = torch.linalg.eigh(matrix_CC[index][:, index].double())
        out[index[:, None], index[None, :]] = values.clamp_min(0.0).sqrt()[:, None] * vectors.T
    return out
