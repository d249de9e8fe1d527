"""How far the outputs move when a unit of groups loses channels: measured, and carried over to its other widths.

Holds: trial edits that are taken back, the shift of the outputs, the points of every task. Elsewhere: widths and their
errors (planner.offers), the choice (planner.allocation).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from apoptosis.criteria import Ranking
from apoptosis.decide.goal import FullSize, Goal, share_of
from apoptosis.engine.edited import BROKEN, outputs_of_edited
from apoptosis.errors import NonFiniteError
from apoptosis.graph.trace.failures import fault_of
from apoptosis.interrupts import restoring
from apoptosis.model.evaluate import Call, Probe, as_probe, cuts_of, like_example, logits_of, outputs
from apoptosis.model.outputs import difference
from apoptosis.model.outputs import read as read_output
from apoptosis.planner import Costs, Observations, Request, Why
from apoptosis.planner.allocation import Choice, Point, Price, choose_widths, together
from apoptosis.planner.offers import Offers, Trial, UnitOffer, make_offers
from apoptosis.records import Branch, EmptyProposal, Structure
from apoptosis.surgery import Transaction, build_edits, norm_edits
from apoptosis.surgery.branches import empty_edits, is_empty
from apoptosis.surgery.target import Target

_LOSSLESS = 1e-6  # relative error of a trial
EXAMPLES = 8  # of the inputs at hand that trials are run on
LEAST_POWER, MOST_POWER = 1.0, 4.0  # of the error, in which the shift grows
STALE = 0.5  # of the channels that a branch had when its end was tried: with fewer it is tried again


@dataclass(slots=True, kw_only=True)
class Sensitivity:
    """Measures shifts of the outputs, which add up over groups (`shift_of`).

    known: the shift per trial of earlier events of the run, by unit: (error, shift) pairs, which go on being used; of
    the end of a branch (share of its full width, shift). full_widths: channels at full width, by group.
    refused: by group, why the network does not run in a trial of it. before: the outputs before any trial.
    """

    target: Target
    structure: Structure
    probe: Probe
    known: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    full_widths: Mapping[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    before: list[Any] | None = None

    def points(self, offers: Offers, price: Price) -> list[list[Point]]:
        """Return for every task the points among which one is chosen. price: what the network takes at some widths."""
        found: list[tuple[set[str], list[Point]]] = []
        for sets in offers.tasks:
            units = [[self._points_of(unit, price) for unit in own] for own in sets]
            names = {name for own in sets for unit in own for name in unit.groups}
            found.append((names, [point for own in units for point in _merged(own)]))
        for proposal in offers.branches:
            names, inside = set(proposal.branch.groups), list[list[Point]]()
            apart = [task for task in found if not task[0] & names]
            for touched, points in (task for task in found if task[0] & names):
                names |= touched
                inside.append(points)
            found = [*apart, (names, [*_merged(inside), *self._emptied(proposal, price)])]
        return [points for _, points in found]

    def _emptied(self, proposal: EmptyProposal, price: Price) -> list[Point]:
        """Return the point of emptying a branch, as a list; none where the network does not run so.

        What is left of a branch that has lost most of its channels may say little: then it is tried again.
        """
        name, share = f"branch {proposal.branch.name}", self._share(proposal.branch)
        tried = self.known.get(name, [])
        if not tried or share < STALE * tried[-1][0]:
            shift = self._shift(Trial(proposal.reductions, {}, 1.0))
            if not math.isfinite(shift):
                return []
            self.known[name] = tried = [(share, shift)]
        widths = dict.fromkeys(proposal.branch.groups, 0)
        return [Point(saved=price({}) - price(widths), cost=tried[-1][1], widths=widths)]

    def _share(self, branch: Branch) -> float:
        """Return the share of its channels at full width that a branch has now."""
        now = {group.name: group.num_channels for group in self.structure.groups}
        full = sum(self.full_widths.get(name, now[name]) for name in branch.groups)
        return sum(now[name] for name in branch.groups) / full

    def _points_of(self, unit: UnitOffer, price: Price) -> list[Point]:
        shifts = self.known.get(name := unit.name)
        if shifts is None:
            tried = [(trial.error, self._shift(trial)) for trial in unit.trials]
            shifts = [(error, shift) for error, shift in tried if math.isfinite(shift)]
            if len(shifts) == len(tried):  # else the next event tries again
                self.known[name] = shifts
        if not shifts:
            return []
        now = price({})
        return [
            Point(saved=now - price(width.kept), cost=carried_over(shifts, width.error), widths=width.kept)
            for width in unit.widths
        ]

    def _outputs(self) -> list[Any]:
        """Return the outputs before any trial, once the first is due; none is where all shifts are known.

        Raises: NonFiniteError: they hold NaN or infinity.
        """
        if self.before is None:
            ranks = self.target.ranks
            before = ranks.run_collectively(partial(outputs, self.target.model, self.probe))
            ranks.run_collectively(partial(_check_finite, before, self.target))
            self.before = before
        return self.before

    def _shift(self, trial: Trial) -> float:
        """Return how far the outputs move, infinite where the network does not run so on some rank: see `refused`."""
        ranks, before = self.target.ranks, self._outputs()
        shift, fault = ranks.run_collectively(partial(self._own_shift, trial, before))
        if fault := ranks.first_error(fault):
            self.refused.update({reduction.group: fault for reduction in trial.reductions})
        total, number = ranks.total(torch.tensor([shift, 1.0], dtype=torch.float64, device="cpu")).tolist()
        return total / number if math.isfinite(total) else math.inf

    def _own_shift(self, trial: Trial, before: Sequence[Any]) -> tuple[float, str]:
        transaction, narrowed = (
            Transaction(self.target.model, trial=True),
            [r for r in trial.reductions if not is_empty(r)],
        )
        with restoring(transaction.close):
            try:
                if narrowed:
                    edits = build_edits(self.structure, narrowed, trial.dropped_variance)
                    transaction.apply(edits, self.structure, norm_edits(self.structure, narrowed))
                if emptied := empty_edits(self.structure, trial.reductions):
                    transaction.empty(emptied)
                return shift_of(before, outputs_of_edited(self.target.model, self.probe), self.target), ""
            except BROKEN as error:
                return math.inf, fault_of(error).brief


def _check_finite(outs: Sequence[Any], target: Target) -> None:
    """Raise NonFiniteError where outputs before any trial hold NaN or infinity: nothing can be compared with them."""
    for out in outs:
        for path, x in read_output(out, target.read).numbers.items():
            if not bool(torch.isfinite(x).all()):
                raise NonFiniteError(f"the outputs hold NaN or infinity{f' ({path})' if path else ''}.")


def _merged(units: Sequence[list[Point]]) -> list[Point]:
    """Return the points of one unit, or the frontier of several that change independently of one another."""
    return units[0] if len(units) == 1 else together(units)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """The way to a goal. full: what the network took at full width. part: of it that is gone now.

    limit: what the shifts of an event may add up to. known, full_widths: as in `Sensitivity`.
    """

    goal: Goal
    full: FullSize
    part: float = 1.0
    limit: float = math.inf
    known: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    full_widths: Mapping[str, int] = field(default_factory=dict)


def towards(
    way: Way,
    target: Target,
    structure: Structure,
    observations: Observations,
    request: Request,
    rankings: MutableMapping[str, Ranking],
    inputs: Call,
) -> tuple[Request, Choice]:
    """Choose the widths that go a part of the way to a goal with the least predicted loss.

    Args: inputs: on which trials are run, of the form of the target's call. Others: as in `make_offers`.

    Returns: the request of a plan with these widths, and the choice.
    """
    offers = make_offers(
        target.model, structure, observations, request, target.ranks, rankings=rankings, known=way.known
    )
    costs, rows = Costs(structure, way.full.timings), target.num_examples

    def price(widths: Mapping[str, int]) -> float:
        return share_of(way.goal, costs.of(widths), way.full, rows)

    probe = inputs_of(like_example(inputs, target.call))
    sensitivity = Sensitivity(
        target=target, structure=structure, probe=probe, known=way.known, full_widths=way.full_widths
    )
    try:
        points = sensitivity.points(offers, price)
    except BaseException as error:
        if target.ranks.size == 1 or isinstance(error, NonFiniteError):  # on all ranks; else they cannot meet again
            target.rebuild_wrappers()
        raise
    target.rebuild_wrappers()  # trials exchange the storage that they know
    choice = choose_widths(points, price, way.goal.towards(price({}), way.part), limit=way.limit)
    gone = {name for name, width in choice.widths.items() if not width}
    empty = frozenset(one.branch.name for one in offers.branches if gone.issuperset(one.branch.groups))
    widths = {name: width for name, width in choice.widths.items() if width}
    failed = {name: Why("goal", f"in a trial of half its width {text}") for name, text in sensitivity.refused.items()}
    waiting = {**{name: why for name, why in failed.items() if name not in choice.widths}, **offers.left}
    return replace(request, widths=widths, empty=empty, waiting=waiting | dict(request.waiting)), choice


def shift_of(before: Sequence[Any], after: Sequence[Any], target: Target) -> float:
    """Return the squared rms change of the outputs, over that of their spread: of logits where there are any.

    A level that all classes of an example share is left out; the spread of logits is that over the examples. It is
    infinite where nothing can be compared. It does not matter whether the layer that makes the logits is trained yet,
    while the divergence of what they predict says nothing before it is (docs/method.md).
    """
    logits = [
        (logits_of(old, target.read), logits_of(new, target.read)) for old, new in zip(before, after, strict=True)
    ]
    rows = [(a, b) for a, b in logits if a is not None and b is not None and a.shape == b.shape]
    if len(rows) < len(logits) or sum(len(a) for a, _ in rows) < 2:
        return _of_all_outputs(before, after, target)
    old, new = (torch.cat([pair[i] for pair in rows]).detach().double() for i in (0, 1))
    old, new = old - old.mean(1, keepdim=True), new - new.mean(1, keepdim=True)
    spread = float((old - old.mean(0)).square().sum())
    moved = float((new - old).square().sum())
    return moved / spread if spread > 0 else math.inf if moved > 0 else 0.0


def _of_all_outputs(before: Sequence[Any], after: Sequence[Any], target: Target) -> float:
    try:
        found = difference(*([read_output(out, target.read) for out in outs] for outs in (before, after)))
    except NonFiniteError:
        return math.inf
    return found.moved / found.spread if found.compared and found.spread > 0 else math.inf


def carried_over(shifts: Sequence[tuple[float, float]], error: float) -> float:
    """Return the shift at an error, from those measured at others: by the power of the error between two of them.

    Below the smaller it falls with the square of the error; above the larger it grows on as between the two.

    Example:
        >>> carried_over([(0.1, 0.01)], 0.2), carried_over([(0.1, 0.01), (0.2, 0.02)], 0.4)
        (0.04, 0.04)
    """
    known = sorted(shifts)
    if error <= 0.0:
        return 0.0
    (low, at_low), (high, at_high) = known[0], known[-1]
    if high <= _LOSSLESS:  # which tells nothing of widths that lose something
        return max(at_high, error**2)
    if high <= low or low <= 0.0 or at_low <= 0.0 or at_high <= 0.0:
        return at_high * (error / high) ** 2
    if error <= low:
        return at_low * (error / low) ** 2
    power = min(max(math.log(at_high / at_low) / math.log(high / low), LEAST_POWER), MOST_POWER)
    start, shift = (high, at_high) if error > high else (low, at_low)
    return float(shift * (error / start) ** power)


def inputs_of(call: Call) -> Probe:
    """Return the first few examples of some inputs, all of them where they cannot be cut."""
    whole = as_probe(call)
    cuts = cuts_of(whole)
    return cuts[0].take(0, min(cuts[0].rows, EXAMPLES)) if cuts else whole
