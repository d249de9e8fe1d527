"""Moments become a plan with certificates; nothing of the user's is touched.

Lives here: how a group with its statistics is shown to a criterion, and how one event's proposals become a plan.
Does not live here: when an event happens (policy), what a criterion does (criteria), the surgery.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apoptosis.criteria import Criterion, GroupView, NeuronView, Proposal, SiteView, choose, dropped_variance
from apoptosis.numerics.activations import neuron_type
from apoptosis.numerics.bounds import worst_case_site_error
from apoptosis.observe import Observation, reads_several_positions
from apoptosis.records import Certificate, Group, Neuron, Reduction, Site, Structure
from apoptosis.sites import SampledSite, gather_weight, make_respond, num_blocks

Observations = Mapping[tuple[str, str], Observation]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What an event may do.

    tolerance: relative rms per site. allotted: the part of it that a group gets, by name; all of it where missing.
    allowance: what is left of a site's sum over all events, by site key.
    align: widths are rounded up to a multiple. max_drop: largest share of a group's channels one event removes.
    rows_per_channel: a width is only trusted when the window saw this many rows for every channel kept.
    """

    criterion: Criterion
    tolerance: float
    align: int
    max_drop: float
    seed: int
    allotted: Mapping[str, float] = field(default_factory=dict)
    allowance: Mapping[str, float] = field(default_factory=dict)
    rows_per_channel: int = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """What one event would do. widths: group -> (before, after); macs per forward pass of the example input."""

    tolerance: float
    criterion: str
    reductions: tuple[Reduction, ...]
    certificates: tuple[Certificate, ...]
    widths: Mapping[str, tuple[int, int]]
    macs_before: float
    macs_after: float
    site_errors: Mapping[str, float]
    site_group: Mapping[str, str]
    dropped_variance: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.reductions:
            return "nothing to remove" + "".join(f"\n  {note}" for note in self.notes)
        lines = [
            f"tolerance {self.tolerance:g}, {self.criterion}: {self.macs_before:,.0f} -> {self.macs_after:,.0f} MACs"
        ]
        for name, (before, after) in self.widths.items():
            worst = max((e for key, e in self.site_errors.items() if self.site_group[key] == name), default=0.0)
            lines.append(f"  {name}: {before} -> {after} channels, site error {worst:.3g} (relative rms)")
        lines.extend(f"  {note}" for note in self.notes)
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-able values, without the mixing matrices."""
        return {
            "tolerance": self.tolerance,
            "criterion": self.criterion,
            "widths": {name: list(pair) for name, pair in self.widths.items()},
            "macs_before": self.macs_before,
            "macs_after": self.macs_after,
            "site_errors": dict(self.site_errors),
            "notes": list(self.notes),
        }


def make_plan(model: nn.Module, structure: Structure, observations: Observations, request: Request) -> Plan:
    """Ask the criterion for as much as every unpinned group's sites allow.

    Args:
        model: read only; its weights and the linear maps of its modules.
        observations: by (group name, site key); groups that were not observed are left out, with a note.

    Raises: NonFiniteError: statistics or weights hold NaN or infinity.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    proposals: dict[str, Proposal] = {}
    certificates: list[Certificate] = []
    dropped: dict[str, Tensor] = {}
    notes: list[str] = []
    for group in structure.groups:
        if group.pin is not None:
            continue
        if any((group.name, site.key) not in observations for site in group.sites):
            notes.append(f"{group.name}: not observed yet")
            continue
        samples: dict[str, SampledSite] = {}
        view = _group_view(model, tensors, group, observations, request, samples)
        proposal, why = _propose(group, view, request)
        if proposal is None:
            notes.append(f"{group.name}: {why}")
            continue
        proposals[group.name] = proposal
        certificates += [*proposal.certificates(view), *_worst_case(group, view, proposal)]
        for site, shown in zip(group.sites, view.sites, strict=True):
            if site.norm is not None:
                dropped[site.key] = _dropped(shown, proposal, samples.get(site.key))
    keeps = {name: (len(p.reduction.keep)) for name, p in proposals.items()}
    groups = {g.name: g for g in structure.groups}
    return Plan(
        tolerance=request.tolerance,
        criterion=request.criterion.name,
        reductions=tuple(p.reduction for p in proposals.values()),
        certificates=tuple(certificates),
        widths={name: (groups[name].num_channels, kept) for name, kept in keeps.items()},
        macs_before=structure.macs,
        macs_after=macs_after(structure, keeps),
        site_errors={key: error for p in proposals.values() for key, error in p.errors.items()},
        site_group={key: name for name, p in proposals.items() for key in p.errors},
        dropped_variance=dropped,
        notes=tuple(notes),
    )


def _propose(group: Group, view: GroupView, request: Request) -> tuple[Proposal | None, str]:
    """A proposal, or None and why not."""
    rows = min(site.moments.num_rows for site in view.sites if site.moments is not None)
    least = max(1, min(request.align, group.num_channels), round((1 - request.max_drop) * group.num_channels))
    cap = request.allotted.get(group.name, request.tolerance)
    limits = {site.key: min(cap, request.allowance.get(site.key, cap)) for site in view.sites}
    if request.tolerance > 0 and min(limits.values()) <= 0:
        return None, "the sum of its errors over all events has reached the limit"
    proposal = choose(request.criterion, view, limits, align=request.align, min_keep=least)
    if proposal is None:
        return None, "no width that is a multiple of align= meets the tolerance"
    kept = len(proposal.reduction.keep)
    if request.criterion.needs_data and rows < request.rows_per_channel * kept:
        return None, f"{rows} rows cannot tell the rank of {kept} kept channels: at least {3 * kept} are needed"
    return proposal, ""


def _group_view(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    group: Group,
    observations: Observations,
    request: Request,
    samples: dict[str, SampledSite],
) -> GroupView:
    sites = []
    for site in group.sites:
        observation = observations[group.name, site.key]
        weight = tensors[site.weight]
        sample = None
        if reads_several_positions(site) and observation.sample is not None:
            module = model.get_submodule(site.module)
            sample = SampledSite(site, observation.sample, weight, make_respond(module, site), num_blocks(module))
            samples[site.key] = sample
        sites.append(
            SiteView(
                key=site.key,
                weight=gather_weight(site, weight),
                moments=observation.moments,
                centred=_takes_offset(site),
                dropout=site.dropout,
                measure=None if sample is None else sample.error,
                scale=None if sample is None else sample.scale,
            )
        )
    neuron = None if group.neuron is None else _neuron_view(model, tensors, group.neuron)
    return GroupView(
        name=group.name, num_channels=group.num_channels, sites=tuple(sites), neuron=neuron, seed=request.seed
    )


def _takes_offset(site: Site) -> bool:
    """Whether a constant can be folded exactly: something takes it, and no zero padding lies at the borders."""
    return not site.zero_padded and (site.bias is not None or site.norm is not None)


def _neuron_view(model: nn.Module, tensors: Mapping[str, Tensor], neuron: Neuron) -> NeuronView | None:
    """Incoming weights (channels, F + 1) with the bias last and an evaluation-mode BatchNorm folded in."""
    weight = tensors[neuron.weight].detach().double().movedim(neuron.dim, 0)
    incoming = weight.reshape(weight.shape[0], -1)
    bias = incoming.new_zeros(len(incoming)) if neuron.bias is None else tensors[neuron.bias].detach().double()
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
        slopes=None if neuron.slopes is None else tensors[neuron.slopes].detach().double(),
        max_pool=neuron.max_pool,
        normalised=neuron.norm is not None,
    )


def _worst_case(group: Group, view: GroupView, proposal: Proposal) -> list[Certificate]:
    """The data-free bound of exact-symmetry merges: for inputs with ‖(x, 1)‖ <= 1, per site."""
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


def _dropped(site: SiteView, proposal: Proposal, sample: SampledSite | None) -> Tensor:
    """diag(W R Wᵀ) at a site that a BatchNorm reads: what its running variance loses."""
    reduction = proposal.reduction.sites[site.key]
    if sample is not None:
        sample.error(proposal.reduction.keep, reduction)
        if sample.dropped is not None:
            return sample.dropped
    return dropped_variance(site, proposal.reduction.keep, reduction)


def macs_after(structure: Structure, keeps: Mapping[str, int]) -> float:
    """Multiply-adds of a forward pass once groups have the given widths: exact for contractions of two edited axes.

    Every contraction costs rows times columns times positions, so its cost shrinks by the product of the shares that
    stay along each of its axes.
    """
    total: dict[str, float] = {}
    share: dict[tuple[str, int], float] = {}
    for group in structure.groups:
        axes = [(m.tensor, m.dim, m.positions.shape[1], m.macs) for m in group.members if m.role == "producer"]
        axes += [(s.weight, s.dim, s.columns.shape[1], s.macs) for s in group.sites]
        for tensor, dim, positions, macs in axes:
            size = structure.shapes[tensor][dim]
            total[tensor] = max(total.get(tensor, 0.0), macs / max(positions, 1) * size)
            removed = group.num_channels - keeps.get(group.name, group.num_channels)
            key = (tensor, dim)
            share[key] = share.get(key, 1.0) - removed * positions / size
    saved = 0.0
    for tensor, macs in total.items():
        left = 1.0
        for (name, _), part in share.items():
            if name == tensor:
                left *= part
        saved += macs * (1.0 - left)
    return structure.macs - saved
