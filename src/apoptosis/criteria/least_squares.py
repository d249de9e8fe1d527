"""The interpolative decomposition: keep channels that determine the others, and replace those by mixes.

Holds: "interpolative" and "reconstruction" (order by one weighted pivoted Cholesky), "greedy" (order by forward
selection on the consumers' full error). Elsewhere: the linear algebra (numerics), how many to keep
(certificate.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from apoptosis.criteria.exact import gram_root
from apoptosis.criteria.factored import has_factor
from apoptosis.criteria.views import (
    Criterion,
    GroupView,
    Ranking,
    SiteView,
    column_squares,
    cost_taps,
    cost_weight,
    device_of,
    gram,
    gram_blocks,
    moments_of,
    offset_of,
    output_variance,
    relative_rms,
    selection,
    working_dtype,
)
from apoptosis.numerics.decompose import joint_error_curve, solve_mix, solve_mix_of_root
from apoptosis.numerics.linalg import Factor, greedy_order, ordered_cholesky, pivoted_cholesky, pivoted_qr
from apoptosis.records import Reduction, SiteReduction


def _column_norms(site: SiteView) -> Tensor:
    """Return ‖W_j‖ over outputs and taps, or of the grad_factor, (channels,) float64 on the CPU."""
    if site.grad_factor is not None:
        return column_squares(site.grad_factor[:, :, None]).sqrt()
    return column_squares(site.weight).sqrt()


def _curve(site: SiteView, factor: Factor) -> Tensor:
    """Return the relative rms error of keeping the first k: exact for P = 1, else P times the sum over taps."""
    costs = joint_error_curve(cost_weight(site, working_dtype(site)), factor, dtype=working_dtype(site))
    if site.centred and site.mixes and site.dropout == 0.0 and site.scale is None:
        site.memo.setdefault("energy", float(costs[0]))  # keeping none costs all: nothing to compute a second time
    return relative_rms(cost_taps(site) * costs, site)


def _relative_weight(site: SiteView) -> float:
    scale = output_variance(site)
    return 1.0 / scale if scale > 0.0 else 0.0


def _rank_interpolative(view: GroupView) -> Ranking:
    if len(view.sites) == 1:
        site = view.sites[0]
        root, norms = gram_root(site), _column_norms(site)
        if root is None:
            factor = pivoted_cholesky(gram(site), weights_C=norms, overwrite=True)
        else:
            factor = pivoted_qr(root, norms)
        serves = root is None and has_factor(site)
        curves = {} if view.rows > 1 else {site.key: _curve(site, factor)}  # `interleaved` makes those of its order
        return Ranking(order=factor.order, curves=curves, factor=factor if serves else None)
    # One weight per channel for all sites: scaled site by site, exact duplicates would not be redundant in the sum.
    total = torch.zeros(view.num_channels, view.num_channels, dtype=torch.float64, device="cpu")
    weights = torch.zeros(view.num_channels, dtype=torch.float64, device="cpu")
    roots: list[Tensor] = []
    for site in view.sites:
        squares = _relative_weight(site) * _column_norms(site).square()
        root = gram_root(site)
        if root is not None:
            roots.append(squares.sum().sqrt() * root.cpu())
        total.add_(gram(site).cpu(), alpha=float(squares.sum()))
        weights += squares
    if len(roots) == len(view.sites):
        order = pivoted_qr(torch.cat(roots), weights.sqrt()).order
    else:
        order = pivoted_cholesky(total, weights_C=weights.sqrt(), overwrite=True).order
    del total
    return Ranking(order=order, curves={} if view.rows > 1 else _curves(view, order))


def _rank_greedy(view: GroupView) -> Ranking:
    total = torch.zeros(view.num_channels, view.num_channels, dtype=torch.float64, device="cpu")
    rows = []
    for site in view.sites:
        weight = cost_weight(site).cpu()
        share = _relative_weight(site) ** 0.5
        total.add_(gram(site).cpu(), alpha=1.0 / len(view.sites))
        rows.append(weight * share)
    order = greedy_order(total, torch.cat(rows))
    return Ranking(order=order, curves=_curves(view, order))


def _curves(view: GroupView, order: Tensor, min_keep: int = 1) -> dict[str, Tensor]:
    return {site.key: _curve(site, ordered_cholesky(gram(site), order)) for site in view.sites}


def reduce_by_least_squares(view: GroupView, keep: Tensor) -> Reduction:
    """Let the kept channels stand in for the others by least squares at every site, with an offset where one folds."""
    sites = {}
    for site in view.sites:
        if not site.mixes:
            sites[site.key] = SiteReduction(mix=selection(keep, view.num_channels, device_of(site)), offset=None)
            continue
        root, moments = gram_root(site), moments_of(site)
        if root is None:
            mix = solve_mix(gram_blocks(site), keep.to(moments.device), moments.num_channels, moments.resolution)
        else:
            mix = solve_mix_of_root(root, keep)
        sites[site.key] = SiteReduction(mix=mix, offset=offset_of(site, keep, mix))
    return Reduction(group=view.name, keep=keep, sites=sites)


INTERPOLATIVE = Criterion(
    name="interpolative",
    needs_data=True,
    rank=_rank_interpolative,
    reduce=reduce_by_least_squares,
    summary="least squares from kept channels, ordered by one pivoted Cholesky factorisation; errors are weighted by "
    "the gradient of the loss",
    curves=_curves,
    grad_factor=True,
    tolerance=0.01,
    neurons=False,
)
RECONSTRUCTION = replace(
    INTERPOLATIVE,
    name="reconstruction",
    summary="the same, but all outputs of a consumer have the same weight",
    grad_factor=False,
    tolerance=0.025,
)
GREEDY = Criterion(
    name="greedy",
    needs_data=True,
    rank=_rank_greedy,
    reduce=reduce_by_least_squares,
    summary="least squares from kept channels, ordered by forward selection on the consumers' own error",
    curves=_curves,
    neurons=False,
)
