"""Forward selection on a consumer's own error, an alternative order to pivoted Cholesky.

Holds: greedy_order. Elsewhere: least squares and curves (decompose.py), tolerances.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from apoptosis.errors import NonFiniteError, ShapeError

_EPS = float(np.finfo(np.float64).eps)
_REFRESH = 64  # steps after which the running gains are computed afresh: their round-off adds up


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
    gram, weight = _array(gram_CC), _array(weight_OC)
    num = gram.shape[0]
    if gram.shape != (num, num) or weight.ndim != 2 or weight.shape[1] != num:
        raise ShapeError(f"greedy_order: gram {gram.shape} and weight {weight.shape} do not fit.")
    if weight.shape[0] > num:  # only WᵀW matters: a triangular factor has the same with C rows
        weight = np.asarray(np.linalg.qr(weight, mode="r"))
    seen = weight @ gram  # W S for the empty choice
    columns, images = np.zeros((num, num)), np.zeros((num, weight.shape[0]))
    left = gram.diagonal().copy()
    floor = num * _EPS * max(float(left.max()), 0.0)
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


def _array(tensor: Tensor) -> npt.NDArray[np.float64]:
    array: npt.NDArray[np.float64] = tensor.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(array).all():
        raise NonFiniteError("greedy_order: an argument holds NaN or infinity.")
    return array
