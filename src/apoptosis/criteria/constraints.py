"""Constraints on the answer of any criterion: equally many channels of every row, no mix where none is allowed.

Holds: the rearranged order with its curves, the reduction cut down to what its sites allow, the step between
numbers kept. Elsewhere: any criterion, the search for the number kept (certificate.py).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from apoptosis.criteria.baselines import dropping_curve
from apoptosis.criteria.views import (
    Criterion,
    GroupView,
    Ranking,
    SiteView,
    cost_taps,
    cost_weight,
    relative_rms,
    selection,
    statistics,
)
from apoptosis.records import Group, Reduction, SiteReduction


def balanced(order: Tensor, rows: int) -> Tensor:
    """Rearrange an order so that every prefix of a multiple of `rows` holds equally many channels of every row.

    The best remaining channel of each row in turn; within a turn they come as in `order`.

    Args:
        order: (channels,) int64, best to keep first; channel c is in row c // (channels // rows).
        rows: number of rows of equal length.

    Example:
        >>> balanced(torch.tensor([0, 1, 4, 2, 3, 5]), 2).tolist()
        [0, 4, 1, 3, 2, 5]
    """
    row = torch.div(order, order.numel() // rows, rounding_mode="floor")
    turn = torch.zeros_like(order)
    for number in range(rows):
        places = (row == number).nonzero().squeeze(1)
        turn[places] = torch.arange(places.numel(), device=order.device)
    return order[torch.sort(turn, stable=True).indices]


def interleaved(criterion: Criterion, view: GroupView) -> Ranking:
    """Return a criterion's ranking, rearranged so that rows lose equally many channels, with the curves of that order.

    Raises: what the criterion raises.
    """
    ranking = criterion.rank(view)
    if view.rows > 1:
        order = balanced(ranking.order, view.rows)
        stay = torch.isin(order, ranking.order[: ranking.min_keep]).nonzero()
        least = int(stay.max()) + 1 if stay.numel() else 1
        least = -(-least // view.rows) * view.rows
        curves = {} if criterion.curves is None else criterion.curves(view, order, least)
        ranking = Ranking(order=order, curves=curves, min_keep=least)
    lost = {site.key: _lost_curve(site, ranking.order) for site in view.sites if not site.mixes and site.moments}
    return replace(ranking, curves={**ranking.curves, **lost}) if lost else ranking


def _lost_curve(site: SiteView, order: Tensor) -> Tensor:
    """Return the relative rms error of keeping the first k where the others are dropped."""
    covariance, mean = statistics(site)
    found = dropping_curve(covariance.addr_(mean, mean), cost_weight(site), order)
    return relative_rms(cost_taps(site) * found, site)


def allowed(view: GroupView, reduction: Reduction) -> Reduction:
    """Cut a reduction down to what its sites allow: no mixing between blocks, none at all, no offset that cannot fold.

    Where a mix was cut down, momenta no longer follow it by the chain rule, so that `merge` is dropped.
    """
    sites, whole = dict(reduction.sites), True
    for site in view.sites:
        found = sites[site.key]
        mix, offset = found.mix, found.offset if site.centred else None
        if not site.mixes:
            mix, offset = selection(reduction.keep, view.num_channels, mix.device), None
        elif site.blocks is not None:
            blocks = site.blocks.to(mix.device)
            mix = torch.where(blocks[reduction.keep.to(mix.device)][:, None] == blocks[None, :], mix, 0.0)
        whole = whole and mix is found.mix
        sites[site.key] = SiteReduction(mix=mix, offset=offset)
    return replace(reduction, sites=sites, merge=reduction.merge if whole else None)


def step_between(view: GroupView | Group, align: int) -> int:
    """Return the step between numbers kept: a multiple of align and of the rows.

    Where rows leave no such number below that of all channels, align gives way to its largest divisor that has one:
    granularity alone never stops a removal.

    Example:
        >>> import torch
        >>> from apoptosis.criteria import GroupView, SiteView
        >>> view = GroupView(name="g", num_channels=24, sites=(SiteView(key="s", weight=torch.ones(1, 24, 1)),), rows=3)
        >>> step_between(view, 1), step_between(view, 4), step_between(view, 16)
        (3, 12, 12)
    """
    if view.rows == 1 or align >= view.num_channels:
        return math.lcm(align, view.rows)
    steps = [math.lcm(divisor, view.rows) for divisor in range(align, 0, -1) if align % divisor == 0]
    return next((step for step in steps if step < view.num_channels), view.rows)
