"""Moments become a plan with certificates; nothing of the user's is touched.

Holds: the plan, and how ranks make it together. Elsewhere: proposals for single groups (proposals.py), which groups
belong together (couplings.py), what widths cost (costs.py), when an event happens (policy), the surgery.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from apoptosis.criteria import Ranking
from apoptosis.distributed.ranks import Ranks
from apoptosis.distributed.sharded import summon_full_params
from apoptosis.model.passes import device_of
from apoptosis.planner.branches import propose_empty, within
from apoptosis.planner.costs import Costs
from apoptosis.planner.couplings import Task, assign_to_ranks, tasks_of
from apoptosis.planner.proposals import Made, ProposalBuilder, Request
from apoptosis.planner.reasons import Why, unseen
from apoptosis.planner.views import Observations
from apoptosis.records import Certificate, EmptyProposal, Group, Reduction, Structure


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

    def _worst(self, name: str) -> float:
        return max(self.errors.get(name, {}).values(), default=0.0)

    def __repr__(self) -> str:
        widths = ", ".join(f"{name} {before}->{after}" for name, (before, after) in self.widths.items())
        return f"<Plan: {widths or 'nothing to remove'}>"

    def _repr_html_(self) -> str:
        from apoptosis.display import html
        from apoptosis.display.text import plain, short_number

        left = [(name, why.text) for name, why in self.left.items()]
        parts = []
        if self.reductions:
            sizes = f"{short_number(self.macs_before)} -> {short_number(self.macs_after)} multiply-adds"
            errors = [plain(self._worst(name)) for name in self.widths]
            widths = [(name, *pair) for name, pair in self.widths.items()]
            parts.append(html.line(f"tolerance {self.tolerance:g}, {self.criterion}: {sizes}", muted=True))
            parts.append(html.widths_table(widths, ("site error (relative rms)", errors)))
        if left:
            found = html.table(("group", "why it stays as it is"), left)
            parts.append(html.folded(f"{len(left):,} groups stay as they are", found) if self.reductions else found)
        return html.card("Plan" if self.reductions else "Plan: nothing to remove", *parts)

    def __str__(self) -> str:
        if not self.reductions:
            return "nothing to remove" + "".join(f"\n  {note}" for note in self.notes)
        lines = [
            f"tolerance {self.tolerance:g}, {self.criterion}: "
            f"{self.macs_before:,.0f} -> {self.macs_after:,.0f} multiply-adds"
        ]
        for name, (before, after) in self.widths.items():
            error = f"site error {self._worst(name):.3g} (relative rms)"
            lines.append(f"  {name}: {before} -> {after} channels, {error}")
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
        last: release the observations of each group once it is planned, where they are in a dict.

    Raises: NonFiniteError: statistics or weights hold NaN or infinity.
    """
    ranks = ranks or Ranks()
    open_groups = structure.open_groups
    left: dict[str, Why] = {
        group.name: why for group in open_groups if (why := waits_for(group, observations, request))
    }
    emptied = _emptied(model, structure, observations, request, left)
    gone = {name for proposal in emptied for name in proposal.branch.groups}
    tasks = tasks_of([group for group in open_groups if group.name not in left and group.name not in gone])
    rank_of = assign_to_ranks(tasks, ranks.size)
    own = [task for task, rank in zip(tasks, rank_of, strict=True) if rank == ranks.rank]
    builder = ProposalBuilder(
        model, structure, observations, request, {} if rankings is None else rankings, own, last=last
    )

    def made() -> Made:
        in_turn(model, tasks, rank_of, ranks, builder.take)
        builder.forget_factors()
        return builder.made

    total = Made({}, {}, {}, left)
    for one in ranks.gathered_tensors(ranks.run_collectively(made), device_of(model)):
        total.add(one)
    keeps = {name: len(proposal.reduction.keep) for name, proposal in total.proposals.items()}
    ordered = [group for group in open_groups if group.name in keeps]
    made_empty = [reduction for proposal in emptied for reduction in proposal.reductions]
    return Plan(
        tolerance=request.tolerance,
        criterion=request.criterion.name,
        reductions=(*(total.proposals[g.name].reduction for g in ordered), *made_empty),
        certificates={g.name: total.certificates[g.name] for g in ordered}
        | {name: bounds for proposal in emptied for name, bounds in proposal.certificates.items()},
        widths={g.name: (g.num_channels, keeps[g.name]) for g in ordered}
        | {g.name: (g.num_channels, 0) for g in structure.groups if g.name in gone},
        macs_before=structure.macs,
        macs_after=Costs(structure).of(keeps | dict.fromkeys(gone, 0)).macs,
        errors={g.name: total.proposals[g.name].errors for g in ordered}
        | {r.group: {p.branch.site: p.error} for p in emptied for r in p.reductions},
        dropped_variance=total.dropped_variance,
        left={name: why for name, why in total.left.items() if name not in gone},
    )


def _emptied(
    model: nn.Module, structure: Structure, observations: Observations, request: Request, left: Mapping[str, Why]
) -> list[EmptyProposal]:
    """Return what the request lets be emptied: every rank finds the same, of statistics that are pooled."""
    if not request.empty:
        return []
    names = None if request.empty is True else request.empty
    found = propose_empty(model, structure, observations, names=names, seed=request.seed)
    if request.widths is not None:
        return list(found)
    allowed = [proposal for proposal in found if not any(name in left for name in proposal.branch.read)]
    return list(within(allowed, request.tolerance, request.allotted))


def in_turn(
    model: nn.Module, tasks: Sequence[Task], rank_of: Sequence[int], ranks: Ranks, work: Callable[[Task], None]
) -> None:
    """Do this rank's tasks, while the other ranks gather the weights for theirs.

    Raises: what `work` raises, once all tasks have had their turn.
    """
    error: Exception | None = None
    for task, rank in zip(tasks, rank_of, strict=True):
        turn = rank == ranks.rank and error is None
        with summon_full_params(model, _weights(task), keep=turn):  # all ranks take part, whatever fails on one
            try:
                if turn:
                    work(task)
            except Exception as caught:  # noqa: BLE001 - raised again below
                error = caught
    if error is not None:
        raise error


def waits_for(group: Group, observations: Observations, request: Request) -> Why | None:
    """Return why a group is not planned at all, None if it is."""
    site = next((site for site in group.sites if (group.name, site.key) not in observations), None)
    return request.waiting.get(group.name) or (None if site is None else unseen(site))


def _weights(task: Task) -> Iterator[str]:
    """Yield the names of all parameters that groups are planned by."""
    for group in task.groups:
        yield from (site.weight for site in group.sites)
        if (neuron := group.neuron) is not None:
            yield neuron.weight
            yield from (name for name in (neuron.bias, neuron.slopes) if name is not None)
            yield from () if neuron.norm is None else (f"{neuron.norm}.weight", f"{neuron.norm}.bias")


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
