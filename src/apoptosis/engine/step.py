"""One pruning step from top to bottom: plan, apply, test, keep or roll back.

Holds: the order of these for one event, and what is tried again. Elsewhere: when a window opens and ends (engine,
window.py), what to remove (planner), applying a plan (applying.py), what a change may cost (decide).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from apoptosis.criteria import Ranking
from apoptosis.decide.acceptance import AcceptanceResult, AcceptanceTest, Examples
from apoptosis.decide.exchange import too_dear
from apoptosis.decide.ledger import Attempt, Event
from apoptosis.decide.overhead import overhead_macs
from apoptosis.decide.policy import NUM_GOAL_STEPS, goal_steps, loss_of, part_of_way
from apoptosis.decide.state import (
    PRETRAINED_GOAL,
    PRETRAINED_SHIFT,
    RETRIES,
    RunState,
    Settings,
    allowed,
    has_goal,
    telemetry,
)
from apoptosis.distributed.sharded import has_shards
from apoptosis.engine.applying import Outcome, apply_reductions
from apoptosis.engine.event_builder import make_event, measured, size_of
from apoptosis.engine.looks import forming
from apoptosis.engine.sensitivity import Way, towards
from apoptosis.engine.window import left_out
from apoptosis.errors import (
    ArgumentError,
)
from apoptosis.model.evaluate import like_example
from apoptosis.model.outputs import Change
from apoptosis.model.passes import compile_seconds, device_of
from apoptosis.observe import Observer, in_both
from apoptosis.planner import Observations, Plan, Request, Why, make_plan, summary
from apoptosis.planner.sampling import sample
from apoptosis.records import Structure
from apoptosis.surgery.target import (
    Target,
)


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

    def tries(self) -> Iterator[StepResult]:
        """Take the step, or leave everything as it was.

        Towards a goal, a step that was rolled back because the outputs moved too far is tried again, half as large: the
        window is the same, and what trials of single groups showed is known.

        Yields: what came of every try, with its reason; a rollback halves the tolerance for the rest of the run.

        Raises: NonFiniteError: statistics, weights or outputs hold NaN or infinity; nothing was tried.
        """
        groups, ranks = self.structure.open_groups, self.target.ranks
        # observe: what this window saw, on all ranks together
        waiting = left_out(self.observer, groups, ranks)
        self.observer.pool()
        ranks.same_parameters("before an event", self.target.model)
        if reason := forming(self.memory, self.settings, ranks):
            yield StepResult(self.structure, self.memory.attempt(len(groups), "nothing", "forming", reason))
            return
        seen, rankings = self._seen_again(), dict[str, Ranking]()
        left, step = RETRIES if has_goal(self.memory, self.settings) else 0, self
        while True:
            result = step._try(waiting, seen, rankings, last=left == 0)
            yield result
            if left == 0 or result.attempt.cause != "outputs":
                return
            left, step = left - 1, replace(step, structure=result.structure)

    def _try(
        self, waiting: Mapping[str, Why], seen_rows: Observations, rankings: dict[str, Ranking], *, last: bool
    ) -> StepResult:
        """Plan, apply and test. waiting: groups that are left out. last: whether nothing is tried after it."""
        target, memory, ranks = self.target, self.memory, self.target.ranks
        groups, sent, compiling = self.structure.open_groups, ranks.bytes_sent, self._count_compiling()
        record = partial(memory.attempt, len(groups))
        # plan: which channels go, if that pays
        request, shift = self._request(allowed(memory, self.settings, groups, waiting), seen_rows, rankings)
        plan = make_plan(target.model, self.structure, seen_rows, request, ranks, rankings=rankings, last=last)
        memory.behind = tuple(sorted(waiting))
        memory.require_full_sample |= any(why.cause == "rows" for why in plan.left.values())
        left = {name: why.text for name, why in plan.left.items()}
        cause, reason = self._pays(plan)
        if not ranks.all(bool(plan.reductions) and not reason):
            return StepResult(self.structure, record("nothing", cause, reason), left=left)
        # apply and test: edits in a transaction, which an outcome that is not accepted has rolled back
        before = size_of(target, self.structure)
        outcome = self._apply(plan)
        found = {} if outcome.result is None else measured(outcome.result.change)
        if outcome.result is not None and outcome.result.refused and outcome.result.cause == "exchange":
            return StepResult(
                outcome.structure, record("nothing", "exchange", outcome.refused), left=left, measured=found
            )
        if not outcome.committed:
            memory.rolled_back += 1
            memory.num_backoffs += outcome.result is not None
            undone = record("rolled back", outcome.result.cause if outcome.result else "measured", outcome.refused)
            return StepResult(outcome.structure, undone, left=left, measured=found)
        # keep: what it cost is added up, and reported
        self._record(plan, outcome, shift)
        event = make_event(
            step=memory.step,
            plan=plan,
            outcome=outcome,
            before=before,
            after=size_of(target, outcome.structure),
            measured_on="held-out examples" if self.acceptance.held_out else "training inputs",
            seconds=time.perf_counter() - self.start,
            notes=(*(f"{name}: {why.text}" for name, why in waiting.items()), *self._notes(sent, compiling)),
        )
        return StepResult(outcome.structure, record("event"), event, left)

    def _pays(self, plan: Plan) -> tuple[str, str]:
        """Return why nothing of a plan is carried out, a cause and a reason; the reason is "" if it is."""
        cause, reason = "gain", ""
        if self.settings.goal is None:  # which is reached whether that pays or not
            seen = telemetry(self.memory, self.settings, self.structure, rows=self.target.num_examples)
            reason = loss_of(seen, plan.macs_after / self.target.num_examples)
        return (cause, reason) if plan.reductions else summary(plan.left)

    def _apply(self, plan: Plan) -> Outcome:
        target, acceptance = self.target, self.acceptance
        examples = acceptance.examples(like_example(self.observer.inputs or target.call, target.call))
        saved = 1.0 - plan.macs_after / self.structure.macs if self.structure.macs > 0 else 0.0
        check = partial(self._check, examples, saved)
        return apply_reductions(target, self.structure, plan.reductions, plan.dropped_variance, examples.probe, check)

    def _record(self, plan: Plan, outcome: Outcome, shift: float) -> None:
        """Add up what an event that is kept has cost. shift: that was foretold of the outputs."""
        memory = self.memory
        if outcome.result is not None:
            self.acceptance.record(outcome.result)
        memory.num_events += 1
        memory.shift += shift
        for reduction in outcome.done:
            for key, error in plan.errors[reduction.group].items():
                memory.site_cost[key] = memory.site_cost.get(key, 0.0) + error

    def _check(self, examples: Examples, saved: float, change: Change) -> AcceptanceResult:
        """Test a measured change; where nobody has said what may be lost, set its cost against what it saves.

        Only where no classes can be read off the outputs: there the loss itself is what counts, and it follows every
        change of the outputs; predictions do not. saved: share of the multiply-adds.
        """
        settings, memory, result = self.settings, self.memory, self.acceptance.check(examples, change)
        asked = not settings.automatic or has_goal(memory, settings) or self.acceptance.error_budget.budget is not None
        if result.refused or asked or change.readable or not change.mode or not settings.total_steps:
            return result
        left = max(0.0, 1.0 - memory.step / settings.total_steps)
        return replace(result, refused=too_dear(change.rms, saved=saved, left=left), cause="exchange")

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
    part = part_of_way(settings.total_steps, memory.step, pretrained=memory.pretrained)
    part *= 0.5**memory.num_backoffs
    trials: Any = {"full": memory.full_size, "known": memory.shifts, "full_widths": memory.full_widths}
    if settings.goal is not None:
        return Way(goal=settings.goal, part=part, **trials)
    early = goal_steps(settings.total_steps, after=0, pretrained=True)[:NUM_GOAL_STEPS]
    part = max(part, 0.5**memory.num_backoffs) if memory.step >= early[-1] else part  # no further one comes
    limit = part * max(0.0, PRETRAINED_SHIFT - memory.shift)
    return Way(goal=PRETRAINED_GOAL, limit=limit, **trials)
