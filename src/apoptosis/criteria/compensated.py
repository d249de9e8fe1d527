"""Channels under norms: a removed one is a multiple of one kept channel, or a constant, wherever a norm reads it.

Holds: the criterion for groups that norms read, made of another one. Elsewhere: what the norms make of it
(apoptosis.modules.norms), when it is asked for (planner).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from apoptosis.criteria.exact import gram_root
from apoptosis.criteria.merging import Pairs, merge_order, moment_pairs, single_mix, targets
from apoptosis.criteria.views import Criterion, GroupView, Ranking, SiteView, device_of, gram, offset_of, selection
from apoptosis.numerics.decompose import complement, solve_mix, solve_mix_of_root
from apoptosis.numerics.linalg import roundoff_floor
from apoptosis.records import Reduction, SiteReduction

_SHARE_OF_READERS = 1e-3  # errors at norms cannot be corrected elsewhere, so other readers only break ties


def compensated(criterion: Criterion) -> Criterion:
    """Return the criterion for groups that norms read, under the name of the one that the user chose.

    The norms decide which kept channel, or which constant, replaces a removed one. Readers behind them use the same
    channel where it is exact, else a least-squares mix of all kept ones: the output of a LayerNorm at a channel that is
    always zero is a mix of all others (theory, Theorem 25).
    """
    known: list[tuple[GroupView, Pairs]] = []  # of the last view: a search asks for its reductions many times

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
    """Return the cost of every merge: the errors of norms, and a small share of those of their readers."""
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
    to, fixed = targets(pairs, keep, gone)
    sites = {site.key: _reduce_site(site, keep, gone, to, fixed) for site in view.sites}
    return Reduction(group=view.name, keep=keep, sites=sites)


def _reduce_site(site: SiteView, keep: Tensor, removed: Tensor, to: Tensor, fixed: Tensor) -> SiteReduction:
    """Replace each removed channel by one kept channel or a constant; behind a norm by a mix, where one is no match.

    keep: (kept,). removed: (removed,). to: (removed,), place in `keep` of what replaces it. fixed: a constant does.
    """
    device, num = device_of(site), site.weight.shape[1]
    if not site.mixes:
        return SiteReduction(mix=selection(keep, num, device), offset=None)
    keep, removed, to, fixed = keep.to(device), removed.to(device), to.to(device), fixed.to(device)
    matrix = gram(site).to(device)
    mix = single_mix(matrix, keep, removed, to, fixed)
    if not site.pairwise:
        own = matrix[removed, removed]
        left = (own - mix[to, removed] * matrix[removed, keep[to]]).clamp_min(0.0)
        inexact = left > roundoff_floor(num) ** 2 * own
        if bool(inexact.any()):
            ridge, root = None if site.moments is None else site.moments.resolution, gram_root(site)
            if root is None:
                fitted = solve_mix(lambda r, c: matrix[r][:, c].double(), keep, num, ridge)
            else:
                fitted = solve_mix_of_root(root, keep)
            mix[:, removed[inexact]] = fitted[:, removed[inexact]]
    return SiteReduction(mix=mix, offset=offset_of(site, keep, mix))
