"""Moments become a plan with certificates; nothing of the user's is touched.

Holds: how the tolerance of a site is shared out, and how one event's proposals become a plan. Elsewhere:
how a criterion sees a group (views.py), which groups exclude one another (conflicts.py) or go along (tied.py), what
widths cost (costs.py), when an event happens (policy), the surgery.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from apoptosis.criteria import Criterion, Proposal, Ranking, choose, compensated, interleaved
from apoptosis.distributed.ranks import Ranks
from apoptosis.distributed.sharded import summon_full_params
from apoptosis.numerics.linalg import roundoff_floor
from apoptosis.observe import Observation
from apoptosis.planner.assignment import owners
from apoptosis.planner.conflicts import compatible_sets, entangled, most_readers
from apoptosis.planner.costs import macs_after
from apoptosis.planner.reasons import Why, missed_tolerance, too_few_rows, unseen, used_up
from apoptosis.planner.tied import alike, missing, own_share, share_of_row, steps
from apoptosis.planner.views import GroupData, Observations, dropped, make_view, worst_case
from apoptosis.records import Certificate, Group, Reduction, Structure


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What an event may do.

    tolerance: relative rms per site. allotted: the part of it that a group gets, by name; all of it where missing.
    remaining_error: what is left of a site's sum over all events, by site key.
    align: widths are rounded up to a multiple. max_drop: largest share of a group's channels one event removes.
    rows_per_channel: a width is only trusted when the window saw this many rows for every channel kept.
    waiting: groups that are left for a later event though they were observed, and why.
    """

    criterion: Criterion
    tolerance: float
    align: int
    max_drop: float
    seed: int
    allotted: Mapping[str, float] = field(default_factory=dict)
    remaining_error: Mapping[str, float] = field(default_factory=dict)
    rows_per_channel: int = 3
    waiting: Mapping[str, Why] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """What one event would do.

    widths: group -> (before, after). macs: of a forward pass on the example input;
    what `Apoptosis.plan` returns has them per example. errors: group -> site key -> relative
    rms change of the site's output that the group is to blame for; certificates: group -> its certificates.
    left: open groups that the plan leaves as they are -> why.
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
    left: Mapping[str, Why] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """One line for every group that the plan leaves as it is."""
        return tuple(f"{name}: {why.text}" for name, why in self.left.items())

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
            f"tolerance {self.tolerance:g}, {self.criterion}: "
            f"{self.macs_before:,.0f} -> {self.macs_after:,.0f} multiply-adds"
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


def make_plan(
    model: nn.Module,
    structure: Structure,
    observations: Observations,
    request: Request,
    ranks: Ranks | None = None,
    *,
    rankings: MutableMapping[str, Ranking] | None = None,
    last: bool = False,
) -> Plan:
    """Ask the criterion for as much as every unpinned group's sites allow.

    A site that reads several groups shares its tolerance out among them: the errors of all of them, added up, stay
    within it. Of groups that only one event may change (Group.conflicts_with) those are taken that save most.

    Args:
        model: read only; its weights and the linear maps of its modules.
        structure: of the model.
        observations: by (group name, site key); groups that were not observed are left out, with a note.
        request: what the event may do.
        ranks: that share the work and get the same plan.
        rankings: by group, filled and read: orders of the channels, which no tolerance changes, for further plans of
            the same observations and criterion.
        last: let go of the observations of each group once it is planned, where they are in a dict.

    Raises: NonFiniteError: statistics or weights hold NaN or infinity.
    """
    ranks = ranks or Ranks()
    open_groups = [group for group in structure.groups if group.pin is None]
    left: dict[str, Why] = {group.name: why for group in open_groups if (why := _waits(group, observations, request))}
    seen = [g for g in open_groups if g.name not in left]
    desk = _ProposalBuilder(model, structure, observations, request, {} if rankings is None else rankings, last=last)
    choices = [compatible_sets(groups) for groups in entangled(seen)]
    desk.shares = Counter()
    for sets in choices:
        desk.shares += most_readers(sets)
    owner = owners(choices, ranks.size)

    def mine() -> _Mine:
        own: dict[str, Why] = {}
        error: Exception | None = None
        for sets, rank in zip(choices, owner, strict=True):
            desk.shares -= most_readers(sets)
            turn = rank == ranks.rank and error is None
            with summon_full_params(
                model, _weights(sets), keep=turn
            ):  # in which all ranks take part, whatever fails on one
                try:
                    own |= desk.take(sets) if turn else {}
                except Exception as caught:  # noqa: BLE001 - raised again below
                    error = caught
        if error is not None:
            raise error
        return desk.proposals, desk.certificates, desk.lost, own

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    reported = ranks.gathered_tensors(ranks.run_collectively(mine), device)
    proposals = {name: p for found, *_ in reported for name, p in found.items()}
    certificates = {name: c for _, found, *_ in reported for name, c in found.items()}
    for *_, found in reported:
        left |= found
    keeps = {name: len(p.reduction.keep) for name, p in proposals.items()}
    ordered = [g for g in seen if g.name in keeps]
    return Plan(
        tolerance=request.tolerance,
        criterion=request.criterion.name,
        reductions=tuple(proposals[g.name].reduction for g in ordered),
        certificates={g.name: certificates[g.name] for g in ordered},
        widths={g.name: (g.num_channels, keeps[g.name]) for g in ordered},
        macs_before=structure.macs,
        macs_after=macs_after(structure, keeps),
        errors={g.name: proposals[g.name].errors for g in ordered},
        dropped_variance={key: lost for _, _, found, _ in reported for key, lost in found.items()},
        left=left,
    )


_Mine = tuple[
    Mapping[str, Proposal], Mapping[str, tuple[Certificate, ...]], Mapping[str, Tensor], Mapping[str, Why]
]  # what one rank makes of its groups: proposals, certificates, lost variance, and groups left as they are


def _waits(group: Group, observations: Observations, request: Request) -> Why | None:
    """Return why a group is not planned at all, None if it is."""
    site = next((site for site in group.sites if (group.name, site.key) not in observations), None)
    return request.waiting.get(group.name) or (None if site is None else unseen(site))


class _ProposalBuilder:
    """Proposals as they are made, one choice of groups after the other.

    shares: by site key, the groups still to come that read it. spent: the errors of those that came. certificates: by
    group. lost: by key of a site that a BatchNorm reads, what the variance of its outputs loses.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        observations: Observations,
        request: Request,
        rankings: MutableMapping[str, Ranking],
        *,
        last: bool,
    ) -> None:
        self._rankings = rankings
        self._spent = observations if last and isinstance(observations, dict) else dict[tuple[str, str], Observation]()
        self._model, self._structure, self._observations, self._request = model, structure, observations, request
        self._shown: dict[str, GroupData] = {}
        self.shares: Counter[str] = Counter()
        self.spent: dict[str, float] = {}
        self.proposals: dict[str, Proposal] = {}
        self.certificates: dict[str, tuple[Certificate, ...]] = {}
        self.lost: dict[str, Tensor] = {}

    def take(self, sets: Sequence[Sequence[Group]]) -> dict[str, Why]:
        """Add the proposals of the set of groups that saves most; return why the other groups stay as they are."""
        found = [self._propose_all(groups) for groups in sets]
        saved = [-macs_after(self._structure, {n: len(p.reduction.keep) for n, p in own.items()}) for own, _ in found]
        best = max(range(len(sets)), key=lambda index: saved[index])
        proposals, left = found[best]
        self.proposals |= proposals
        for proposal in proposals.values():
            _spend(self.spent, proposal)
        self._settle([group for group in sets[best] if group.name in proposals])
        for group in (group for groups in sets for group in groups):
            for site in group.sites:
                self._spent.pop((group.name, site.key), None)
        chosen = {group.name for group in sets[best]}
        for groups, (_, why) in zip(sets, found, strict=True):
            for name in (group.name for group in groups if group.name not in chosen):
                other = f"left for another event: changing {', '.join(proposals)} saves more"
                left.setdefault(name, why.get(name) or Why("another", other))
        return left

    def _propose_all(self, groups: Sequence[Group]) -> tuple[dict[str, Proposal], dict[str, Why]]:
        shares = self.shares + Counter(site.key for group in groups for site in group.sites)
        spent: dict[str, float] = dict(self.spent)
        proposals: dict[str, Proposal] = {}
        left: dict[str, Why] = {}
        for part in alike(groups):
            found, why = self._propose_alike(part, spent, shares)
            shares.subtract(site.key for group in part for site in group.sites)
            proposals |= found
            left |= why
            for proposal in found.values():
                _spend(spent, proposal)
        return proposals, left

    def _propose_alike(
        self, groups: Sequence[Group], spent: Mapping[str, float], shares: Mapping[str, int]
    ) -> tuple[dict[str, Proposal], dict[str, Why]]:
        """Propose the same share for all of some groups: what the one needs that needs most; or none, and why."""
        absent = missing(groups)
        if absent:
            tied = Why("tied", f"as wide as {', '.join(absent)}, which cannot change now")
            return {}, {group.name: tied for group in groups}
        shown = [self._show(group) for group in groups]
        aligned = steps(groups, [one.view for one in shown], self._request.align)
        least = 0.0
        while True:
            own_spent, own_shares = dict(spent), Counter(shares)
            found: dict[str, Proposal] = {}
            for group, one, step in zip(groups, shown, aligned, strict=True):
                made = _propose(
                    group, one, self._request, own_spent, own_shares, step, own_share(group, least), self._rankings
                )
                own_shares.subtract(site.key for site in group.sites)
                if isinstance(made, Why):
                    tied = Why(made.cause, f"as wide as {group.name}, for which: {made.text}")
                    return {}, {g.name: made if g is group else tied for g in groups}
                found[group.name] = made
                _spend(own_spent, made)
            kept = [share_of_row(group, len(found[group.name].reduction.keep)) for group in groups]
            if max(kept) - min(kept) < 1e-9:
                return found, {}
            least = max(kept)

    def _show(self, group: Group) -> GroupData:
        if group.name not in self._shown:
            self._shown[group.name] = make_view(
                self._model,
                group,
                self._observations,
                self._request.seed,
                grad_factor=self._request.criterion.grad_factor,
                neurons=self._request.criterion.neurons,
            )
            for key in ((group.name, site.key) for site in group.sites):
                if key in self._spent:  # the rows of gradients are in what is shown
                    self._spent[key] = replace(self._spent[key], grad_factor=None)
        return self._shown[group.name]

    def _settle(self, groups: Sequence[Group]) -> None:
        """Book every bound on what chosen groups' reductions do, and let go of what was shown of all.

        Of outputs that a BatchNorm reads the loss of variance is noted, too.
        """
        for group in groups:
            shown = self._show(group)
            view, proposal = shown.view, self.proposals[group.name]
            self.certificates[group.name] = (*proposal.certificates(view), *worst_case(group, view, proposal))
            for site, seen in zip(group.sites, view.sites, strict=True):
                if site.norm is not None:
                    own = dropped(seen, proposal, shown.samples.get(site.key))
                    self.lost[site.key] = own if site.key not in self.lost else self.lost[site.key] + own
        self._shown.clear()  # weights in float64: those of one choice at a time


def _weights(sets: Sequence[Sequence[Group]]) -> Iterator[str]:
    """Yield the names of all parameters that groups are planned by."""
    for group in (group for groups in sets for group in groups):
        yield from (site.weight for site in group.sites)
        if (neuron := group.neuron) is not None:
            yield neuron.weight
            yield from (name for name in (neuron.bias, neuron.slopes) if name is not None)
            yield from () if neuron.norm is None else (f"{neuron.norm}.weight", f"{neuron.norm}.bias")


def _spend(spent: dict[str, float], proposal: Proposal) -> None:
    for key, error in proposal.errors.items():
        spent[key] = spent.get(key, 0.0) + error


def _propose(
    group: Group,
    shown: GroupData,
    request: Request,
    spent: Mapping[str, float],
    shares: Mapping[str, int],
    step: int,
    least_share: float,
    rankings: MutableMapping[str, Ranking],
) -> Proposal | Why:
    """Make a proposal, or say why there is none.

    Args:
        group: as shown.
        shown: the group.
        request: what is allowed.
        spent: errors at each site by earlier groups.
        shares: groups still to come at each site.
        step: between numbers kept.
        least_share: of the channels, that stays.
        rankings: by group, as in make_plan.
    """
    least_share = max(least_share, 1 - request.max_drop)
    least = max(group.min_channels, min(step, group.num_channels), round(least_share * group.num_channels))
    cap = request.allotted.get(group.name, request.tolerance)
    limits = {}
    for site in group.sites:
        left = request.remaining_error.get(site.key, float("inf")) - spent.get(site.key, 0.0)
        if left < roundoff_floor(group.num_channels):
            return used_up(site, left)
        free = request.tolerance - spent.get(site.key, 0.0)
        limits[site.key] = shown.ratios[site.key] * min(cap, max(0.0, min(free, left)) / shares[site.key])
    criterion = request.criterion
    if any(site.norm_strategy for site in group.sites):
        if not criterion.needs_data:
            return Why("criterion", f"criterion '{criterion.name}' does not see what a norm reads; others do")
        criterion = compensated(criterion)
    if group.name not in rankings:
        rankings[group.name] = interleaved(criterion, shown.view)
    ranking = rankings[group.name]
    proposal = choose(criterion, shown.view, limits, align=step, min_keep=least, ranking=ranking)
    if proposal is None:
        return missed_tolerance(group, shown.view, limits, step, request.align, cap)
    kept = len(proposal.reduction.keep)
    for view in shown.view.sites if request.criterion.needs_data else ():
        rank = -(-kept // (1 if view.blocks is None else int(view.blocks.max()) + 1))
        needed, rows = request.rows_per_channel * rank, 0 if view.moments is None else view.moments.num_rows
        if rows < needed:
            return too_few_rows(group, view.key, rows=rows, needed=needed, kept=rank)
    errors = {key: error / shown.ratios[key] for key, error in proposal.errors.items()}
    return replace(proposal, errors=errors)


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
