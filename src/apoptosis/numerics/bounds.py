"""Bounds on what a removal costs: worst case from weights, changed predictions, accuracy with confidence.

Holds: pure arithmetic on outputs, counts and weights. Elsewhere: running a network, deciding anything, certificates
(decide.acceptance, criteria), the sum over a run (decide.acceptance). The theorems named below are proved in
docs/theory.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.special import betaincinv
from torch import Tensor

from apoptosis.errors import ArgumentError, NonFiniteError, ShapeError


def clopper_pearson_upper(flips: int, rows: int, alpha: float) -> float:
    """Upper confidence limit (one-sided, level 1 - alpha) on a probability after `flips` hits in `rows` trials.

    The solution p of P[Binomial(rows, p) <= flips] = alpha, a quantile of Beta(flips + 1, rows - flips): it holds
    exactly, for every p and every number of rows (Theorem "Clopper-Pearson").

    Raises: ArgumentError: not 0 <= flips <= rows, or alpha not in (0, 1).

    Example:
        >>> round(100 * clopper_pearson_upper(0, 4096, 0.05), 3)  # percent
        0.073

    References: Clopper, Pearson, Biometrika 26 (1934).
    """
    if not 0 <= flips <= rows:
        raise ArgumentError(f"clopper_pearson_upper: {flips} flips in {rows} rows.")
    _check_alpha(alpha)
    if flips == rows:
        return 1.0
    return float(betaincinv(flips + 1, rows - flips, 1.0 - alpha))


def required_probe_rows(budget: float, alpha: float) -> int:
    """Smallest number of probe rows on which no flip at all keeps the upper limit within the budget.

    1 - alpha^(1/N) <= budget. Fewer rows can never grant it, whatever is removed.

    Raises: ArgumentError: budget or alpha not in (0, 1).

    Example:
        >>> required_probe_rows(0.001, 0.05)
        2995
    """
    if not 0.0 < budget < 1.0:
        raise ArgumentError(f"required_probe_rows: budget is {budget}; it is a share and must lie in (0, 1).")
    _check_alpha(alpha)
    rows = max(1, math.ceil(math.log(alpha) / math.log1p(-budget)))
    while clopper_pearson_upper(0, rows, alpha) > budget:  # the last digit of two logarithms
        rows += 1
    return rows


def alpha_for_attempt(attempt: int, alpha: float, *, earlier_results: int = 0) -> float:
    """Return what attempt 1, 2, 3 ... may spend of the error probability: 6 alpha / (π² attempt²).

    These sum to alpha over all attempts, so that all limits of a run, rolled back attempts included, hold together
    with confidence 1 - alpha (Theorem "Alpha spending").

    Args:
        attempt: counts all attempts of a run, from 1.
        alpha: error probability of the whole run.
        earlier_results: how many earlier attempts were tested on some of the same rows. What is tried now may depend
            on each of these yes-or-no answers, so that one of 2^earlier_results possible attempts is being tested:
            each gets its share.

    Raises: ArgumentError: attempt below 1, results below 0, or alpha not in (0, 1).
    """
    if attempt < 1:
        raise ArgumentError(f"alpha_for_attempt: attempts count from 1, not {attempt}.")
    if earlier_results < 0:
        raise ArgumentError(f"alpha_for_attempt: {earlier_results} earlier results.")
    _check_alpha(alpha)
    return math.ldexp(6.0 * alpha / (math.pi**2 * attempt**2), -earlier_results)


def _check_alpha(alpha: float) -> None:
    if not 0.0 < alpha < 1.0:
        raise ArgumentError(f"alpha is {alpha}; it is a probability of error and must lie in (0, 1).")


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Predictions before and after on the same rows.

    flips: rows whose largest logit is another class, or whose logits are not finite any more. losses: flipped rows
    that were right before (equal to flips where labels are missing). at_risk: rows whose margin is at most twice the
    largest change of a logit on that row: only these can have flipped.
    """

    rows: int
    flips: int
    losses: int
    at_risk: int


def compare_logits(before_NK: Tensor, after_NK: Tensor, labels_N: Tensor | None = None) -> Agreement:
    """Count flipped predictions, those that were right, and those that could have flipped (Theorem "Margin").

    Args:
        before_NK: (rows, classes), two classes or more; -inf where a class is no choice, before and after.
        after_NK: the same rows after the removal.
        labels_N: (rows,) class indices.

    Raises:
        ShapeError: not two matrices of one shape with at least two classes, or another number of labels.
        NonFiniteError: a logit before is NaN or infinite.

    Example:
        >>> compare_logits(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
        Agreement(rows=2, flips=1, losses=1, at_risk=1)
    """
    shape = before_NK.shape
    if len(shape) != 2 or shape != after_NK.shape or shape[1] < 2:
        raise ShapeError(f"compare_logits: shapes {tuple(shape)} and {tuple(after_NK.shape)}, need (N, K>=2).")
    if labels_N is not None and labels_N.shape != shape[:1]:
        raise ShapeError(f"compare_logits: labels of shape {tuple(labels_N.shape)} for {shape[0]} rows.")
    before, after = _without_masked(before_NK.detach().double(), after_NK.detach().double())
    if not bool(torch.isfinite(before).all()):
        raise NonFiniteError("compare_logits: a logit before the removal is NaN or infinite.")
    if shape[0] == 0:
        return Agreement(rows=0, flips=0, losses=0, at_risk=0)
    top = before.topk(2, dim=1).values
    first = before.argmax(1)
    flipped = (first != after.argmax(1)) | ~torch.isfinite(after).all(1)
    right = flipped if labels_N is None else first == labels_N.to(first.device)
    safe = top[:, 0] - top[:, 1] > 2.0 * (after - before).abs().amax(1)  # False where the change is NaN
    return Agreement(
        rows=shape[0], flips=int(flipped.sum()), losses=int((flipped & right).sum()), at_risk=int((~safe).sum())
    )


def _without_masked(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Put below all other logits of a row those that are -inf before and after."""
    masked = (before == float("-inf")) & (after == before)
    if not bool(masked.any()):
        return before, after
    low = torch.minimum(before.masked_fill(masked, 0.0).amin(1), after.masked_fill(masked, 0.0).amin(1)) - 1.0
    return before.where(~masked, low[:, None]), after.where(~masked, low[:, None])


def worst_case_site_error(weight_OC: Tensor, deviation_C: Tensor, radius: float, jump_C: Tensor | None = None) -> float:
    """Largest norm of a consumer's change for inputs with ‖(x, 1)‖ <= radius (Theorem "Worst-case bound").

    Args:
        weight_OC: consumer columns, (out, channels).
        deviation_C: (channels,) L ‖w̃_j - s w̃_k‖ of every channel, zero for kept ones.
        radius: bound on the norm of the input with a 1 appended.
        jump_C: (channels,) discontinuity of φ, zero for kept ones.

    Returns: the smaller of Σ_j ‖W_j‖ d_j and ‖W_R‖₂ ‖d_R‖ with d = radius * deviation + jump, absolute.
    """
    deviation = deviation_C.detach().double() * radius
    if jump_C is not None:
        deviation = deviation + jump_C.detach().double()
    active = deviation > 0
    weight = weight_OC.detach().double()[:, active]
    if weight.shape[1] == 0:
        return 0.0
    deviation = deviation[active]
    apart = float((weight.norm(dim=0) * deviation).sum())
    return min(apart, float(torch.linalg.matrix_norm(weight, ord=2) * deviation.norm()))
