"""What widths every group may get, with their errors, before any is chosen.

Holds: the widths of units and their errors by the criterion's curves, and some trial reductions of each, by which the
loss is measured. Elsewhere: what a width costs (engine.sensitivity), the choice (allocation.py), the plan (plan.py).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from apoptosis.criteria import Ranking
from apoptosis.distributed.ranks import Ranks
from apoptosis.distributed.sharded import has_shards
from apoptosis.model.passes import device_of
from apoptosis.planner.branches import propose_empty
from apoptosis.planner.couplings import Task, Unit, absent, assign_to_ranks, common_steps, tasks_of
from apoptosis.planner.plan import in_turn, waits_for
from apoptosis.planner.proposals import ProposalBuilder, Request, criterion_of, rows_missing
from apoptosis.planner.reasons import Why
from apoptosis.planner.views import Observations
from apoptosis.records import EmptyProposal, Group, Reduction, Structure

WIDTHS = 64  # of one unit that are offered
FACTOR_BYTES = 1 << 28  # of factorisations that are kept for the plan; of those beyond it orders alone
MEASURED = 5  # of these whose errors are computed, where each takes a reduction of its own; others lie between
TRIALS = (0.5,)  # shares kept by the trial reductions; by the square of the error they tell of the others


class Width(NamedTuple):
    """One width of a unit. kept: group -> channels; error: the root of the sum of squares over all its sites."""

    kept: Mapping[str, int]
    error: float


class Trial(NamedTuple):
    """A reduction of every group of a unit, what edits need beside (Plan.dropped_variance), and its width's error."""

    reductions: tuple[Reduction, ...]
    dropped_variance: Mapping[str, Tensor]
    error: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UnitOffer:
    """Groups that keep the same share: the widths they may get, widest first, and some of these as trials."""

    groups: tuple[str, ...]
    widths: tuple[Width, ...]
    trials: tuple[Trial, ...]

    @property
    def name(self) -> str:
        """What the unit is called from event to event."""
        return _unit_name(self.groups)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Offers:
    """All that may be chosen.

    tasks: each a number of sets of units, of which one set is changed. branches: those that may be emptied instead of
    changing the groups in them. left: groups without a width, and why.
    """

    tasks: tuple[tuple[tuple[UnitOffer, ...], ...], ...]
    branches: tuple[EmptyProposal, ...]
    left: Mapping[str, Why]


def make_offers(
    model: nn.Module,
    structure: Structure,
    observations: Observations,
    request: Request,
    ranks: Ranks | None = None,
    *,
    rankings: MutableMapping[str, Ranking],
    known: Container[str] = (),
) -> Offers:
    """Return the widths that every group may get.

    Args: known: units, by `UnitOffer.name`, whose loss was measured before: they get no trials. Others: as in
        `make_plan`.

    Raises: NonFiniteError: statistics or weights hold NaN or infinity.
    """
    ranks = ranks or Ranks()
    left: dict[str, Why] = {}
    left |= {g.name: why for g in structure.open_groups if (why := waits_for(g, observations, request)) is not None}
    tasks = tasks_of([group for group in structure.open_groups if group.name not in left])
    rank_of = assign_to_ranks(tasks, ranks.size)
    own = [task for task, rank in zip(tasks, rank_of, strict=True) if rank == ranks.rank]
    builder = ProposalBuilder(
        model, structure, observations, request, rankings, own, last=False, factor_bytes=FACTOR_BYTES
    )
    found: dict[int, tuple[tuple[UnitOffer, ...], ...]] = {}
    places = {id(task): place for place, task in enumerate(tasks)}

    def offer(task: Task) -> None:
        sets = [[_unit_offer(unit, builder, request, left, known) for unit in units] for units in task.sets]
        found[places[id(task)]] = tuple(tuple(one for one in units if one is not None) for units in sets)
        builder.forget()

    def offered() -> tuple[dict[int, tuple[tuple[UnitOffer, ...], ...]], dict[str, Why]]:
        in_turn(model, tasks, rank_of, ranks, offer)
        return found, left

    by_task: dict[int, tuple[tuple[UnitOffer, ...], ...]] = {}
    for one, reasons in ranks.gathered_tensors(ranks.run_collectively(offered), device_of(model)):
        by_task |= one
        left |= reasons
    ordered = tuple(by_task[place] for place in range(len(tasks)))
    waiting = {*request.waiting, *(name for name, why in left.items() if why.cause in ("unseen", "waiting"))}
    return Offers(tasks=ordered, branches=_branches(model, structure, observations, request, waiting), left=left)


def _branches(
    model: nn.Module, structure: Structure, observations: Observations, request: Request, waiting: Container[str]
) -> tuple[EmptyProposal, ...]:
    """Return the branches that may be emptied; none whose groups wait, or keep a least width that was asked for."""
    if not request.empty or has_shards(model):  # views take whole weights
        return ()
    found = propose_empty(model, structure, observations, seed=request.seed, errors=False)
    return tuple(
        one for one in found if not any(name in waiting or request.least.get(name) for name in one.branch.groups)
    )


def _unit_name(groups: Iterable[str]) -> str:
    return " ".join(groups)


def _unit_offer(
    unit: Unit, builder: ProposalBuilder, request: Request, left: dict[str, Why], known: Container[str]
) -> UnitOffer | None:
    """Return what a unit may become, or note why nothing."""
    found = _unusable(unit, request) or _candidates(unit, builder, request)
    if isinstance(found, Why):
        left.update({group.name: found for group in unit})
        return None
    widths = [Width(kept, error) for kept, error in zip(found, _errors(unit, found, builder), strict=True)]
    names, trials = tuple(group.name for group in unit), list[Trial]()
    if _unit_name(names) not in known:
        chosen = {min(range(len(widths)), key=lambda i: abs(_share(unit, widths[i].kept) - share)) for share in TRIALS}
        trials = [_trial(unit, widths[place], builder) for place in sorted(chosen)]
    return UnitOffer(groups=names, widths=tuple(widths), trials=tuple(trials))


def _unusable(unit: Unit, request: Request) -> Why | None:
    if others := absent(unit):
        return Why("tied", f"as wide as {', '.join(others)}, which cannot change now")
    return next((why for group in unit if isinstance(why := criterion_of(group, request), Why)), None)


def _share(unit: Unit, kept: Mapping[str, int]) -> float:
    return sum(kept.values()) / sum(group.num_channels for group in unit)


def _candidates(unit: Unit, builder: ProposalBuilder, request: Request) -> list[dict[str, int]] | Why:
    """Return the numbers kept that suit all groups of a unit, the most first; or why there are none."""
    steps = common_steps(unit, [builder.show(group).view for group in unit], request.align)
    fewest = max(-(-request.fewest(g, step) // step) for g, step in zip(unit, steps, strict=True))
    most = min(-(-g.num_channels // step) - 1 for g, step in zip(unit, steps, strict=True))
    numbers = list(range(most, fewest - 1, -1))
    if not numbers:
        return Why(
            "align", f"no narrower width is possible in steps of {steps[0]:,} of {unit[0].num_channels:,} channels"
        )
    missing: Why | None = None
    found = []
    for number in _spread(numbers, WIDTHS):
        kept = {group.name: number * step for group, step in zip(unit, steps, strict=True)}
        why = next(
            (why for g in unit if (why := rows_missing(g, builder.show(g).view, kept[g.name], request)) is not None),
            None,
        )
        missing = missing or why
        if why is None:
            found.append(kept)
    return found if found or missing is None else missing


def _spread(numbers: Sequence[int], most: int) -> list[int]:
    """Return some of the numbers, which fall, evenly spread, the first and the last among them.

    Example:
        >>> _spread([9, 8, 7, 6, 5, 4, 3, 2, 1], 3)
        [9, 5, 1]
    """
    if len(numbers) <= most:
        return list(numbers)
    return [numbers[round(i * (len(numbers) - 1) / (most - 1))] for i in range(most)]


def _curves(group: Group, builder: ProposalBuilder) -> Mapping[str, Tensor] | None:
    """Return the error curves of all sites of a group, None where some have to be measured."""
    data, ranking = builder.show(group), builder.ranking(group)
    measured = any(site.measure is not None and site.grad_factor is None for site in data.view.sites)
    known = all(site.key in ranking.curves for site in data.view.sites)
    return ranking.curves if known and not measured else None


def _has_curves(unit: Unit, builder: ProposalBuilder) -> bool:
    return all(_curves(group, builder) is not None for group in unit)


def _errors(unit: Unit, widths: Sequence[Mapping[str, int]], builder: ProposalBuilder) -> list[float]:
    """Return the error of every width, the widest first; between those that are computed they grow evenly."""
    if _has_curves(unit, builder):
        return [_error(unit, kept, builder) for kept in widths]
    places = _spread(range(len(widths)), MEASURED)
    known = [_error(unit, widths[place], builder) for place in places]
    return [float(error) for error in np.interp(range(len(widths)), places, known)]


def _error(unit: Unit, kept: Mapping[str, int], builder: ProposalBuilder) -> float:
    """Return the root of the sum of squared relative errors, over all sites of all groups."""
    total = 0.0
    for group in unit:
        curves, data = _curves(group, builder), builder.show(group)
        if curves is None:
            errors = builder.at_widths((group,), kept)[group.name].errors
            total += sum(error**2 for error in errors.values())
        else:
            sites = data.view.sites
            total += sum((float(curves[s.key][kept[group.name]]) / data.ratios[s.key]) ** 2 for s in sites)
    return float(total**0.5)


def _trial(unit: Unit, width: Width, builder: ProposalBuilder) -> Trial:
    proposals = builder.at_widths(unit, width.kept, errors=False)
    lost: dict[str, Tensor] = {}
    for group in unit:
        builder.add_dropped(group, proposals[group.name], lost)
    return Trial(tuple(proposals[group.name].reduction for group in unit), lost, width.error)
