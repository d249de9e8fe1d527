"""The certificate formula, and the search for the smallest width within a tolerance.

Holds: relative_error, dropped_variance, choose. Elsewhere: the order of the channels (each criterion's
own), budgets over events, alignment to hardware beyond rounding up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from apoptosis.criteria.constraints import allowed, interleaved, step_between
from apoptosis.criteria.exact import below_roundoff
from apoptosis.criteria.factored import Factored, reduce_by_factor
from apoptosis.criteria.least_squares import reduce_by_least_squares
from apoptosis.criteria.views import (
    Criterion,
    GroupView,
    Ranking,
    SiteView,
    flat_weight,
    moments_of,
    relative_rms,
    roundoff_tolerance,
)
from apoptosis.errors import ArgumentError
from apoptosis.numerics.mixes import compact, output_errors
from apoptosis.records import Certificate, CertificateKind, Reduction, SiteReduction


def dropped_variance(site: SiteView, keep: Tensor, reduction: SiteReduction) -> Tensor:
    """Return diag(W R Wᵀ), the mean squared error of every output, (out,) float64.

    Exact on the sample for P = 1. For P > 1 the sum over taps Σ_p diag(W_p R W_pᵀ) from pooled moments, an estimate;
    P times it is an upper bound where all taps see alike distributed positions (docs/theory.md, "Several taps").

    Raises: ArgumentError: the site has no moments.
    """
    per_tap = _output_errors(site, flat_weight(site, site.weight.dtype), keep, reduction)
    return per_tap.reshape(site.weight.shape[0], -1).sum(1)


def _output_errors(site: SiteView, weight: Tensor, keep: Tensor, reduction: SiteReduction) -> Tensor:
    """Return diag(V R Vᵀ) for any V (rows, channels), float64."""
    return output_errors(weight, moments_of(site), keep, reduction)


def relative_error(site: SiteView, keep: Tensor, reduction: SiteReduction) -> float:
    """Relative rms change of a consumer's output: sqrt(E‖W(z - ẑ)‖² / E‖W(z - μ)‖²), bias excluded.

    Exact on the sample for P = 1 and wherever the site can be measured; otherwise P Σ_p tr(W_p R W_pᵀ), a bound under
    the condition stated at dropped_variance, over the estimated energy. A site whose output does not vary is a
    constant: 0.0 if the constant is kept to round-off, else infinity.
    """
    if site.grad_factor is not None:
        error = float(_output_errors(site, site.grad_factor, keep, reduction).sum())  # tr(V R Vᵀ), V = grad_factor
    elif site.measure is not None:
        error = site.measure(keep, reduction)
    else:
        error = site.num_taps * float(dropped_variance(site, keep, reduction).sum())
    return float(relative_rms(torch.tensor(error, dtype=torch.float64, device="cpu"), site))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Proposal:
    """A reduction within its limits, and its errors.

    errors: site key -> relative rms. kind: "empirical" when they were computed on a sample, "worst_case" when they are
    the data-free score of a criterion on sites without moments.
    """

    reduction: Reduction
    errors: Mapping[str, float]
    kind: CertificateKind

    def certificates(self, view: GroupView) -> tuple[Certificate, ...]:
        """One certificate per site."""
        rows = {site.key: site.moments.num_rows if site.moments is not None else 0 for site in view.sites}
        notes = {site.key: site.note for site in view.sites}
        if self.kind != "empirical":
            notes = dict.fromkeys(notes, "relative, from weights alone, for inputs of equal size in all directions")
        return tuple(
            Certificate(kind=self.kind, subject=key, value=value, rows=rows[key], note=notes[key])
            for key, value in self.errors.items()
        )


def choose(
    criterion: Criterion,
    view: GroupView,
    limits: float | Mapping[str, float],
    *,
    align: int = 1,
    min_keep: int = 1,
    ranking: Ranking | None = None,
) -> Proposal | None:
    """Remove as many channels as the limits allow.

    Equally many channels of every row of the group are kept, and where a site allows no mix, channels are dropped,
    whatever the criterion. Where the error curve is known, the number kept is read off it; elsewhere it is found by
    bisection with the certificate formula. Either way the certificate of the result is computed from its actual mix and
    offset, and channels are added back until it is within the limits.

    Args: criterion: how to order and to reduce. view: the group. limits: relative rms per site key, or one for all; a
        limit below round-off means that (views.roundoff_tolerance). align: the number kept is rounded up to a multiple
        (of the rows, too: see constraints.step_between). min_keep: fewer are never kept. ranking: what `interleaved`
        says for this criterion and view, where it is known already.

    Returns: None when nothing can be removed.

    Raises:
        ArgumentError: a site has no limit, or no moments though the criterion needs them.
        NonFiniteError: weights or moments hold NaN or infinity.
    """
    caps = {site.key: max(roundoff_tolerance(site), _cap(limits, site)) for site in view.sites}
    align = step_between(view, align)
    ranking = interleaved(criterion, view) if ranking is None else ranking
    strict = [site for site in view.sites if _cap(limits, site) < roundoff_tolerance(site)]
    search = _Search(criterion, view, ranking, caps, strict)
    low = _aligned(max(min_keep, ranking.min_keep, 1), align)
    high = max(low, _aligned(search.from_curves(), align))
    if not search.curves_are_exact or (search.rooted and high < view.num_channels and not search.good(high)):
        low = max(low, high) if search.curves_are_exact else low
        high = _aligned(view.num_channels, align) if search.rooted else high
        high = search.bisect(low, min(high, _aligned(view.num_channels, align)), align)
    step = align
    while high < view.num_channels:
        reduction, errors = search.both(high)
        if all(errors[key] <= caps[key] for key in caps) and search.exact(reduction):
            return Proposal(reduction=reduction, errors=errors, kind="empirical" if search.has_data else "worst_case")
        del reduction  # before the next one
        high, step = high + step, 2 * step
    return None


def at_width(
    criterion: Criterion, view: GroupView, num_keep: int, ranking: Ranking, *, errors: bool = True
) -> Proposal:
    """Keep the first channels of a ranking, whatever the error; it is computed as `choose` computes it.

    Args: criterion, view, ranking: as in `choose`. num_keep: channels that stay, equally many of every row. errors:
        False leaves the errors out, which take longer than the reduction.

    Raises: as `choose`.
    """
    search = _Search(criterion, view, ranking, {}, ())
    kind: CertificateKind = "empirical" if search.has_data else "worst_case"
    found = search.from_factor(num_keep)
    if found is not None:
        return Proposal(reduction=found.reduction, errors=found.errors if errors else {}, kind=kind)
    reduction = search.reduction(num_keep)
    return Proposal(reduction=reduction, errors=search.errors(num_keep, reduction) if errors else {}, kind=kind)


class _Search:
    """Errors of keeping the first k of one ranking."""

    def __init__(
        self,
        criterion: Criterion,
        view: GroupView,
        ranking: Ranking,
        caps: Mapping[str, float],
        strict: Sequence[SiteView],
    ) -> None:
        self._criterion, self._view, self._ranking, self._caps, self._strict = criterion, view, ranking, caps, strict
        self.rooted = any(site.moments is not None and site.moments.root() is not None for site in strict)
        self.has_data = all(site.moments is not None or site.measure is not None for site in view.sites)
        if criterion.needs_data and any(site.moments is None for site in view.sites):
            raise ArgumentError(f"criterion '{criterion.name}' needs moments at every site of group '{view.name}'.")
        known = all(site.key in ranking.curves for site in view.sites)
        exact = all(site.measure is None or site.grad_factor is not None for site in view.sites)
        self.curves_are_exact = known and exact
        if not known and not self.has_data:
            raise ArgumentError(f"criterion '{criterion.name}' gives no score without data for group '{view.name}'.")

    def from_curves(self) -> int:
        """Smallest number kept whose curves meet the caps, all channels where a curve is missing.

        A measured site's curve is only an upper bound (over its measured energy), so it says where bisection ends.
        """
        num = self._view.num_channels
        good = torch.ones(num + 1, dtype=torch.bool, device="cpu")
        for key, cap in self._caps.items():
            curve = self._ranking.curves.get(key)
            good &= curve <= cap if curve is not None else torch.arange(num + 1, device="cpu") >= num
        good[num] = True
        return int((~good).nonzero().max()) + 1 if not bool(good.all()) else 0

    def reduction(self, num_keep: int) -> Reduction:
        made = self._criterion.reduce(self._view, self._ranking.order[:num_keep].sort().values)
        made = allowed(self._view, made)
        return replace(made, sites={key: compact(site, made.keep) for key, site in made.sites.items()})

    def both(self, num_keep: int) -> tuple[Reduction, dict[str, float]]:
        """Return the reduction and its errors, from the ranking's own factorisation where there is one."""
        found = self.from_factor(num_keep)
        if found is not None:
            return found
        reduction = self.reduction(num_keep)
        return reduction, self.errors(num_keep, reduction)

    def from_factor(self, num_keep: int) -> Factored | None:
        """Return them from the ranking's own factorisation; None where there is none, or it does not serve."""
        own = self._criterion.reduce is not reduce_by_least_squares or bool(self._strict)
        return None if own else reduce_by_factor(self._view, self._ranking, num_keep)

    def errors(self, num_keep: int, reduction: Reduction) -> dict[str, float]:
        if not self.has_data:
            return {key: float(curve[num_keep]) for key, curve in self._ranking.curves.items()}
        sites = self._view.sites
        return {site.key: relative_error(site, reduction.keep, reduction.sites[site.key]) for site in sites}

    def good(self, num_keep: int) -> bool:
        if num_keep >= self._view.num_channels:
            return True
        reduction = self.reduction(num_keep)
        within = all(error <= self._caps[key] for key, error in self.errors(num_keep, reduction).items())
        return within and self.exact(reduction)

    def exact(self, reduction: Reduction) -> bool:
        """Whether sites with a limit below round-off change by round-off only, as far as their moments tell."""
        return all(below_roundoff(site, reduction.keep, reduction.sites[site.key]) for site in self._strict)

    def bisect(self, low: int, high: int, align: int) -> int:
        """Smallest multiple of align in [low, high] that is good, taking errors to fall with the number kept."""
        left, right = low // align, max(high, low) // align
        while left < right:
            middle = (left + right) // 2
            if self.good(middle * align):
                right = middle
            else:
                left = middle + 1
        return right * align


def _aligned(number: int, align: int) -> int:
    return -(-number // align) * align


def _cap(limits: float | Mapping[str, float], site: SiteView) -> float:
    if isinstance(limits, float | int):
        return limits
    if site.key not in limits:
        raise ArgumentError(f"choose: no limit for site '{site.key}'.")
    return limits[site.key]
