"""Bounds on what a removal costs: worst case from weights, empirical on a sample, accuracy with confidence.

Lives here: pure arithmetic on outputs, counts and weights. Does not live here: running a network, deciding anything,
the account over a run (budget). The theorems named below are proved in docs/theory.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from apoptosis.errors import ArgumentError, NonFiniteError, ShapeError
from apoptosis.records import Certificate


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
    return float(stats.beta.ppf(1.0 - alpha, flips + 1, rows - flips))


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


def alpha_for_attempt(attempt: int, alpha: float, *, earlier_verdicts: int = 0) -> float:
    """Return what attempt 1, 2, 3 ... may spend of the error probability: 6 alpha / (π² attempt²).

    These sum to alpha over all attempts, so that all limits of a run, rolled back attempts included, hold together
    with confidence 1 - alpha (Theorem "Alpha spending").

    Args:
        attempt: counts all attempts of a run, from 1.
        alpha: error probability of the whole run.
        earlier_verdicts: how many earlier attempts were judged on some of the same rows. What is tried now may depend
            on each of these yes-or-no answers, so that one of 2^earlier_verdicts possible attempts is being judged:
            each gets its share.

    Raises: ArgumentError: attempt below 1, verdicts below 0, or alpha not in (0, 1).
    """
    if attempt < 1:
        raise ArgumentError(f"alpha_for_attempt: attempts count from 1, not {attempt}.")
    if earlier_verdicts < 0:
        raise ArgumentError(f"alpha_for_attempt: {earlier_verdicts} earlier verdicts.")
    _check_alpha(alpha)
    return math.ldexp(6.0 * alpha / (math.pi**2 * attempt**2), -earlier_verdicts)


def _check_alpha(alpha: float) -> None:
    if not 0.0 < alpha < 1.0:
        raise ArgumentError(f"alpha is {alpha}; it is a probability of error and must lie in (0, 1).")


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Predictions before and after on the same rows.

    flips: rows whose largest logit is another class. at_risk: rows whose margin is at most twice the largest change of
    a logit on that row: only these can have flipped. largest_change: over all rows and classes.
    """

    rows: int
    flips: int
    at_risk: int
    largest_change: float


def compare_logits(before_NK: Tensor, after_NK: Tensor) -> Agreement:
    """Count flipped predictions and predictions that could have flipped (Theorem "Margin").

    Args:
        before_NK: (rows, classes), two classes or more.
        after_NK: the same rows after the removal.

    Raises:
        ShapeError: not two matrices of one shape with at least two classes.
        NonFiniteError: a logit is NaN or infinite.
    """
    if before_NK.ndim != 2 or before_NK.shape != after_NK.shape or before_NK.shape[1] < 2:
        raise ShapeError(
            f"compare_logits: shapes {tuple(before_NK.shape)} and {tuple(after_NK.shape)}, need (N, K>=2)."
        )
    before, after = before_NK.detach().double(), after_NK.detach().double()
    if not bool(torch.isfinite(before).all() and torch.isfinite(after).all()):
        raise NonFiniteError("compare_logits: a logit is NaN or infinite.")
    if before.shape[0] == 0:
        return Agreement(rows=0, flips=0, at_risk=0, largest_change=0.0)
    top = before.topk(2, dim=1).values
    change = (after - before).abs().amax(1)
    return Agreement(
        rows=before.shape[0],
        flips=int((before.argmax(1) != after.argmax(1)).sum()),
        at_risk=int((top[:, 0] - top[:, 1] <= 2.0 * change).sum()),
        largest_change=float(change.max()),
    )


def accuracy_certificate(
    agreement: Agreement, *, population: bool, attempt: int = 1, alpha: float = 0.05
) -> Certificate:
    """Bound the share of predictions that changed, and with it the fall of accuracy.

    Args:
        agreement: of the predictions on the probe.
        population: the rows were used neither to train nor to choose the reduction; the limit then speaks of the
            population they were drawn from. Else the share is exact, on those rows alone.
        attempt: how many attempts have been judged so far, this one included.
        alpha: error probability over all attempts.
    """
    if not population:
        share = agreement.flips / max(1, agreement.rows)
        return Certificate(kind="accuracy", subject="outputs", value=share, rows=agreement.rows, note="these rows only")
    spent = alpha_for_attempt(attempt, alpha)
    value = clopper_pearson_upper(agreement.flips, agreement.rows, spent)
    return Certificate(
        kind="accuracy",
        subject="outputs",
        value=value,
        rows=agreement.rows,
        confidence=1.0 - spent,
        population=True,
        note=f"attempt {attempt}, {agreement.flips} flips, {agreement.at_risk} rows within twice the change",
    )


def ledger_sum(certificates: Iterable[Certificate], *, alpha: float = 0.05) -> Certificate:
    """Add up the accuracy certificates of all granted removals of a run (Theorem "Ledger sum").

    The value holds with confidence 1 - alpha when attempt i spent alpha_for_attempt(i, alpha).

    Raises: ArgumentError: a certificate is of another kind, or population and sample limits are mixed.
    """
    found = tuple(certificates)
    if any(c.kind != "accuracy" for c in found) or len({c.population for c in found}) > 1:
        raise ArgumentError("ledger_sum: only accuracy certificates of one sort (all population or all sample) add up.")
    population = bool(found) and found[0].population
    value = min(1.0, sum(c.value for c in found))
    rows = min((c.rows for c in found), default=0)
    confidence = 1.0 - alpha if population else 1.0
    return Certificate(
        kind="accuracy", subject="run", value=value, rows=rows, confidence=confidence, population=population
    )


def spectral_norm(weight: Tensor) -> float:
    """Lipschitz constant of a linear map in the Euclidean norm: exact for (out, in), an upper bound for kernels.

    A convolution of weight (out, in, *kernel) is the sum of one shifted (out, in) map per tap, and shifts do not
    lengthen: at most Σ_p ‖W_p‖₂.

    Raises: ShapeError: fewer than two dimensions.
    """
    if weight.ndim < 2:
        raise ShapeError(f"spectral_norm: weight of shape {tuple(weight.shape)}.")
    taps = weight.detach().double().flatten(2) if weight.ndim > 2 else weight.detach().double()[:, :, None]
    return float(torch.linalg.matrix_norm(taps.permute(2, 0, 1), ord=2).sum())


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


def worst_case_certificate(subject: str, site_error: float, downstream: Iterable[float], radius: float) -> Certificate:
    """Carry a site's worst case through what follows: times the Lipschitz constant of every later map."""
    value = site_error * math.prod(downstream)
    return Certificate(kind="worst_case", subject=subject, value=value, note=f"for inputs of norm at most {radius:g}")


def empirical_certificate(subject: str, relative_rms: float, rows: int) -> Certificate:
    """Record a relative rms error that was computed on `rows` rows."""
    return Certificate(kind="empirical", subject=subject, value=relative_rms, rows=rows)


def summed_errors(relative_rms: Iterable[float]) -> float:
    """Bound on the rms change of a site's output over several events by the triangle inequality: the plain sum.

    All errors must relate to one common scale (Theorem "Compounding").
    """
    return math.fsum(relative_rms)
