"""One channel replaces another: pairwise on incoming weights (data-free), and duplicate on activations.

Holds: the costs of replacing channel j by channel k or by a constant, and the greedy order over such costs.
Elsewhere: the symmetries themselves (numerics.activations), certificates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from apoptosis.criteria.views import (
    Criterion,
    GroupView,
    NeuronView,
    Ranking,
    column_squares,
    device_of,
    gram,
    offset_of,
    output_variance,
    selection,
)
from apoptosis.errors import NonFiniteError, ShapeError
from apoptosis.numerics.activations import Symmetry, neuron_type
from apoptosis.numerics.decompose import complement
from apoptosis.records import Reduction, SiteReduction

FloatArray = npt.NDArray[np.float64]
_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """For every ordered pair z_j ~= scale[j, k] z_k + shift[j, k] and what that costs, all (channels, channels).

    cost: infinite where no symmetry applies. constant, constant_cost: (channels,) z_j ~= constant[j] instead.
    """

    cost: FloatArray
    scale: FloatArray
    shift: FloatArray
    constant: FloatArray
    constant_cost: FloatArray


def _offsets_fold(view: GroupView) -> bool:
    return all(site.centred for site in view.sites)


def weight_pairs(neuron: NeuronView, *, offsets: bool) -> Pairs:
    """Worst-case cost of every merge, from incoming weights alone: L ‖w̃_j - s w̃_k‖ + jump, per unit of ‖(x, 1)‖.

    s runs over what the neuron type allows exactly: 1 for any; the best s > 0 for positively homogeneous types (PReLU:
    at equal slopes); -1 for odd and point-symmetric types, unless a max-pooling follows (it keeps the largest, and -1
    turns largest into smallest). A channel may also be replaced by φ(b_j), at L ‖w_j‖; exact for w_j = 0.

    Args:
        neuron: incoming weights and type.
        offsets: constants can be folded at every site; else only merges that need none are offered.

    Raises:
        ArgumentError: no such neuron type.
        ShapeError: slopes do not fit the weights.
        NonFiniteError: weights hold NaN or infinity.
    """
    kind = neuron_type(neuron.activation)
    args = kind.fill(neuron.args)
    w, slopes = _checked(neuron)
    num = w.shape[0]
    lipschitz = np.full(num, kind.lipschitz(*args)) if slopes is None else np.maximum(1.0, np.abs(slopes))
    cost, scale, shift = _nearest(w, kind.symmetry(*args), reflect=not neuron.max_pool, offsets=offsets)
    jump = kind.jump(*args)
    cost = cost * lipschitz[:, None] + np.where(cost > 0, jump, 0.0)
    if slopes is not None:
        cost = np.where(slopes[:, None] == slopes[None, :], cost, np.inf)
    np.fill_diagonal(cost, np.inf)
    bias = w[:, -1]
    constant = kind.phi(torch.from_numpy(bias.copy()), *args).numpy()
    if slopes is not None:
        constant = np.where(bias > 0, bias, slopes * bias)
    # From the weights themselves, not from squares: a dead neuron with a large bias has ‖w_j‖ = 0 exactly.
    without_bias = np.sqrt(np.square(w[:, :-1]).sum(1))
    constant_cost = lipschitz * without_bias + np.where(without_bias > 0, jump, 0.0)
    if not offsets:
        constant_cost = np.where(constant == 0.0, constant_cost, np.inf)
    return Pairs(cost=cost, scale=scale, shift=shift, constant=constant, constant_cost=constant_cost)


def _checked(neuron: NeuronView) -> tuple[FloatArray, FloatArray | None]:
    """Incoming weights (channels, F + 1) and slopes (channels,) or None, as finite float64 arrays."""
    w: FloatArray = neuron.incoming.detach().to("cpu", torch.float64).numpy()
    slopes: FloatArray | None = None
    if neuron.slopes is not None:
        if neuron.slopes.numel() not in (1, w.shape[0]):
            raise ShapeError(f"{neuron.slopes.numel()} slopes for {w.shape[0]} channels.")
        slopes = neuron.slopes.detach().to("cpu", torch.float64).flatten().expand(w.shape[0]).numpy()
    if not np.isfinite(w).all() or (slopes is not None and not np.isfinite(slopes).all()):
        raise NonFiniteError("incoming weights hold NaN or infinity.")
    return w, slopes


def _nearest(
    w: FloatArray, symmetry: Symmetry, *, reflect: bool, offsets: bool
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return min over s of ‖w_j - s w_k‖ over the s a symmetry allows, that s, and the constant that goes with it."""
    product = w @ w.T
    squares = product.diagonal()
    both = squares[:, None] + np.zeros_like(product)

    def distance(scale: FloatArray) -> FloatArray:
        other = np.square(scale) * squares[None, :]
        squared = both - 2.0 * scale * product + other
        # A difference of sums of squares is round-off below about eps (|w_j|² + s² |w_k|²): call that zero.
        return np.sqrt(np.where(squared <= 16.0 * _EPS * (both + other), 0.0, squared))

    scale, shift = np.ones_like(product), np.zeros_like(product)
    inverse = 1.0 / np.where(squares > 0, squares, 1.0)[None, :]
    if symmetry.homogeneous:
        scale = np.maximum(product, 0.0) * inverse
    cost = distance(scale)
    if symmetry.reflection is not None and reflect and (offsets or symmetry.reflection == 0.0):
        flipped = np.minimum(product, 0.0) * inverse if symmetry.homogeneous else -scale
        other = distance(flipped)
        better = other < cost
        cost, scale = np.where(better, other, cost), np.where(better, flipped, scale)
        shift = np.where(better, symmetry.reflection, 0.0)
    return cost, scale, shift


def moment_pairs(view: GroupView) -> tuple[Pairs, list[FloatArray]]:
    """Cost of every least-squares merge by one coefficient, summed over sites: ‖W_j‖² Var(z_j)(1 - ρ²) / energy.

    Returns: the pairs (scale and shift unused: they differ by site), and every site's Gram matrix.
    """
    num = view.num_channels
    total, grams = np.zeros((num, num)), []
    constant = np.zeros(num)
    for site in view.sites:
        matrix = gram(site).cpu().numpy()
        grams.append(matrix)
        scale = output_variance(site)
        share = column_squares(site.weight).numpy() / scale if scale > 0 else np.zeros(num)
        variance = matrix.diagonal().clip(min=0.0)
        explained = np.square(matrix) / np.where(variance > 0, variance, 1.0)[None, :]
        total += share[:, None] * (variance[:, None] - explained).clip(min=0.0)
        constant += share * variance
    np.fill_diagonal(total, np.inf)
    zeros = np.zeros((num, num))
    return Pairs(cost=total, scale=zeros, shift=zeros, constant=np.zeros(num), constant_cost=constant), grams


def merge_order(cost: FloatArray, constant_cost: FloatArray) -> tuple[npt.NDArray[np.int64], int]:
    """Remove, one after the other, the channel that is cheapest to replace by one that is left.

    The price of a channel includes that of those merged into it, which would have to be merged into another.

    Returns: channels, best to keep first, and how many have no replacement and have to be kept.
    """
    num = len(constant_cost)
    cost = cost.copy()
    price = np.minimum(cost.min(1), constant_cost) if num > 1 else constant_cost.copy()
    target = cost.argmin(1)
    carried = np.zeros(num)
    alive, removed = np.ones(num, dtype=bool), []
    for _ in range(num - 1):
        score = np.where(alive, price * (1.0 + carried), np.inf)
        j = int(score.argmin())
        if not np.isfinite(score[j]):
            break
        removed.append(j)
        alive[j] = False
        if price[j] < constant_cost[j]:
            carried[target[j]] += 1.0 + carried[j]
        cost[:, j] = np.inf
        stale = np.flatnonzero(alive & (target == j))
        if len(stale):
            target[stale] = cost[stale].argmin(1)
            price[stale] = np.minimum(cost[stale, target[stale]], constant_cost[stale])
    kept = np.flatnonzero(alive)
    held = price[kept] * (1.0 + carried[kept])
    best = kept[np.argsort(-np.where(np.isfinite(held), held, np.finfo(np.float64).max), kind="stable")]
    return np.concatenate([best, np.array(removed[::-1], dtype=np.int64)]).astype(np.int64), len(kept)


def targets(pairs: Pairs, keep: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
    """For every removed channel the place in `keep` of its replacement, and whether a constant is better."""
    rows = pairs.cost[removed.numpy()][:, keep.numpy()]
    best = rows.argmin(1).astype(np.int64)
    constant = pairs.constant_cost[removed.numpy()] <= rows[np.arange(len(best)), best]
    return torch.from_numpy(best), torch.from_numpy(constant)


def single_mix(gram: Tensor, keep: Tensor, removed: Tensor, to: Tensor, fixed: Tensor) -> Tensor:
    """Return the mix in which each removed channel is the least-squares multiple of one kept channel, or a constant.

    Args:
        gram: (channels, channels) float64.
        keep: (kept,), on the device of `gram` like all others.
        removed: (removed,).
        to: (removed,), place in `keep` of what replaces each.
        fixed: (removed,), whether a constant does instead.
    """
    mix = selection(keep, len(gram), gram.device)
    partner = keep[to]
    square, cross = gram[partner, partner], gram[removed, partner]
    mix[to, removed] = torch.where((square > 0) & ~fixed, cross / torch.where(square > 0, square, 1.0), 0.0)
    return mix


def _rank_pairwise(view: GroupView) -> Ranking:
    if view.neuron is None:
        return Ranking(order=torch.arange(view.num_channels, device="cpu"), min_keep=view.num_channels)
    pairs = weight_pairs(view.neuron, offsets=_offsets_fold(view))
    shares = _shares(view, view.neuron)
    seen = np.sum(shares, axis=0)
    with np.errstate(invalid="ignore"):  # 0 * inf: a channel that no site reads still has no partner
        cost = np.nan_to_num(seen[:, None] * pairs.cost, nan=np.inf, posinf=np.inf)
        constant = np.nan_to_num(seen * pairs.constant_cost, nan=np.inf, posinf=np.inf)
    order, min_keep = merge_order(cost, constant)
    curves = _pairwise_curves(view, torch.from_numpy(order), min_keep)
    return Ranking(order=torch.from_numpy(order), curves=curves, min_keep=max(1, min_keep))


def _shares(view: GroupView, neuron: NeuronView) -> list[FloatArray]:
    """Return the error at each site, relative, for a unit of every channel's worst-case error, (channels,) per site."""
    norms = [site.weight.detach().double().square().sum(0).sqrt().sum(1).cpu().numpy() for site in view.sites]
    kind = neuron_type(neuron.activation)
    size = kind.lipschitz(*kind.fill(neuron.args)) * neuron.incoming.detach().double().norm(dim=1).cpu().numpy()
    return [norm / max(float(np.sqrt(np.square(norm * size).sum())), 1e-300) for norm in norms]


def _pairwise_curves(view: GroupView, order: Tensor, min_keep: int) -> dict[str, Tensor]:
    """Return worst-case scores, where a site has no moments."""
    if view.neuron is None or all(site.moments is not None or site.measure is not None for site in view.sites):
        return {}
    pairs = weight_pairs(view.neuron, offsets=_offsets_fold(view))
    price, curves = _prices(pairs, order.numpy(), min_keep), {}
    for site, share in zip(view.sites, _shares(view, view.neuron), strict=True):
        curve = torch.from_numpy(price @ share)
        curve[:min_keep] = torch.inf
        curves[site.key] = curve
    return curves


def _prices(pairs: Pairs, order: npt.NDArray[np.int64], min_keep: int) -> FloatArray:
    """(channels + 1, channels): what each channel costs per unit of consumer weight when the first k stay."""
    num = len(order)
    table = np.zeros((num + 1, num))
    best = np.minimum(pairs.cost[:, order[:min_keep]].min(1, initial=np.inf), pairs.constant_cost)
    for k in range(min_keep, num + 1):
        gone = order[k:]
        table[k, gone] = best[gone]
        if k < num:
            best = np.minimum(best, pairs.cost[:, order[k]])
    return table


def _reduce_pairwise(view: GroupView, keep: Tensor) -> Reduction:
    mix = selection(keep, view.num_channels, torch.device("cpu"))
    shift = torch.zeros(view.num_channels, dtype=torch.float64, device="cpu")
    removed = complement(keep, view.num_channels)
    if view.neuron is not None and removed.numel():
        pairs = weight_pairs(view.neuron, offsets=_offsets_fold(view))
        best, constant = targets(pairs, keep, removed)
        for j, to, fixed in zip(removed.tolist(), best.tolist(), constant.tolist(), strict=True):
            k = int(keep[to])
            mix[to, j] = 0.0 if fixed else pairs.scale[j, k]
            shift[j] = pairs.constant[j] if fixed else pairs.shift[j, k]
    sites = {}
    for site in view.sites:
        device = device_of(site)
        offset = shift.to(device) if bool(shift.any()) else None
        sites[site.key] = SiteReduction(mix=mix.to(device), offset=offset)
    chain_rule = view.neuron is not None and not view.neuron.normalised
    return Reduction(group=view.name, keep=keep, sites=sites, merge=mix if chain_rule else None)


def _rank_duplicate(view: GroupView) -> Ranking:
    pairs, _ = moment_pairs(view)
    order, min_keep = merge_order(pairs.cost, pairs.constant_cost)
    return Ranking(order=torch.from_numpy(order), min_keep=max(1, min_keep))


def _reduce_duplicate(view: GroupView, keep: Tensor) -> Reduction:
    pairs, grams = moment_pairs(view)
    removed = complement(keep, view.num_channels)
    to, fixed = targets(pairs, keep, removed)
    sites = {}
    for site, matrix in zip(view.sites, grams, strict=True):
        mix = single_mix(torch.from_numpy(matrix), keep, removed, to, fixed).to(device_of(site))
        sites[site.key] = SiteReduction(mix=mix, offset=offset_of(site, keep, mix))
    return Reduction(group=view.name, keep=keep, sites=sites)


PAIRWISE = Criterion(
    name="pairwise",
    needs_data=False,
    rank=_rank_pairwise,
    reduce=_reduce_pairwise,
    summary="neurons whose incoming weights point the same way are merged, without any data",
    curves=_pairwise_curves,
)
DUPLICATE = Criterion(
    name="duplicate",
    needs_data=True,
    rank=_rank_duplicate,
    reduce=_reduce_duplicate,
    summary="channels whose activations are proportional are merged",
)
