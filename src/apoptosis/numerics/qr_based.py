"""Which channels to keep and how they stand in for the rest, from a root of the Gram matrix: F with FᵀF = G.

Holds: the twins of decompose's pivoted Cholesky and least squares that work on rows. They know a remainder to
round-off of the rms, where G itself knows it to round-off of the variance: a signal of 1e-8 is lost in G.
Elsewhere: where roots come from (moments.py), what is asked of them (criteria).
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import lstsq, qr
from torch import Tensor

from apoptosis.errors import NonFiniteError
from apoptosis.numerics.decompose import EPS, Factor, complement


def pivoted_qr(root_NC: Tensor, weights_C: Tensor) -> Factor:
    """Order the channels as pivoted_cholesky does FᵀF, by a QR factorisation of F with column pivots.

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
    energies = np.square(upper).sum(1)
    kept = weights[order]
    lower = torch.from_numpy(upper.T.copy()) * torch.where(kept > 0, 1.0 / kept, 0.0)[:, None]
    tails = np.concatenate([np.cumsum(energies[::-1])[::-1], [0.0]])
    return Factor(order=order, lower=lower, rank=rank, remainder_trace=torch.from_numpy(tails))


def solve_mix_rooted(root_NC: Tensor, keep_K: Tensor) -> Tensor:
    """Return the mix (kept, channels) of solve_mix for FᵀF, from F: kept columns are exactly the identity.

    Kept channels that depend on one another to round-off share the work (least norm on the scale of unit columns).
    """
    num = root_NC.shape[1]
    keep = keep_K.to(root_NC.device)
    removed = complement(keep, num)
    mix = torch.zeros(keep.numel(), num, dtype=torch.float64, device=root_NC.device)
    if keep.numel() and removed.numel() and root_NC.shape[0]:
        left = root_NC[:, keep]
        size = left.norm(dim=0)
        inverse = torch.where(size > 0, 1.0 / size, 0.0)
        columns, target = (left * inverse).cpu().numpy(), root_NC[:, removed].cpu().numpy()
        solved = lstsq(columns, target, num * EPS, lapack_driver="gelsy")[0]
        mix[:, removed] = torch.from_numpy(solved).to(mix) * inverse[:, None]
    mix[torch.arange(keep.numel(), device=mix.device), keep] = 1.0
    return mix
