"""How a group with its statistics is shown to a criterion, and what a proposal means for its sites.

Holds: views, the scale that errors of a shared site relate to, worst cases, dropped variances. Elsewhere:
how many channels are removed (proposals.py), what a criterion does (criteria).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from apoptosis.criteria import GroupView, NeuronView, Proposal, SiteView, dropped_variance
from apoptosis.criteria.views import column_squares, moments_of, output_variance
from apoptosis.modules.norms import statistics_of
from apoptosis.numerics.activations import neuron_type
from apoptosis.numerics.bounds import worst_case_site_error
from apoptosis.numerics.moments import Moments
from apoptosis.numerics.sketch import sketched
from apoptosis.observe import Observation, needs_whole_inputs
from apoptosis.observe.linear_map import SampledSite, gather_weight, read_weight, sampled_site
from apoptosis.planner.products import show_product
from apoptosis.records import Certificate, Group, LinearSite, Neuron, NormSite, ProductSite

BY_THE_LOSS = "of the output, weighted by the gradient of the loss"
CONSTANT_SHARE = 4.0  # of the channels' mean square: weight of a constant channel that is fitted with them
OUTPUTS_ROWS = 128
_ROWS = 64  # that are taken to float64 at once
OUTPUTS_SHARE = 0.01  # share of unweighted outputs beside those weighted by gradients (docs/research.md)

Observations = Mapping[tuple[str, str], Observation]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupData:
    """A group as its criterion sees it, and what the planner needs beside that.

    samples: by site key, for sites that are measured on whole inputs. ratios: by site key, the rms of the site's whole
    output over that of the group's contribution: a criterion's error relates to the latter, and is divided by it.
    """

    view: GroupView
    samples: Mapping[str, SampledSite]
    ratios: Mapping[str, float]


def make_view(
    model: nn.Module,
    group: Group,
    observations: Observations,
    seed: int,
    *,
    grad_factor: bool = False,
    neurons: bool = True,
) -> GroupData:
    """Return what a criterion sees of a group, all sites of which were observed.

    Args:
        model: as it is now.
        group: to be shown.
        observations: by (group name, site key).
        seed: of random choices about it.
        grad_factor: weight errors by the gradient of the loss, where gradients were observed.
        neurons: include how the channels are computed.
    """
    grad_factor = grad_factor and not group.under_norm
    views: list[SiteView] = []
    samples: dict[str, SampledSite] = {}
    ratios: dict[str, float] = {}
    for site in group.sites:
        seen = observations[group.name, site.key]
        ratios[site.key] = 1.0
        match site:
            case ProductSite():
                views.append(show_product(site, seen, group.rows))
            case NormSite():
                views.append(_show_norm(site, seen, model.get_submodule(site.module)))
            case LinearSite():
                weight, sample = _tensor(model, site.weight), None
                if needs_whole_inputs(site) and seen.sample is not None and (seen.dropout == 0.0 or site.is_complex):
                    sample = sampled_site(model.get_submodule(site.module), site, seen.sample, weight)
                    samples[site.key] = sample
                views.append(_show_linear(site, seen, weight, sample, grad_factor=grad_factor))
                ratios[site.key] = _ratio(site, views[-1], seen, weight)
    neuron = None if group.neuron is None or not neurons else _neuron_view(model, group.neuron)
    view = GroupView(
        name=group.name,
        num_channels=group.num_channels,
        sites=tuple(views),
        neuron=neuron,
        seed=seed,
        rows=group.rows,
    )
    return GroupData(view=view, samples=samples, ratios=ratios)


def _show_linear(
    site: LinearSite, seen: Observation, weight: Tensor, sample: SampledSite | None, *, grad_factor: bool
) -> SiteView:
    """Show a linear layer or convolution; sample: where it was measured on whole inputs."""
    gathered = gather_weight(site, weight)
    rows = blended(seen.grad_factor, gathered) if grad_factor else None
    return SiteView(
        key=site.key,
        weight=gathered,
        moments=_with_constant(seen.moments) if site.normal is not None and site.normal.centred else seen.moments,
        centred=_takes_offset(site, weight),
        dropout=seen.dropout,
        measure=None if sample is None else sample.error,
        scale=None if sample is None else sample.scale,
        grad_factor=rows,
        note=BY_THE_LOSS if rows is not None else "",
    )


def _with_constant(moments: Moments) -> Moments:
    """Return moments of the channels with a constant added, so that the weights of every mix add up to about one.

    Rows of a weight that have mean zero keep it only where the mix of every removed channel adds up to one.
    """
    found, rows = moments.in_float64(), moments.num_rows
    size = float((moments.variances() + moments.mean.square()).mean()) if rows else 0.0
    if size > 0.0 and rows:
        height = (CONSTANT_SHARE * size * (rows + 2) / 2) ** 0.5
        step = torch.full((1, found.num_channels), height, dtype=torch.float64, device=found.device)
        found.update(torch.cat([step, -step]), exact=moments.exact)
    return found.counted(rows, moments.num_examples)


def blended(grad_factor: Tensor | None, weight: Tensor) -> Tensor | None:
    """Return V, VᵀV = E[g gᵀ] with a share of WᵀW, both of mean diagonal 1; None without gradients or where all are 0.

    The gradients of one window miss directions that matter to the loss later on, and the weights have them. A few rows
    are enough for this small share.

    Args: grad_factor: (rows, channels). weight: (out, channels, P).
    Returns: (rows, channels) float32.
    """
    if grad_factor is None:
        return None
    flat = weight.detach().to(grad_factor.device).permute(0, 2, 1).reshape(-1, weight.shape[1])
    plain = sketched(flat, OUTPUTS_ROWS, 0)
    size, share = (float(column_squares(rows[:, :, None]).mean()) for rows in (grad_factor, plain))
    if not (0 < size < math.inf and 0 < share < math.inf):
        return None
    out, start = grad_factor.new_empty(len(grad_factor) + len(plain), grad_factor.shape[1], dtype=torch.float32), 0
    for rows, scale in ((grad_factor, size**-0.5), (plain, (OUTPUTS_SHARE / share) ** 0.5)):
        for part in torch.split(rows, _ROWS):
            torch.mul(part.double(), scale * (1.0 + OUTPUTS_SHARE) ** -0.5, out=out[start : start + len(part)])
            start += len(part)
    return out


def _show_norm(site: NormSite, seen: Observation, module: nn.Module) -> SiteView:
    """Show a norm by the statistics that it takes: every channel, weighted by how many it represents."""
    found, plain = statistics_of(module), site.strategy in ("plain", "response")
    counts = found.mean_weights if site.strategy == "response" else found.square_weights.sqrt()
    counts = counts.to(seen.moments.device)
    return SiteView(
        key=site.key,
        weight=counts[torch.as_tensor(site.columns[:, 0], device=counts.device)].diag()[:, :, None],
        moments=seen.moments,
        centred=not plain,
        dropout=seen.dropout,
        mixes=site.strategy != "plain",
        pairwise=True,
        note="of the channels that a norm takes its statistics of",
    )


def _ratio(site: LinearSite, shown: SiteView, seen: Observation, weight: Tensor) -> float:
    """Rms of the site's whole output over the rms of what the group contributes to it."""
    if seen.whole is None:
        return 1.0
    moved = read_weight(site, weight)
    moved = moved if moved.dtype in (torch.float32, torch.float64) else moved.float()
    moved = moved.reshape(*moved.shape[:2], -1)
    own = output_variance(replace(shown, grad_factor=None))  # both by the weights alone
    whole = output_variance(SiteView(key=site.key, weight=moved, moments=seen.whole, dropout=seen.dropout))
    return float((whole / own) ** 0.5) if own > 0.0 and whole > 0.0 else 1.0


def _takes_offset(site: LinearSite, weight: Tensor) -> bool:
    """Whether a constant can be folded exactly: into a bias or a BatchNorm, and without zero padding at the borders.

    One slice of a stacked weight, or a weight of more axes, has no bias of one number per output.
    """
    if site.functional and site.conv is None and (site.select or weight.dim() != 2):
        return False
    if site.is_complex:
        return False
    return not site.zero_padded and (site.bias is not None or site.norm is not None)


def _tensor(model: nn.Module, name: str) -> Tensor:
    """Return one parameter or buffer by its name; walking through all of them for every group takes long."""
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    parameter = owner._parameters.get(leaf)
    found = owner._buffers[leaf] if parameter is None else parameter
    if found is None:
        raise KeyError(name)
    return found


def _neuron_view(model: nn.Module, neuron: Neuron) -> NeuronView | None:
    """Incoming weights (channels, F + 1) with the bias last and an evaluation-mode BatchNorm folded in."""
    weight = _tensor(model, neuron.weight).detach()
    if weight.is_complex():
        return None
    weight = weight.double().movedim(neuron.dim, 0)
    incoming = weight.reshape(weight.shape[0], -1)
    bias = incoming.new_zeros(len(incoming)) if neuron.bias is None else _tensor(model, neuron.bias).detach().double()
    if neuron.norm is not None:
        norm: Any = model.get_submodule(neuron.norm)
        if norm.running_mean is None:
            return None
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        shift = -norm.running_mean.double() * scale
        if norm.weight is not None:
            scale, shift = scale * norm.weight.detach().double(), shift * norm.weight.detach().double()
        if norm.bias is not None:
            shift = shift + norm.bias.detach().double()
        incoming, bias = incoming * scale[:, None], bias * scale + shift
    return NeuronView(
        incoming=torch.cat([incoming, bias[:, None]], 1),
        activation=neuron.activation,
        args=neuron.args,
        slopes=None if neuron.slopes is None else _tensor(model, neuron.slopes).detach().double(),
        max_pool=neuron.max_pool,
        normalised=neuron.norm is not None,
    )


def worst_case(group: Group, view: GroupView, proposal: Proposal) -> list[Certificate]:
    """Return the data-free bounds of merges by an exact symmetry, per site: for inputs with ‖(x, 1)‖ <= 1."""
    merge, neuron = proposal.reduction.merge, view.neuron
    if merge is None or neuron is None or neuron.slopes is not None:
        return []
    kind = neuron_type(neuron.activation)
    args = kind.fill(neuron.args)
    merge = merge.to(neuron.incoming)
    partner = merge.T @ neuron.incoming[proposal.reduction.keep.to(merge.device)]
    count = merge.ne(0).sum(0)
    constant = neuron.incoming.clone()
    constant[:, :-1] = 0.0
    target = torch.where((count > 0)[:, None], partner, constant)
    distance = (neuron.incoming - target).norm(dim=1)
    distance[proposal.reduction.keep.to(distance.device)] = 0.0
    deviation = kind.lipschitz(*args) * distance
    jump = torch.where(distance > 0, kind.jump(*args), 0.0)
    found = []
    for site in view.sites:
        flat = site.weight.detach().double().permute(0, 2, 1).reshape(-1, group.num_channels)
        value = worst_case_site_error(flat, deviation, 1.0, jump)
        note = "absolute, for inputs of each neuron with norm of (x, 1) at most 1"
        found.append(Certificate(kind="worst_case", subject=site.key, value=value, note=note))
    return found


def dropped(site: SiteView, proposal: Proposal, sample: SampledSite | None) -> Tensor:
    """Return what the variance of every output of a site loses, (out,), which a running variance loses as well.

    Exact for outputs of this group alone; with least squares it is diag(W R Wᵀ).
    """
    keep, reduction = proposal.reduction.keep, proposal.reduction.sites[site.key]
    if sample is not None:
        sample.error(keep, reduction)
        if sample.dropped is not None:
            return sample.dropped
    if site.num_taps > 1:
        return dropped_variance(site, keep, reduction)
    moments = moments_of(site)
    weight = site.weight[:, :, 0].detach().to(moments.device, torch.float64)
    after = moments.select(keep.to(moments.device)).energies(weight @ reduction.mix.to(weight).T)
    return moments.energies(weight) - after
