"""How much of each group one event removes: proposals that meet the tolerance of every site, group after group.

Holds: how a site's tolerance is shared out, the least common share of tied groups, the best of compatible sets.
Elsewhere: which groups belong together (couplings.py), what a criterion sees of them (views.py), the plan (plan.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor, nn

from apoptosis.criteria import Criterion, GroupView, Proposal, Ranking, at_width, choose, compensated, interleaved
from apoptosis.errors import ArgumentError
from apoptosis.numerics.linalg import roundoff_floor
from apoptosis.observe import Observation
from apoptosis.planner.costs import Costs
from apoptosis.planner.couplings import Task, Unit, absent, common_steps, own_share, share_of_row
from apoptosis.planner.reasons import NOT_CHOSEN, Why, missed_tolerance, too_few_rows, used_up
from apoptosis.planner.views import GroupData, Observations, dropped, make_view, worst_case
from apoptosis.records import Certificate, Group, LinearSite, Structure


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What an event may do.

    tolerance: relative rms per site. allotted: the part of it that a group gets, by name; all of it where missing.
    remaining_error: what is left of a site's sum over all events, by site key.
    align: widths are rounded up to a multiple. max_drop: largest share of a group's channels one event removes.
    rows_per_channel: a width is only trusted when the window saw this many rows for every channel kept.
    waiting: groups that are left for a later event though they were observed, and why.
    empty: whether residual branches may be emptied that are constant up to the tolerance; or the names of these, or of
    groups in them. By default none is.
    widths: group -> channels that stay: then these groups change, and the branches that `empty` names are emptied, and
    nothing else, whatever the tolerance. least: group -> channels that stay at least, where max_drop would leave fewer.
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
    empty: bool | frozenset[str] = False
    widths: Mapping[str, int] | None = None
    least: Mapping[str, int] = field(default_factory=dict)

    def fewest(self, group: Group, step: int = 1) -> int:
        """Return how many channels of a group stay at least; step: between numbers kept."""
        by_share = round((1 - self.max_drop) * group.num_channels)
        return max(group.min_channels, min(step, group.num_channels), by_share, self.least.get(group.name, 0))


class Made(NamedTuple):
    """What one rank makes of its tasks.

    proposals, certificates: by group. dropped_variance: by key of a site that a BatchNorm reads, what the variance of
    its outputs loses. left: by group that stays as it is, why.
    """

    proposals: dict[str, Proposal]
    certificates: dict[str, tuple[Certificate, ...]]
    dropped_variance: dict[str, Tensor]
    left: dict[str, Why]

    def add(self, other: Made) -> None:
        """Take in what another rank made."""
        self.proposals.update(other.proposals)
        self.certificates.update(other.certificates)
        self.dropped_variance.update(other.dropped_variance)
        self.left.update(other.left)


class _Budgets:
    """The tolerance of every site, shared out among the groups that it reads.

    readers: by site key, the groups still to come. spent: by site key, the errors of those that came.
    """

    def __init__(self, readers: Mapping[str, int], spent: Mapping[str, float]) -> None:
        self.readers, self.spent = Counter(readers), dict(spent)

    def copy(self, groups: Iterable[Group] = ()) -> _Budgets:
        """Return a copy in which these groups are to come, too."""
        return _Budgets(self.readers + Counter(site.key for group in groups for site in group.sites), self.spent)

    def book(self, groups: Iterable[Group], proposals: Iterable[Proposal]) -> None:
        """Note that these groups came, and what was proposed for them."""
        self.readers.subtract(site.key for group in groups for site in group.sites)
        for proposal in proposals:
            for key, error in proposal.errors.items():
                self.spent[key] = self.spent.get(key, 0.0) + error

    def limits(self, group: Group, request: Request, ratios: Mapping[str, float]) -> dict[str, float] | Why:
        """Return by site key what the group may cost there; or why it may not cost anything at one."""
        cap, limits = request.allotted.get(group.name, request.tolerance), {}
        for site in group.sites:
            spent = self.spent.get(site.key, 0.0)
            left = request.remaining_error.get(site.key, float("inf")) - spent
            if left < roundoff_floor(group.num_channels):
                return used_up(site, left)
            free = max(0.0, min(request.tolerance - spent, left))
            limits[site.key] = ratios[site.key] * min(cap, free / self.readers[site.key])
        return limits


class ProposalBuilder:
    """Makes proposals, one task after the other.

    Args:
        model, structure, observations, request, rankings: as in `make_plan`.
        tasks: those that `take` will be called with.
        last: release the observations of a task's groups once it is planned, where they are in a dict.
        factor_bytes: how much memory factorisations may take in `rankings`, for a plan that follows.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        observations: Observations,
        request: Request,
        rankings: MutableMapping[str, Ranking],
        tasks: Iterable[Task],
        *,
        last: bool,
        factor_bytes: int = 0,
    ) -> None:
        self._factor_bytes = factor_bytes
        self._model, self._structure, self._observations, self._request = model, structure, observations, request
        self._rankings, self._costs = rankings, Costs(structure)
        self._released: dict[tuple[str, str], Observation] = {}
        if last and isinstance(observations, dict):
            self._released = observations
        self._data: dict[str, GroupData] = {}
        self._factored: dict[str, Ranking] = {}
        self._budgets = _Budgets(sum((task.readers for task in tasks), Counter()), {})
        self.made = Made({}, {}, {}, {})

    def take(self, task: Task) -> None:
        """Add the proposals of the set of groups that saves most, and why the other groups stay as they are."""
        self._budgets.readers -= task.readers
        found = [self._propose_set(units) for units in task.sets]
        saved = [-self._costs.of({n: len(p.reduction.keep) for n, p in own.items()}).macs for own, _ in found]
        best = saved.index(max(saved))
        proposals, left = found[best]
        self._budgets.book((), proposals.values())
        self.made.proposals.update(proposals)
        chosen = [group for unit in task.sets[best] for group in unit]
        self._certify([group for group in chosen if group.name in proposals])
        other = Why("another", f"left for another event: changing {', '.join(proposals)} saves more")
        for units, (_, why) in zip(task.sets, found, strict=True):
            for name in (group.name for unit in units for group in unit if group not in chosen):
                left.setdefault(name, why.get(name) or other)
        self.made.left.update(left)
        for group in task.groups:
            self._drop_factor(group.name)
            for site in group.sites:
                self._released.pop((group.name, site.key), None)

    def _propose_set(self, units: Sequence[Unit]) -> tuple[dict[str, Proposal], dict[str, Why]]:
        budgets = self._budgets.copy(group for unit in units for group in unit)
        proposals: dict[str, Proposal] = {}
        left: dict[str, Why] = {}
        for unit in units:
            found, why = self._propose_unit(unit, budgets)
            budgets.book(unit, found.values())
            proposals |= found
            left |= why
        return proposals, left

    def _propose_unit(self, unit: Unit, budgets: _Budgets) -> tuple[dict[str, Proposal], dict[str, Why]]:
        """Propose the least share that suits all groups of a unit: the one that needs most decides; or none, and why.

        What every group needs by itself is asked for first, then again with the largest of these shares as the least,
        until all keep the same.
        """
        if others := absent(unit):
            tied = Why("tied", f"as wide as {', '.join(others)}, which cannot change now")
            return {}, {group.name: tied for group in unit}
        if (widths := self._request.widths) is not None:
            if any(group.name not in widths for group in unit):
                return {}, {group.name: NOT_CHOSEN for group in unit}
            found = self.at_widths(unit, widths)
            for group in unit:
                self._drop_factor(group.name)
            return found, {}
        data = [self.show(group) for group in unit]
        steps = common_steps(unit, [one.view for one in data], self._request.align)
        least = 0.0
        while True:
            own, found = budgets.copy(), dict[str, Proposal]()
            for group, one, step in zip(unit, data, steps, strict=True):
                made = self._propose(group, one, own, step, own_share(group, least))
                if isinstance(made, Why):
                    tied = Why(made.cause, f"as wide as {group.name}, for which: {made.text}")
                    return {}, {g.name: made if g is group else tied for g in unit}
                found[group.name] = made
                own.book((group,), (made,))
            kept = [share_of_row(group, len(found[group.name].reduction.keep)) for group in unit]
            if max(kept) - min(kept) < 1e-9:
                return found, {}
            least = max(kept)

    def _propose(
        self, group: Group, data: GroupData, budgets: _Budgets, step: int, least_share: float
    ) -> Proposal | Why:
        """Make a proposal, or say why there is none.

        Args:
            group: that is asked about.
            data: what is known of it.
            budgets: what each site has left.
            step: between numbers kept.
            least_share: of the channels, that stays.
        """
        request = self._request
        least = max(request.fewest(group, step), round(least_share * group.num_channels))
        limits, criterion = budgets.limits(group, request, data.ratios), criterion_of(group, request)
        if isinstance(limits, Why):
            return limits
        if isinstance(criterion, Why):
            return criterion
        ranking = self.ranking(group)
        proposal = choose(criterion, data.view, limits, align=step, min_keep=least, ranking=ranking)
        self._drop_factor(group.name)
        if proposal is None:
            cap = request.allotted.get(group.name, request.tolerance)
            return missed_tolerance(group, data.view, limits, step, request.align, cap)
        missing = rows_missing(group, data.view, len(proposal.reduction.keep), request)
        return missing or _of_whole_site(proposal, data)

    def at_widths(self, unit: Unit, widths: Mapping[str, int], *, errors: bool = True) -> dict[str, Proposal]:
        """Propose these widths for the groups of a unit; none if the criterion does not apply to one of them."""
        found: dict[str, Proposal] = {}
        for group in unit:
            data, criterion = self.show(group), criterion_of(group, self._request)
            if isinstance(criterion, Why):
                return {}
            proposal = at_width(criterion, data.view, widths[group.name], self.ranking(group), errors=errors)
            found[group.name] = _of_whole_site(proposal, data)
        return found

    def ranking(self, group: Group) -> Ranking:
        """Return the order of a group's channels, made once.

        Raises: ArgumentError: the criterion does not apply to it.
        """
        found = self._factored.get(group.name) or self._rankings.get(group.name)
        if found is None:
            criterion = criterion_of(group, self._request)
            if isinstance(criterion, Why):
                raise ArgumentError(f"group '{group.name}': {criterion.text}")
            found = self._factored[group.name] = interleaved(criterion, self.show(group).view)
            size = 0 if found.factor is None else found.factor.lower.nbytes  # as large as a Gram matrix
            kept = found if size <= self._factor_bytes else replace(found, factor=None)
            self._factor_bytes -= size if kept is found else 0
            self._rankings[group.name] = kept
        return found

    def forget_factors(self) -> None:
        """Release all factorisations, those of groups that are not planned included."""
        for name in list(self._rankings):
            self._drop_factor(name)

    def _drop_factor(self, name: str) -> None:
        """Release the factorisation of a group that is planned."""
        self._factored.pop(name, None)
        if (known := self._rankings.get(name)) is not None and known.factor is not None:
            self._rankings[name] = replace(known, factor=None)

    def forget(self) -> None:
        """Release what was shown of the groups of a task: weights in float64, factorisations of Gram matrices."""
        self._data.clear()
        self._factored.clear()

    def show(self, group: Group) -> GroupData:
        """Return what the criterion sees of a group; it is made once per task."""
        if group.name not in self._data:
            criterion = self._request.criterion
            self._data[group.name] = make_view(
                self._model,
                group,
                self._observations,
                self._request.seed,
                grad_factor=criterion.grad_factor,
                neurons=criterion.neurons,
            )
            for key in ((group.name, site.key) for site in group.sites):
                if key in self._released:  # the rows of gradients are in what is shown
                    self._released[key] = replace(self._released[key], grad_factor=None)
        return self._data[group.name]

    def _certify(self, groups: Sequence[Group]) -> None:
        """Note every bound on what the groups' reductions do, and release the views of all.

        Of outputs that a BatchNorm reads the loss of variance is noted, too.
        """
        for group in groups:
            data, proposal = self.show(group), self.made.proposals[group.name]
            bounds = (*proposal.certificates(data.view), *worst_case(group, data.view, proposal))
            self.made.certificates[group.name] = bounds
            self.add_dropped(group, proposal, self.made.dropped_variance)
        self.forget()

    def add_dropped(self, group: Group, proposal: Proposal, lost: MutableMapping[str, Tensor]) -> None:
        """Add, by site key, what a proposal takes from the variances of outputs that a BatchNorm reads."""
        data = self.show(group)
        for site, view in zip(group.sites, data.view.sites, strict=True):
            if isinstance(site, LinearSite) and site.norm is not None:
                own = dropped(view, proposal, data.samples.get(site.key))
                lost[site.key] = own if site.key not in lost else lost[site.key] + own


def criterion_of(group: Group, request: Request) -> Criterion | Why:
    """Return the criterion that a group is asked by, or why none applies to it."""
    if not group.under_norm:
        return request.criterion
    if request.criterion.needs_data:
        return compensated(request.criterion)
    name = request.criterion.name
    return Why("criterion", f"a norm reads them, and criterion '{name}' uses weights only: choose one that uses data")


def rows_missing(group: Group, view: GroupView, kept: int, request: Request) -> Why | None:
    """Say why a width cannot be relied on, None if it can: too few rows were observed for it."""
    for site in view.sites if request.criterion.needs_data else ():
        rank = -(-kept // (1 if site.blocks is None else int(site.blocks.max()) + 1))
        needed, rows = request.rows_per_channel * rank, 0 if site.moments is None else site.moments.num_rows
        if rows < needed:
            return too_few_rows(group, site.key, rows=rows, needed=needed, kept=rank)
    return None


def _of_whole_site(proposal: Proposal, data: GroupData) -> Proposal:
    """Let a proposal's errors relate to all that a site writes."""
    return replace(proposal, errors={key: error / data.ratios[key] for key, error in proposal.errors.items()})
