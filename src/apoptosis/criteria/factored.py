"""A reduction and its error from the factorisation that ordered the channels, in place of a second one.

Holds: `reduce_by_factor`. Elsewhere: the factorisation (numerics.linalg), the same from moments (least_squares.py,
certificate.py), which serves wherever this does not.

With G = L Lᵀ in pivot order and the first k pivots kept, least squares is L_RK L_KK⁻¹, and what is left of the others
is L_RR L_RRᵀ (docs/theory.md, "Error curve"): one triangular solve, and one product for the error.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from apoptosis.criteria.views import GroupView, Ranking, SiteView, cost_taps, cost_weight, moments_of, relative_rms
from apoptosis.numerics.linalg import EPS, Factor
from apoptosis.numerics.mixes import CompactReduction
from apoptosis.records import Reduction

_INDEPENDENT = 64.0  # a kept channel has to hold so many times what moments resolve beyond the kept ones before it
_ROUNDING = 1e-3  # largest share of an error that may be round-off of the solve
_OUTPUTS = 128  # rows of a weight that are taken to float64 at once
_COLUMNS = 128  # of a solution that are rearranged at once


class Factored(NamedTuple):
    """A reduction to the first channels of a ranking, with its relative rms error by site key."""

    reduction: Reduction
    errors: dict[str, float]


def has_factor(site: SiteView) -> bool:
    """Whether a factorisation of a site's moments serves for its reductions."""
    plain = site.mixes and site.blocks is None and not site.pairwise and site.moments is not None
    return plain and (site.measure is None or site.grad_factor is not None) and moments_of(site).device.type == "cpu"


def reduce_by_factor(view: GroupView, ranking: Ranking, num_keep: int) -> Factored | None:
    """Keep the first channels of a ranking; None where the ranking has no factor, or that would be too inexact.

    The error counts the actual mix: tr(V_R L_RR L_RRᵀ V_Rᵀ) in float64, and a bound of what round-off of the solve
    adds, ‖V_R‖ ‖M‖ ‖L_KK‖ k eps (Frobenius norms; the solve is backward stable). Channels that the moments hardly
    resolve beyond the kept ones before them are left to the solve with a ridge.
    """
    factor, site = ranking.factor, view.sites[0]
    if factor is None or not 0 < num_keep <= factor.rank or num_keep >= view.num_channels:
        return None
    order, moments = factor.order, moments_of(site)
    own = moments.variances() if site.centred else moments.variances() + moments.mean.square()
    kept = own[order[:num_keep]]
    pivots = factor.lower.diagonal()[:num_keep].square()
    if bool((pivots < _INDEPENDENT * moments.resolution * kept).any()):
        return None
    part = _solved(factor, num_keep)
    norms = float(part.norm()) * float(kept.sum().sqrt())
    left, size = _left(cost_weight(site, site.weight.dtype), factor, num_keep)
    rounding = num_keep * EPS * size * norms
    if not rounding <= _ROUNDING * left**0.5:
        return None
    error = cost_taps(site) * (left**0.5 + rounding) ** 2
    rms = float(relative_rms(torch.tensor(error, dtype=torch.float64, device="cpu"), site))
    return Factored(_reduction(view, site, order, num_keep, part), {site.key: rms})


def _solved(factor: Factor, num_keep: int) -> Tensor:
    """Return L_KK⁻ᵀ L_RKᵀ, (kept, removed) float64, the channels of both in ascending order."""
    gone = num_keep + factor.order[num_keep:].argsort()
    solved = factor.lower[:, :num_keep].index_select(0, gone).contiguous().mT
    torch.linalg.solve_triangular(factor.lower[:num_keep, :num_keep].mT, solved, upper=True, out=solved)
    kept = factor.order[:num_keep].argsort()
    for start in range(0, solved.shape[1], _COLUMNS):  # a few at a time: the factor lies beside it
        columns = solved[:, start : start + _COLUMNS]
        columns.copy_(columns.index_select(0, kept))
    return solved


def _left(weight_OC: Tensor, factor: Factor, num_keep: int) -> tuple[float, float]:
    """Return tr(V_R L_RR L_RRᵀ V_Rᵀ) and ‖V_R‖ (Frobenius), from products in float64."""
    rest = factor.lower[num_keep:, num_keep:]
    gone, error, size = factor.order[num_keep:], 0.0, 0.0
    for part in torch.split(weight_OC, _OUTPUTS):
        own = part.index_select(1, gone).double()
        error += float((own @ rest).square_().sum())
        size += float(own.square_().sum())
    return error, size**0.5


def _reduction(view: GroupView, site: SiteView, order: Tensor, num_keep: int, part: Tensor) -> Reduction:
    """Return the reduction with the constants that it leaves."""
    keep, gone = order[:num_keep].sort().values, order[num_keep:].sort().values
    offset = None
    if site.centred:
        mean = moments_of(site).mean
        offset = torch.zeros_like(mean)
        offset[gone] = mean[gone] - mean[keep] @ part
    return Reduction(
        group=view.name, keep=keep, sites={site.key: CompactReduction(keep=keep, part=part, offset=offset)}
    )
