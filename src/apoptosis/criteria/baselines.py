"""Criteria that drop channels and put at most a constant in their place: constant, magnitude, random.

Holds: these three and their exact error curve. Elsewhere: anything that mixes channels.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from apoptosis.criteria.views import (
    Criterion,
    GroupView,
    Ranking,
    column_squares,
    cost_taps,
    cost_weight,
    device_of,
    moments_of,
    output_variance,
    relative_rms,
    selection,
)
from apoptosis.numerics.decompose import complement
from apoptosis.records import Reduction, SiteReduction


def dropping_curve(gram_CC: Tensor, weight_OC: Tensor, order: Tensor) -> Tensor:
    """Return tr(W G_RR Wᵀ) over R = order[k:], for every k at once, (channels + 1,) float64.

    Σ_{i,j in R} (WᵀW ∘ G)_ij: sums over the lower right corners of one matrix: R is dropped, and nothing replaces it.
    """
    order = order.to(gram_CC.device)
    weight = weight_OC.to(gram_CC.device, torch.float64)
    joint = ((weight.T @ weight) * gram_CC)[order][:, order]
    corners = joint.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return torch.cat([corners.clamp_min(0.0), corners.new_zeros(1)]).cpu()


def _curves(view: GroupView, order: Tensor, *, offsets: bool) -> dict[str, Tensor]:
    curves = {}
    for site in view.sites:
        if site.moments is None:
            continue
        moments = moments_of(site)
        matrix = moments.covariance() if offsets and site.centred else moments.second_moment()
        curves[site.key] = relative_rms(cost_taps(site) * dropping_curve(matrix, cost_weight(site), order), site)
    return curves


def _constant_curves(view: GroupView, order: Tensor, min_keep: int) -> dict[str, Tensor]:
    return _curves(view, order, offsets=True)


def _drop_curves(view: GroupView, order: Tensor, min_keep: int) -> dict[str, Tensor]:
    return _curves(view, order, offsets=False)


def _descending(score_C: Tensor) -> Tensor:
    return torch.sort(score_C.cpu(), descending=True, stable=True).indices


def _rank_constant(view: GroupView) -> Ranking:
    cost = torch.zeros(view.num_channels, dtype=torch.float64, device="cpu")
    for site in view.sites:
        scale = output_variance(site)
        if scale > 0:
            moments = moments_of(site)
            sizes = moments.variances() if site.centred else moments.variances() + moments.mean.square()
            cost += column_squares(site.weight) * sizes.cpu() / scale
    order = _descending(cost)
    return Ranking(order=order, curves=_curves(view, order, offsets=True))


def _reduce_constant(view: GroupView, keep: Tensor) -> Reduction:
    sites = {}
    for site in view.sites:
        mean = moments_of(site).mean
        offset = torch.zeros_like(mean)
        removed = complement(keep.to(mean.device), view.num_channels)
        offset[removed] = mean[removed]
        mix = selection(keep, view.num_channels, mean.device)
        sites[site.key] = SiteReduction(mix=mix, offset=offset if site.centred else None)
    return Reduction(group=view.name, keep=keep, sites=sites)


def incoming_norms(view: GroupView) -> Tensor:
    """Return ‖w̃_j‖ where the incoming weights are known, else norms of the consumers' columns, (channels,)."""
    if view.neuron is not None:
        norms: Tensor = torch.linalg.vector_norm(view.neuron.incoming.detach().double(), dim=1)
        return norms.cpu()
    squares = torch.zeros(view.num_channels, dtype=torch.float64, device="cpu")
    for site in view.sites:
        squares += column_squares(site.weight)
    return squares.sqrt()


def _rank_magnitude(view: GroupView) -> Ranking:
    order = _descending(incoming_norms(view))
    return Ranking(order=order, curves=_curves(view, order, offsets=False))


def _rank_random(view: GroupView) -> Ranking:
    generator = torch.Generator().manual_seed((view.seed * 1_000_003 + zlib.crc32(view.name.encode())) % 2**63)
    order = torch.randperm(view.num_channels, generator=generator, device="cpu")
    return Ranking(order=order, curves=_curves(view, order, offsets=False))


def _reduce_drop(view: GroupView, keep: Tensor) -> Reduction:
    sites = {
        site.key: SiteReduction(mix=selection(keep, view.num_channels, device_of(site)), offset=None)
        for site in view.sites
    }
    return Reduction(group=view.name, keep=keep, sites=sites)


CONSTANT = Criterion(
    name="constant",
    needs_data=True,
    rank=_rank_constant,
    reduce=_reduce_constant,
    summary="channels that hardly vary are replaced by their mean",
    curves=_constant_curves,
    neurons=False,
)
MAGNITUDE = Criterion(
    name="magnitude",
    needs_data=False,
    rank=_rank_magnitude,
    reduce=_reduce_drop,
    summary="channels with small incoming weights are dropped (a baseline)",
    curves=_drop_curves,
)
RANDOM = Criterion(
    name="random",
    needs_data=False,
    rank=_rank_random,
    reduce=_reduce_drop,
    summary="channels drawn at random are dropped (a baseline)",
    curves=_drop_curves,
)
