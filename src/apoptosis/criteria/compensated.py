"""Channels under norms: what goes is a multiple of one kept channel, or a constant, wherever a norm reads it.

Holds: the criterion for groups that norms read, made of another one. Elsewhere: what the norms make of it
(apoptosis.modules.norms), when it is asked for (planner).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from apoptosis.criteria.exact import gram_root
from apoptosis.criteria.merging import Pairs, merge_order, moment_pairs
from apoptosis.criteria.views import Criterion, GroupView, Ranking, SiteView, device_of, gram, moments_of, selection
from apoptosis.numerics.decompose import complement, mean_offset, solve_mix, solve_mix_of_root
from apoptosis.numerics.linalg import roundoff_floor
from apoptosis.records import Reduction, SiteReduction

_SHARE_OF_READERS = 1e-3  # what norms lose cannot be made up for elsewhere, so readers only tell equals apart


def compensated(criterion: Criterion) -> Criterion:
    """Return the criterion for groups that norms read, under the name of the one that the user chose.

    The norms decide which kept channel, or which constant, stands for a channel that goes. Readers behind them take the
    same channel where it explains all, else a least-squares mix of all kept ones: where a channel that is always zero
    goes, what a LayerNorm makes of it is a mix of all others (theory, Theorem 25).
    """
    known: list[tuple[GroupView, Pairs]] = []  # of the view at hand: a search asks for its reductions again and again

    def costs(view: GroupView) -> Pairs:
        if not known or known[0][0] is not view:
            known[:] = [(view, _costs(view))]
        return known[0][1]

    return Criterion(
        name=criterion.name,
        needs_data=True,
        rank=lambda view: _rank(costs(view)),
        reduce=lambda view, keep: _reduce(view, keep, costs(view)),
        summary=f"{criterion.summary}, under norms",
    )


def _costs(view: GroupView) -> Pairs:
    """Cost of every merge: what norms lose, and a little of what their readers do."""
    norms, readers = (_part(view, pairwise) for pairwise in (True, False))
    found, _ = moment_pairs(norms)
    if readers.sites:
        others, _ = moment_pairs(readers)
        found = replace(
            found,
            cost=found.cost + _SHARE_OF_READERS * others.cost,
            constant_cost=found.constant_cost + _SHARE_OF_READERS * others.constant_cost,
        )
    return found


def _part(view: GroupView, pairwise: bool) -> GroupView:
    sites = tuple(site for site in view.sites if site.pairwise == pairwise)
    return replace(view, sites=sites) if sites else view


def _rank(pairs: Pairs) -> Ranking:
    order, min_keep = merge_order(pairs.cost, pairs.constant_cost)
    return Ranking(order=torch.from_numpy(order), min_keep=max(1, min_keep))


def _reduce(view: GroupView, keep: Tensor, pairs: Pairs) -> Reduction:
    gone = complement(keep, view.num_channels)
    rows = pairs.cost[gone.numpy()][:, keep.numpy()]
    best = rows.argmin(1).astype(np.int64)
    constant = pairs.constant_cost[gone.numpy()] <= rows[np.arange(len(best)), best]
    to, fixed = torch.from_numpy(best), torch.from_numpy(constant)
    sites = {site.key: _reduce_site(site, keep, gone, to, fixed) for site in view.sites}
    return Reduction(group=view.name, keep=keep, sites=sites)


def _reduce_site(site: SiteView, keep: Tensor, gone: Tensor, to: Tensor, fixed: Tensor) -> SiteReduction:
    """Let one kept channel (or a constant) stand for each that goes; behind a norm all of them, where one is no match.

    keep: (kept,). gone: (removed,). to: (removed,), place in `keep` of what stands for it. fixed: a constant does.
    """
    device, num = device_of(site), site.weight.shape[1]
    keep_here, gone, to, fixed = keep.to(device), gone.to(device), to.to(device), fixed.to(device)
    mix = selection(keep, num, device)
    if not site.mixes:
        return SiteReduction(mix=mix, offset=None)
    matrix = gram(site).to(device)
    partner = keep_here[to]
    square, cross = matrix[partner, partner], matrix[gone, partner]
    slope = torch.where((square > 0) & ~fixed, cross / torch.where(square > 0, square, 1.0), 0.0)
    mix[to, gone] = slope
    if not site.pairwise:
        own = matrix[gone, gone]
        left = (own - slope * cross).clamp_min(0.0)
        inexact = left > roundoff_floor(num) ** 2 * own
        if bool(inexact.any()):
            ridge, root = None if site.moments is None else site.moments.resolution, gram_root(site)
            if root is None:
                fitted = solve_mix(lambda r, c: matrix[r][:, c].double(), keep_here, num, ridge)
            else:
                fitted = solve_mix_of_root(root, keep_here)
            mix[:, gone[inexact]] = fitted[:, gone[inexact]]
    offset = mean_offset(moments_of(site).mean.to(device), keep_here, mix) if site.centred else None
    return SiteReduction(mix=mix, offset=offset)
