"""One pruning step from top to bottom: plan, apply, test, keep or roll back.

Holds: the order of these for one event, and what ends in a rollback. Elsewhere: when a window opens and ends
(engine, window.py), what to remove (planner), how a tensor is edited (surgery), what a change may cost (decide).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apoptosis.criteria import Ranking
from apoptosis.decide.acceptance import AcceptanceResult, AcceptanceTest
from apoptosis.decide.ledger import Attempt, Event
from apoptosis.decide.overhead import overhead_macs
from apoptosis.decide.policy import NUM_GOAL_STEPS, goal_steps, loss_of, part_of_way
from apoptosis.decide.state import PRETRAINED_GOAL, PRETRAINED_SHIFT, RunState, Settings, allowed, has_goal, telemetry
from apoptosis.distributed.sharded import has_shards
from apoptosis.engine.edited import BROKEN, outputs_of_edited
from apoptosis.engine.event_builder import make_event, measured, size_of
from apoptosis.engine.sensitivity import Way, towards
from apoptosis.engine.window import left_out
from apoptosis.errors import (
    ArgumentError,
    NonFiniteError,
    OutOfMemoryError,
)
from apoptosis.graph import gains, verify_emptied, verify_up_to_scale
from apoptosis.graph.trace.failures import Fault, fault_of
from apoptosis.interrupts import restoring
from apoptosis.model.evaluate import Probe, comparable, compare, like_example, outputs, training_outputs
from apoptosis.model.outputs import Change, together
from apoptosis.model.passes import compile_seconds, device_of, forget_compiled
from apoptosis.observe import Observer, in_both
from apoptosis.planner import Observations, Request, make_plan, summary
from apoptosis.planner.sampling import sample
from apoptosis.records import Pin, Reduction, Structure
from apoptosis.surgery import Transaction, build_edits, norm_edits
from apoptosis.surgery.branches import empty_edits, is_empty
from apoptosis.surgery.target import (
    Target,
    broken_pin,
    first_fault,
    kept_positions,
    with_known,
    with_pins,
    without_branches,
)

Check = Callable[[Change], AcceptanceResult]


class StepResult(NamedTuple):
    """What came of a pruning step.

    structure: as it is now. attempt: its record. event: if shapes changed. left: what the plan leaves as it is, a line
    by group. measured: of a step that was rolled back, what its event would have said.
    """

    structure: Structure
    attempt: Attempt
    event: Event | None = None
    left: Mapping[str, str] = {}
    measured: Mapping[str, float] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningStep:
    """One event of a run, once its window is over. It writes to memory and acceptance, and to the target if it is kept.

    observer: the closed window. start: `time.perf_counter()` at the beginning of the event.
    """

    target: Target
    structure: Structure
    memory: RunState
    settings: Settings
    acceptance: AcceptanceTest
    observer: Observer
    start: float

    def run(self) -> StepResult:
        """Take the step, or leave everything as it was.

        Returns: what came of it, with its reason; after a rollback the tolerance is halved for the rest of the run.

        Raises: NonFiniteError: statistics, weights or outputs hold NaN or infinity; nothing was tried.
        """
        target, memory, acceptance, ranks = self.target, self.memory, self.acceptance, self.target.ranks
        groups, sent, compiling = self.structure.open_groups, ranks.bytes_sent, self._count_compiling()
        record = partial(memory.attempt, len(groups))
        # observe: what this window saw, on all ranks together
        waiting = left_out(self.observer, groups, ranks)
        self.observer.pool()
        ranks.same_parameters("before an event", target.model)
        # plan: which channels go, if that pays
        seen_rows, rankings = self._seen_again(), dict[str, Ranking]()
        request, shift = self._request(allowed(memory, self.settings, groups, waiting), seen_rows, rankings)
        plan = make_plan(target.model, self.structure, seen_rows, request, ranks, rankings=rankings, last=True)
        memory.behind = tuple(sorted(waiting))
        memory.require_full_sample |= any(why.cause == "rows" for why in plan.left.values())
        left = {name: why.text for name, why in plan.left.items()}
        seen = telemetry(memory, self.settings, self.structure, rows=target.num_examples)
        cause, reason = "gain", ""
        if self.settings.goal is None:  # which is reached whether that pays or not
            reason = loss_of(seen, plan.macs_after / target.num_examples)
        if not plan.reductions:
            cause, reason = summary(plan.left)
        if not ranks.all(bool(plan.reductions) and not reason):
            return StepResult(self.structure, record("nothing", cause, reason), left=left)
        # apply and test: edits in a transaction, which an outcome that is not accepted has rolled back
        before = size_of(target, self.structure)
        examples = acceptance.examples(like_example(self.observer.inputs or target.call, target.call))
        check = partial(acceptance.check, examples)
        outcome = apply_reductions(
            target, self.structure, plan.reductions, plan.dropped_variance, examples.probe, check
        )
        if not outcome.committed:
            memory.rolled_back += 1
            memory.num_backoffs += outcome.result is not None
            found = {} if outcome.result is None else measured(outcome.result.change)
            undone = record("rolled back", "measured", outcome.refused)
            return StepResult(outcome.structure, undone, left=left, measured=found)
        # keep: what it cost is added up, and reported
        if outcome.result is not None:
            acceptance.record(outcome.result)
        memory.num_events += 1
        memory.shift += shift
        for reduction in outcome.done:
            for key, error in plan.errors[reduction.group].items():
                memory.site_cost[key] = memory.site_cost.get(key, 0.0) + error
        event = make_event(
            step=memory.step,
            plan=plan,
            outcome=outcome,
            before=before,
            after=size_of(target, outcome.structure),
            measured_on="held-out examples" if acceptance.held_out else "training inputs",
            seconds=time.perf_counter() - self.start,
            notes=(*(f"{name}: {why.text}" for name, why in waiting.items()), *self._notes(sent, compiling)),
        )
        return StepResult(outcome.structure, record("event"), event, left)

    def _request(
        self, request: Request, observations: Observations, rankings: dict[str, Ranking]
    ) -> tuple[Request, float]:
        """Ask for widths by name where there is a way to go; and say how far they are expected to shift the outputs."""
        way = way_of(self.memory, self.settings)
        if way is None:
            return request, 0.0
        inputs = self.observer.inputs or self.target.call
        request, choice = towards(way, self.target, self.structure, observations, request, rankings, inputs)
        return request, choice.cost

    def _seen_again(self) -> Observations:
        """Return what the window saw; at tolerance 0 joined with what its inputs show under today's weights.

        Rows of a few steps ago are of other weights: what is redundant in them to round-off need not be so now. They
        count all the same, so that a channel that was alive a few steps ago is not taken for dead.
        """
        found, model, ranks = self.observer.observations(last=True), self.target.model, self.target.ranks
        if self.settings.tolerance != 0 or has_shards(model):  # ranks would have to make equally many passes
            return found
        if not ranks.all(bool(self.observer.calls)):
            return found
        groups, calls = self.structure.open_groups, [like_example(c, self.target.call) for c in self.observer.calls]
        try:
            _, again = sample(model, groups, calls, tolerance=0.0, modes=2, seed=self.settings.seed, ranks=ranks)
        except ArgumentError:  # the model does not run on them in evaluation mode
            return found
        return found | {key: in_both(found.get(key), seen) for key, seen in again.items()}

    def _count_compiling(self) -> float:
        """Let events cost what compiling took, which they make necessary again; return its seconds."""
        first, memory = self.target.ranks.first, self.memory
        seconds: float = first(compile_seconds())
        if seconds > 0 and not self.settings.calibrated:
            found = first(overhead_macs(0, compile_seconds=seconds, device=device_of(self.target.model)))
            memory.overhead = max(memory.overhead, found)
        return seconds

    def _notes(self, sent: int, compiling: float) -> tuple[str, ...]:
        ranks = self.target.ranks
        summed = f"{ranks.bytes_sent - sent:,} bytes summed over {ranks.size} ranks" if ranks.size > 1 else ""
        again = f"torch.compile compiles again what took it {compiling:.1f} s" if compiling > 0 else ""
        return tuple(note for note in (summed, again) if note)


def way_of(memory: RunState, settings: Settings) -> Way | None:
    """Return the way to the goal; of a pretrained network without one, how far its outputs may shift; else None.

    Every rollback halves what an event does of it.
    """
    if settings.total_steps is None or not has_goal(memory, settings):
        return None
    part = part_of_way(settings.total_steps, memory.window_start, pretrained=memory.pretrained)
    part *= 0.5**memory.num_backoffs
    if settings.goal is not None:
        return Way(goal=settings.goal, full=memory.full_size, part=part, known=memory.shifts)
    early = goal_steps(settings.total_steps, after=0, pretrained=True)[:NUM_GOAL_STEPS]
    part = max(part, 0.5**memory.num_backoffs) if memory.step >= early[-1] else part  # no further one comes
    limit = part * max(0.0, PRETRAINED_SHIFT - memory.shift)
    return Way(goal=PRETRAINED_GOAL, full=memory.full_size, limit=limit, known=memory.shifts)


# ---------------------------------------------------------------------- apply and test


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What came of applying reductions.

    structure: as it is now (new after a commit). result: of the acceptance test, None if it never came to that.
    refused: why nothing has changed, "" after a commit. pins: of groups whose edits failed. done: what was applied.
    """

    committed: bool
    structure: Structure
    result: AcceptanceResult | None = None
    refused: str = ""
    pins: tuple[Pin, ...] = ()
    done: tuple[Reduction, ...] = ()


def apply_reductions(
    target: Target,
    structure: Structure,
    reductions: Sequence[Reduction],
    dropped_variance: Mapping[str, Tensor],
    probe: Probe | None,
    check: Check,
) -> Outcome:
    """Carry out reductions in place, or leave everything bitwise as it was.

    A group whose edit breaks the forward pass or changes which channel a column reads is rolled back and pinned, and
    the others are tried again without it. A reduction that keeps nothing empties the branch of its group
    (planner.propose_empty makes them); where that fails the branch is refused from then on, and nothing is pinned.
    A change that `check` refuses rolls everything back.
    """
    pins: dict[str, Pin] = {}
    refused: dict[str, str] = {}
    trial = _Trial(target, structure, dropped_variance, probe, check)
    todo, outcome = list(reductions), None
    try:
        trial.run_before()
        while todo:
            tried = trial.attempt(todo)
            if isinstance(tried, Outcome):
                outcome = tried
                break
            if tried.compare_training:
                trial.run_before(training=True)
                continue
            if (trial.old_numbers and trial.renew_numbers()) or tried.fault is None:
                continue  # nothing is pinned, and no weight takes a factor, for what the user has changed
            failing_groups = trial.failing_groups(todo) or {todo[0].group: tried.fault}
            emptied = {r.group for r in todo if is_empty(r)} & failing_groups.keys()
            refused |= _branches(trial.structure, {name: failing_groups[name] for name in emptied})
            narrowed = {name: fault for name, fault in failing_groups.items() if name not in emptied}
            pins |= {name: broken_pin(trial.structure, name, fault) for name, fault in narrowed.items()}
            todo = [r for r in todo if r.group not in failing_groups]
    except BaseException as error:
        if target.ranks.size == 1 or isinstance(error, NonFiniteError):  # on all ranks; else they cannot meet again
            target.rebuild_wrappers()
        raise
    if outcome is None:
        broken = [*map(str, pins.values()), *(f"branch '{name}': {why}" for name, why in refused.items())]
        text = "no group can be edited: " + "; ".join(broken) if broken else "nothing to remove"
        outcome = Outcome(committed=False, structure=trial.structure, refused=text)
    if not outcome.committed:
        target.rebuild_wrappers()
    structure = without_branches(with_pins(outcome.structure, pins), refused)
    return replace(outcome, pins=tuple(pins.values()), structure=structure)


def _branches(structure: Structure, faults: Mapping[str, Fault]) -> dict[str, str]:
    """Return by name the branches of groups that cannot be emptied, with the reason."""
    own = {group.name: group.branch for group in structure.groups}
    return {branch.name: fault.brief for name, fault in faults.items() if (branch := own[name]) is not None}


class _Outputs(NamedTuple):
    """What the network returns on a probe: in evaluation mode, and in training mode where that is to be compared.

    asked: whether training mode was asked for, whatever came of it.
    """

    evaluation: list[Any]
    training: list[Any] | None
    asked: bool


class _Failure(NamedTuple):
    """What a rolled back try failed with: the fault of the structure, or None.

    None was found where numbers need a factor and those they are compared with may be old, and where outputs of
    training mode have to be compared too, because sizes vary in evaluation mode.
    """

    fault: Fault | None = None
    compare_training: bool = False


@dataclass(slots=True)
class _Trial:
    """What the tries of one `apply_reductions` have in common.

    before: what the network returned before any edit. old_numbers: the plain numbers in the structure may be those of
    an earlier step: the training loop may have set a temperature, say, since they were captured.
    """

    target: Target
    structure: Structure
    dropped_variance: Mapping[str, Tensor]
    probe: Probe | None
    check: Check
    before: _Outputs | None = None
    old_numbers: bool = True

    def run_before(self, *, training: bool = False) -> None:
        """Run the model on the probe: in evaluation mode; in training mode if asked or if that gives no numbers."""
        if self.probe is None:
            return
        model, read, ranks, probe = self.target.model, self.target.read, self.target.ranks, self.probe
        passes = self._passes(probe)
        found = ranks.run_collectively(lambda: outputs(model, probe, passes=passes))
        asked = training or ranks.any(not comparable(found, read))
        other = None
        if asked:
            other = ranks.run_collectively(lambda: training_outputs(model, probe, read, passes=passes))
            other = other if ranks.all(other is not None) else None
        self.before = _Outputs(found, other, asked)

    def attempt(self, reductions: list[Reduction]) -> Outcome | _Failure:
        """Apply all of these reductions, test, and keep them or roll back."""
        target, ranks, before = self.target, self.target.ranks, self.before
        transaction = self._transaction()
        fault: Fault | None = None
        again, after, short = False, None, None
        with restoring(transaction.close), transaction:
            try:
                new, scaled = self._edit(transaction, reductions)
                again = scaled and self.old_numbers
                if not again and before is not None:
                    after = self._outputs_after(training=before.training is not None)
            except BROKEN as error:
                fault = fault_of(error)
            except OutOfMemoryError as error:  # says nothing about a group; on one rank, it ends the event on all
                short = error
            ranks.run_collectively(partial(_raise, short))
            fault, again = first_fault(ranks, fault), ranks.any(again)
            if fault or again:
                transaction.rollback()
                return _Failure(fault)
            result = None
            if before is not None and after is not None:
                change = self._change(before, after)
                if (change.resized or not change.mode) and not before.asked:
                    transaction.rollback()
                    return _Failure(compare_training=True)
                result = self.check(change)
                if result.refused:
                    transaction.rollback()
                    return Outcome(committed=False, structure=self.structure, result=result, refused=result.refused)
            ranks.same_parameters("after an event", target.model)
            known = with_known(target, self.structure, new)
            transaction.commit()
        target.rebuild_wrappers()
        forget_compiled()
        return Outcome(committed=True, structure=known, result=result, done=tuple(reductions))

    def renew_numbers(self) -> bool:
        """Put the plain numbers of today's forward pass into the structure; return whether they are others."""
        self.old_numbers, now, old = False, self.target.capture(), self.structure
        self.structure = replace(old, scalars=now.scalars, multiples=now.multiples, scalable=now.scalable)
        return self.target.ranks.any(now.scalars != old.scalars)

    def failing_groups(self, reductions: list[Reduction]) -> dict[str, Fault]:
        """Return the groups that fail on their own, with the reason; every trial is rolled back.

        Groups that one number of a module governs (Group.tied_groups) can only be tried, and fail, together.
        """
        found: dict[str, Fault] = {}
        tied = {group.name: group.tied_groups for group in self.structure.groups}
        for first in reductions:
            if first.group in found:
                continue
            together_with = [first, *(r for r in reductions if r.group in tied[first.group])]
            transaction = self._transaction()
            with restoring(transaction.close):
                try:
                    self._edit(transaction, together_with)
                    if self.probe is not None:
                        self._outputs_after(training=False)
                except BROKEN as error:
                    found.update((reduction.group, fault_of(error)) for reduction in together_with)
        return {name: fault for own in self.target.ranks.gathered(found) for name, fault in own.items()}

    def _transaction(self) -> Transaction:
        return Transaction(self.target.model, self.target.optimizers, self.target.averaged_models)

    def _edit(self, transaction: Transaction, reductions: Sequence[Reduction]) -> tuple[Structure, bool]:
        """Edit, capture again, compare channels, and multiply by factors where scores are divided by a size.

        Returns: the new structure, and whether there were such factors.

        Raises: what is in BROKEN, where the edit is wrong for the model; the caller then pins the group.
        """
        structure, target = self.structure, self.target
        emptied = empty_edits(structure, reductions)
        narrowed, scaled = structure, False
        if left := [reduction for reduction in reductions if not is_empty(reduction)]:
            narrowed, scaled = self._narrow(transaction, left)
        if not emptied:
            return narrowed, scaled
        transaction.empty(emptied)
        new = target.capture()
        verify_emptied(narrowed, new, [edit.branch for edit in emptied])
        return new, scaled

    def _narrow(self, transaction: Transaction, reductions: Sequence[Reduction]) -> tuple[Structure, bool]:
        """Edit, as `_edit` says, the groups that keep some of their channels."""
        structure, target = self.structure, self.target
        edits = build_edits(structure, reductions, self.dropped_variance)
        normalised = bool(structure.normalised)
        today = target.capture() if normalised else structure
        transaction.apply(edits, structure, norm_edits(structure, reductions))
        new = target.capture()
        scales = verify_up_to_scale(structure, new, kept_positions(edits))
        sizes = gains(today, new, kept_positions(edits)) if normalised else ()
        transaction.rescale((*scales, *sizes))
        return target.capture() if sizes else new, bool(scales)

    def _passes(self, probe: Probe) -> int:
        """Return how many passes every rank makes over its probe, where ranks gather parameters together in each."""
        own = len(probe.pieces())
        if not has_shards(self.target.model):
            return own
        return int(self.target.ranks.range_of(torch.tensor([own], dtype=torch.int64, device="cpu"))[1])

    def _outputs_after(self, *, training: bool) -> _Outputs | None:
        """Return what the edited network returns on examples that the network before took, in one mode or both.

        Raises: CaptureError: it fails on them. OutOfMemoryError: memory runs out.
        """
        model, probe = self.target.model, self.probe
        if probe is None:
            return None
        passes = self._passes(probe)
        found = outputs_of_edited(model, probe, passes=passes)
        other = None
        if training:
            other = training_outputs(model, probe, self.target.read, passes=passes, checked=False)
        return _Outputs(found, other, training)

    def _change(self, before: _Outputs, after: _Outputs) -> Change:
        """Compare outputs on the probes of all ranks. Raises: NonFiniteError: outputs before are not finite."""
        probe, ranks = self.probe, self.target.ranks
        labels = None if probe is None else probe.labels
        both = None
        if before.training is not None and after.training is not None:
            both = before.training, after.training
        change = ranks.run_collectively(
            partial(compare, before.evaluation, after.evaluation, labels, self.target.read, probe=probe, training=both)
        )
        return together(ranks.gathered(change))


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
