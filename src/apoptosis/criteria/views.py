"""What a criterion gets and returns: names, numbers and tensors, never modules.

Holds: SiteView, NeuronView, GroupView (in), Ranking and Criterion (out), and the plain statistics of a site.
Elsewhere: any choice of channels; how a view is made from modules and moments (planner).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from apoptosis.errors import ArgumentError, ShapeError
from apoptosis.numerics.decompose import Blocks, mean_offset
from apoptosis.numerics.linalg import Factor, roundoff_floor
from apoptosis.numerics.moments import Moments
from apoptosis.records import Reduction, SiteReduction

_OUTPUTS = 64  # of a weight that are taken to float64 at once

Measure = Callable[[Tensor, SiteReduction], float]
"""(keep, reduction at this site) -> E‖W(z - ẑ)‖² on sampled inputs, in the units of `scale`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SiteView:
    """One consumer site as a linear map with the moments of what it reads.

    key: of the site (records.Site). weight: (out, channels, P) float, the consumer's columns of every channel, kernel
    taps and owned columns side by side (P = 1 for Linear and 1x1). moments: of the channels, pooled over positions;
    None for a data-free criterion. centred: an offset can be folded exactly here (a bias or a normalisation to take it,
    no zero padding). dropout: p of an elementwise dropout that the moments were observed behind. measure: exact error
    on sampled inputs, for sites with P > 1, where pooled moments give only an estimate. scale: the energy that errors
    relate to, where it is not E‖W(z - μ)‖² by the moments; measure needs it. blocks: (channels,) int64, or None for one
    block. Channels of different blocks never replace one another (products of activations: other heads).
    pairwise: a removed channel is a multiple of one kept channel, plus a constant (under a norm); never of several.
    mixes: False where removed channels can only be dropped. note: what the errors relate to, for the certificate; ""
    for the output of a linear map. grad_factor: V (rows, channels): an error r of the channels costs ‖V r‖² instead of
    ‖W r‖²; VᵀV is the second moment of the loss's gradients. None where all outputs have the same weight.
    """

    key: str
    weight: Tensor
    moments: Moments | None = None
    centred: bool = True
    dropout: float = 0.0
    measure: Measure | None = None
    scale: float | None = None
    blocks: Tensor | None = None
    mixes: bool = True
    pairwise: bool = False
    note: str = ""
    grad_factor: Tensor | None = None
    memo: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.weight.ndim != 3:
            raise ShapeError(f"site '{self.key}': weight of shape {tuple(self.weight.shape)}, expected (out, C, P).")
        if self.moments is not None and self.moments.num_channels != self.weight.shape[1]:
            raise ShapeError(f"site '{self.key}': moments of {self.moments.num_channels} channels, weight of others.")
        if self.measure is not None and self.scale is None:
            raise ArgumentError(f"site '{self.key}': give measure and scale together.")
        if self.grad_factor is not None and (
            self.grad_factor.ndim != 2 or self.grad_factor.shape[1] != self.weight.shape[1]
        ):
            raise ShapeError(
                f"site '{self.key}': grad_factor of shape {tuple(self.grad_factor.shape)} for its channels."
            )

    @property
    def num_taps(self) -> int:
        """P: positions of one channel that one output reads."""
        return int(self.weight.shape[2])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NeuronView:
    """How the channels are computed: z = φ(w̃ · (x, 1)).

    incoming: (channels, F + 1), incoming weights with the bias as the last column, a BatchNorm folded in.
    activation, args: as in numerics.activations. slopes: (channels,) of a PReLU. max_pool: one lies between φ and a
    site. normalised: a BatchNorm was folded in, so that raw weights do not follow the merge's chain rule.
    """

    incoming: Tensor
    activation: str
    args: tuple[float, ...] = ()
    slopes: Tensor | None = None
    max_pool: bool = False
    normalised: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupView:
    """One coupled channel group. seed: of every random choice about it.

    rows: the channels fall into so many rows of equal length, in order, and equally many of each are kept.
    """

    name: str
    num_channels: int
    sites: tuple[SiteView, ...]
    neuron: NeuronView | None = None
    seed: int = 0
    rows: int = 1

    def __post_init__(self) -> None:
        if self.rows < 1 or self.num_channels % self.rows:
            raise ShapeError(f"group '{self.name}': {self.num_channels} channels do not fall into {self.rows} rows.")
        if not self.sites:
            raise ArgumentError(
                f"group '{self.name}' has no consumer site, into which a removed channel could be folded."
            )
        for site in self.sites:
            if site.weight.shape[1] != self.num_channels:
                raise ShapeError(f"group '{self.name}' has {self.num_channels} channels, site '{site.key}' others.")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ranking:
    """An order of the channels and, where the criterion knows it, what every number kept costs.

    order: (channels,) int64, best to keep first. curves: site key -> (channels + 1,) relative rms error with the
    first k of the order kept; exact for P = 1, with a factor sqrt(P) to spare beyond; a data-free worst-case score when
    the site has no moments.
    Sites left out have to be tried. min_keep: fewer cannot be reduced to by this criterion. factor: of the only site's
    Gram matrix in this order, where the criterion folds by least squares from it; dropped once a width was chosen.
    """

    order: Tensor
    curves: Mapping[str, Tensor] = field(default_factory=dict)
    min_keep: int = 1
    factor: Factor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Criterion:
    """A way of removing channels, as a value.

    rank(view) orders the channels; reduce(view, keep) says how the kept ones replace the others, for any sorted
    keep. needs_data: every site needs moments. summary: one line for humans.
    curves(view, order, min_keep), optional: what Ranking.curves says, for an order that is not the criterion's own
    (equally many of every row); without it the number kept is found by trying. min_keep: as in the criterion's ranking.
    neurons: whether it reads GroupView.neuron, which is None for a criterion that does not.
    """

    name: str
    needs_data: bool
    rank: Callable[[GroupView], Ranking]
    reduce: Callable[[GroupView, Tensor], Reduction]
    summary: str = ""
    curves: Callable[[GroupView, Tensor, int], Mapping[str, Tensor]] | None = None
    grad_factor: bool = False
    tolerance: float = 0.025
    neurons: bool = True


def statistics(site: SiteView) -> tuple[Tensor, Tensor]:
    """Return covariance (channels, channels) and mean (channels,) of a site as observed, float64.

    Behind dropout they stay as they are: what they say about any mix is an upper bound in expectation, and stable
    (Theorem "Dropout correction"). Taking the dropout out leaves noise on the off-diagonals that a least-squares fit
    turns into large weights and a certificate of zero.

    Raises: ArgumentError: the site has no moments.
    """
    moments = moments_of(site)
    return moments.covariance(), moments.mean


def moments_of(site: SiteView) -> Moments:
    """Return a site's moments. Raises: ArgumentError: it has none."""
    if site.moments is None:
        raise ArgumentError(f"site '{site.key}' has no moments; this criterion needs data.")
    return site.moments


def gram(site: SiteView) -> Tensor:
    """Return what least squares works on: the covariance where an offset can be folded, else the second moment.

    Only its diagonal where no mix is allowed. A new tensor, (channels, channels).
    """
    moments = moments_of(site)
    if not site.mixes:
        return (moments.variances() if site.centred else moments.variances() + moments.mean.square()).diag()
    return moments.covariance() if site.centred else moments.second_moment()


def gram_blocks(site: SiteView) -> Blocks:
    """Return what gives blocks of `gram`, where channels mix, without writing the whole of it out."""
    moments = moments_of(site)
    mean = moments.mean

    def block(rows: Tensor, columns: Tensor) -> Tensor:
        found = moments.covariances(rows, columns)
        return found if site.centred else found.addr_(mean[rows.to(mean.device)], mean[columns.to(mean.device)])

    return block


def column_squares(weight_OCP: Tensor) -> Tensor:
    """Return ‖W_j‖² over outputs and taps, (channels,) float64 on the CPU; a few outputs in float64 at a time."""
    found = torch.zeros(weight_OCP.shape[1], dtype=torch.float64, device=weight_OCP.device)
    for part in torch.split(weight_OCP.detach(), _OUTPUTS):
        found += part.double().square().sum((0, 2))
    return found.cpu()


def flat_weight(site: SiteView, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the weight as (out * P, channels): taps stacked as if they were outputs."""
    return site.weight.detach().to(dtype).permute(0, 2, 1).reshape(-1, site.weight.shape[1])


def cost_weight(site: SiteView, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return V (rows, channels) with which an error r costs ‖V r‖²: the flat weight, or `grad_factor`.

    Costs of a site with several taps are then per tap; see cost_taps.
    """
    return flat_weight(site, dtype) if site.grad_factor is None else site.grad_factor.detach().to(dtype)


def cost_taps(site: SiteView) -> int:
    """Return how many costs of one position an error may amount to: P where outputs add up taps, else 1."""
    return site.num_taps if site.grad_factor is None else 1


def output_variance(site: SiteView) -> float:
    """Return what relative errors at a site relate to: tr(V C Vᵀ), V its cost_weight.

    For V = W the centred energy of its output, bias excluded.
    `scale` where it was measured; from pooled moments with P > 1 the sum over taps Σ_p tr(W_p C W_pᵀ), which is an
    estimate (exact for taps that are not correlated). Without the part that is dropout's own noise, so that a bound
    relates to what the network computes in evaluation.

    Raises: ArgumentError: the site has no moments.
    """
    if site.scale is not None and site.grad_factor is None:
        return site.scale
    if "energy" not in site.memo:
        moments = moments_of(site)
        moments = moments.without_dropout(site.dropout) if site.dropout > 0 else moments
        found = moments.energies(cost_weight(site, working_dtype(site)))
        site.memo["energy"] = float(found.sum().clamp_min(0.0))
    return site.memo["energy"]


def working_dtype(site: SiteView) -> torch.dtype:
    """Return float64 for moments taken exactly, else float32: sums of squares there know no more than that anyway."""
    return torch.float64 if site.moments is None or site.moments.exact else torch.float32


def relative_rms(errors: Tensor, site: SiteView) -> Tensor:
    """Turn mean squared errors at a site, of any shape, into relative rms: sqrt(error / energy).

    Where the energy is round-off (around a large mean: relative to the uncentred energy), the output is a constant:
    0.0 for errors that are round-off too, infinity for others.
    """
    scale = output_variance(site)
    if "level" not in site.memo:
        site.memo["level"] = scale
        if site.moments is not None:
            mean = site.moments.mean
            dtype = working_dtype(site)
            constant = cost_weight(site, dtype).to(mean.device) @ mean.to(dtype)
            site.memo["level"] += float(constant.double().square().sum())
    tiny = roundoff_floor(site.weight.shape[1]) ** 2 * site.memo["level"]
    if scale <= tiny:
        return torch.where(errors <= tiny, 0.0, torch.inf).double()
    return (errors.double().clamp_min(0.0) / scale).sqrt()


def roundoff_tolerance(site: SiteView) -> float:
    """Return the relative rms that stands for tolerance 0 at a site: round-off, relative to what the errors relate to.

    Least squares without an offset works on the uncentred second moment, and its round-off is that of tr(W S Wᵀ), which
    a large mean puts far above the centred energy.
    """
    floor = roundoff_floor(site.weight.shape[1])
    if site.centred or site.moments is None:
        return floor
    if "floor" not in site.memo:
        site.memo["floor"] = floor * _share_of_mean(site, site.moments)
    return site.memo["floor"]


def _share_of_mean(site: SiteView, moments: Moments) -> float:
    """Return the root of the uncentred energy of a site's output over what its errors relate to, at least 1."""
    weight, mean = cost_weight(site).to(moments.device), moments.mean
    varying = float(moments.energies(cost_weight(site, working_dtype(site))).sum())
    constant = float((weight @ mean).square().sum())
    scale = varying if site.scale is None or site.measure is not None else site.scale
    return float(max(1.0, (varying + constant) / scale) ** 0.5) if scale > 0.0 else 1.0


def selection(keep: Tensor, num_channels: int, device: torch.device) -> Tensor:
    """Return the mix (kept, channels) that keeps the kept channels and drops the others."""
    mix = torch.zeros(keep.numel(), num_channels, dtype=torch.float64, device=device)
    mix[torch.arange(keep.numel(), device=device), keep.to(device)] = 1.0
    return mix


def offset_of(site: SiteView, keep: Tensor, mix: Tensor) -> Tensor | None:
    """Return the constants that a mix leaves, mean - mean[keep] @ mix, 0 for kept channels; None if none can fold."""
    if not site.centred:
        return None
    return mean_offset(moments_of(site).mean.to(mix.device), keep.to(mix.device), mix)


def device_of(site: SiteView) -> torch.device:
    """Return the device of a site's mix and offset: that of its moments, else of its weight."""
    return site.moments.device if site.moments is not None else site.weight.device
