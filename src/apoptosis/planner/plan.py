"""Moments become a plan with certificates; nothing of the user's is touched.

Lives here: how the tolerance of a site is shared out, and how one event's proposals become a plan. Does not live here:
how a criterion sees a group (views.py), when an event happens (policy), the surgery.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from apoptosis.criteria import Criterion, Proposal, choose
from apoptosis.numerics.decompose import roundoff_floor
from apoptosis.planner.views import Observations, Shown, dropped, show, worst_case
from apoptosis.records import Certificate, Group, Reduction, Structure


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
    """What one event would do.

    widths: group -> (before, after). macs: per forward pass of the example input. errors: group -> site key -> relative
    rms change of the site's output that the group is to blame for; certificates: group -> its certificates.
    """

    tolerance: float
    criterion: str
    reductions: tuple[Reduction, ...]
    certificates: Mapping[str, tuple[Certificate, ...]]
    widths: Mapping[str, tuple[int, int]]
    macs_before: float
    macs_after: float
    errors: Mapping[str, Mapping[str, float]]
    dropped_variance: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()

    @property
    def site_errors(self) -> dict[str, float]:
        """Relative rms change of every site's output, the errors of all groups it reads added up."""
        total: dict[str, float] = {}
        for errors in self.errors.values():
            for key, error in errors.items():
                total[key] = total.get(key, 0.0) + error
        return total

    def __str__(self) -> str:
        if not self.reductions:
            return "nothing to remove" + "".join(f"\n  {note}" for note in self.notes)
        lines = [
            f"tolerance {self.tolerance:g}, {self.criterion}: {self.macs_before:,.0f} -> {self.macs_after:,.0f} MACs"
        ]
        for name, (before, after) in self.widths.items():
            worst = max(self.errors[name].values(), default=0.0)
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
            "site_errors": self.site_errors,
            "notes": list(self.notes),
        }


def make_plan(model: nn.Module, structure: Structure, observations: Observations, request: Request) -> Plan:
    """Ask the criterion for as much as every unpinned group's sites allow.

    A site that reads several groups shares its tolerance out among them: the errors of all of them, added up, stay
    within it.

    Args:
        model: read only; its weights and the linear maps of its modules.
        structure: of the model.
        observations: by (group name, site key); groups that were not observed are left out, with a note.
        request: what the event may do.

    Raises: NonFiniteError: statistics or weights hold NaN or infinity.
    """
    open_groups = [group for group in structure.groups if group.pin is None]
    seen = [g for g in open_groups if all((g.name, site.key) in observations for site in g.sites)]
    notes = [f"{g.name}: not observed yet" for g in open_groups if g not in seen]
    shares = Counter(site.key for group in seen for site in group.sites)
    spent: dict[str, float] = {}
    proposals: dict[str, Proposal] = {}
    certificates: dict[str, tuple[Certificate, ...]] = {}
    lost: dict[str, Tensor] = {}
    for group in seen:
        shown = show(model, group, observations, request.seed)
        proposal, why = _propose(group, shown, request, spent, shares)
        shares.subtract(site.key for site in group.sites)
        if proposal is None:
            notes.append(f"{group.name}: {why}")
            continue
        proposals[group.name] = proposal
        certificates[group.name] = (*proposal.certificates(shown.view), *worst_case(group, shown.view, proposal))
        for key, error in proposal.errors.items():
            spent[key] = spent.get(key, 0.0) + error
        for site, view in zip(group.sites, shown.view.sites, strict=True):
            if site.norm is not None:
                own = dropped(view, proposal, shown.samples.get(site.key))
                lost[site.key] = own if site.key not in lost else lost[site.key] + own
    keeps = {name: len(p.reduction.keep) for name, p in proposals.items()}
    return Plan(
        tolerance=request.tolerance,
        criterion=request.criterion.name,
        reductions=tuple(p.reduction for p in proposals.values()),
        certificates=certificates,
        widths={g.name: (g.num_channels, keeps[g.name]) for g in seen if g.name in keeps},
        macs_before=structure.macs,
        macs_after=macs_after(structure, keeps),
        errors={name: p.errors for name, p in proposals.items()},
        dropped_variance=lost,
        notes=tuple(notes),
    )


def _propose(
    group: Group, shown: Shown, request: Request, spent: Mapping[str, float], shares: Mapping[str, int]
) -> tuple[Proposal | None, str]:
    """Make a proposal, or None and why not. spent: at each site by earlier groups; shares: groups still to come."""
    rows = min(site.moments.num_rows for site in shown.view.sites if site.moments is not None)
    least = max(1, min(request.align, group.num_channels), round((1 - request.max_drop) * group.num_channels))
    cap = request.allotted.get(group.name, request.tolerance)
    limits = {}
    for site in group.sites:
        left = request.allowance.get(site.key, float("inf")) - spent.get(site.key, 0.0)
        if left < roundoff_floor(group.num_channels):
            return None, "the sum of its errors over all events has reached the limit"
        free = request.tolerance - spent.get(site.key, 0.0)
        limits[site.key] = shown.ratios[site.key] * min(cap, max(0.0, min(free, left)) / shares[site.key])
    proposal = choose(request.criterion, shown.view, limits, align=request.align, min_keep=least)
    if proposal is None:
        return None, "no width that is a multiple of align= meets the tolerance"
    kept = len(proposal.reduction.keep)
    if request.criterion.needs_data and rows < request.rows_per_channel * kept:
        needed = request.rows_per_channel * kept
        return None, f"{rows} rows cannot tell the rank of {kept} kept channels: at least {needed} are needed"
    errors = {key: error / shown.ratios[key] for key, error in proposal.errors.items()}
    return replace(proposal, errors=errors), ""


def merged(certificates: Iterable[Certificate]) -> tuple[Certificate, ...]:
    """Certificates of several groups, those of one kind and site added up to one (triangle inequality)."""
    found: dict[tuple[str, str], Certificate] = {}
    for certificate in certificates:
        key = (certificate.kind, certificate.subject)
        if key in found:
            old = found[key]
            certificate = replace(old, value=old.value + certificate.value, rows=min(old.rows, certificate.rows))
        found[key] = certificate
    return tuple(found.values())


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
