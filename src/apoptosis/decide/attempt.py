"""One attempt of a run to shrink: plan, transaction, acceptance test, and what is recorded of it.

Holds: the order of these within one event. Elsewhere: the loop (engine), the surgery
(surgery.operation).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from apoptosis.decide.acceptance import AcceptanceTest
from apoptosis.decide.event_builder import make_event, size_of
from apoptosis.decide.history import Attempt, Outcome
from apoptosis.decide.ledger import Event
from apoptosis.decide.overhead import device_of, overhead_macs
from apoptosis.decide.policy import PATIENCE_STEPS, SOON_SHARE, Telemetry, delay_of, is_due, loss_of, worth_waiting
from apoptosis.decide.state import RunState, Settings, allowed, telemetry
from apoptosis.distributed.fsdp import has_shards
from apoptosis.distributed.ranks import Ranks
from apoptosis.distributed.zero import check_together
from apoptosis.errors import ArgumentError
from apoptosis.graph import replay
from apoptosis.model.evaluate import like_example, num_rows
from apoptosis.model.passes import compile_seconds
from apoptosis.observe import Observer, in_both, needs_float64
from apoptosis.planner import Observations, Plan, Why, make_plan, summary, waits, with_equals
from apoptosis.planner.sampling import sample
from apoptosis.records import Group, Structure
from apoptosis.surgery.operation import Target, apply_reductions

_FEW_STEPS = 3  # of a window, after which its pace is known


class Run(NamedTuple):
    """All that an attempt needs to know of a run; it writes to `memory` and `acceptance`."""

    target: Target
    structure: Structure
    memory: RunState
    settings: Settings
    acceptance: AcceptanceTest


def _rows(run: Run) -> int:
    return max(1, num_rows(run.target.call))


def seen_by_policy(run: Run) -> Telemetry:
    """Gather the policy's telemetry."""
    return telemetry(run.memory, run.settings, run.structure, rows=_rows(run))


def plan_now(
    run: Run,
    observations: Observations,
    ranks: Ranks | None = None,
    waiting: Mapping[str, Why] | None = None,
    *,
    last: bool = False,
) -> Plan:
    """Plan an event under what is allowed now.

    ranks: that share the work, all of which call this. waiting: groups that are left for a later event. last: nobody
    needs the observations afterwards.
    """
    groups = tuple(group for group in run.structure.groups if group.pin is None)
    wanted = allowed(run.memory, run.settings, groups, waiting)
    return make_plan(run.target.model, run.structure, observations, wanted, ranks, last=last)


def agree(run: Run, budget: float | None) -> None:
    """Check that all ranks were asked for the same of the same network.

    Raises: RankError: they were not; what differs is named. UnsupportedOptimizerError: an optimizer steps over others.
    """
    check_together(run.target.optimizers, run.target.ranks.size)
    asked = run.settings.as_dict() | {"seed": run.settings.seed, "budget": budget, "probe": run.acceptance.held_out}
    asked |= {"whether calibration= is given": run.settings.calibrated}
    asked |= {"example input, multiply-adds": run.structure.macs, "example input, rows": _rows(run)}
    widths = {f"group {g.name}": (g.num_channels, g.pin is None, *(site.key for site in g.sites))
              for g in run.structure.groups}  # fmt: skip
    run.target.ranks.same("arguments or groups of Apoptosis", asked | widths)


def new_window(run: Run, groups: Sequence[Group]) -> Observer:
    """Return a window over some groups, which sees other positions than the one before, and on every rank others."""
    settings, ranks = run.settings, run.target.ranks
    return Observer(
        run.target.model,
        groups,
        seed=settings.seed * 1_000_003 + len(run.memory.history) + 500_009 * ranks.rank,
        exact=needs_float64(settings.tolerance),
        keep_calls=settings.tolerance == 0,
        keep_inputs=not run.acceptance.held_out,
        replay=replay,
        gradients=settings.criterion.grad_factor and settings.tolerance != 0,
        ranks=ranks,
        whole=run.memory.require_full_sample or settings.tolerance == 0,
    )


def ends(run: Run, observer: Observer) -> bool:
    """Note that a step of the open window has passed; return whether the window is over, on all ranks alike.

    It is when every group has seen its rows, or is given up; or when those that have not do not hold enough of the
    multiply-adds to be waited for (policy.worth_waiting). What the last event left out is waited for, unless turns
    follow one another so closely that a later one will do (policy.is_due).
    """
    over = observer.end_step()
    observer.cut_short = False
    if not over and observer.steps >= max(PATIENCE_STEPS, observer.patience):
        steps = _worth_waiting(run, observer, gradients=False) or _worth_waiting(run, observer, gradients=True)
        observer.cut_short = over = steps == 0.0
        observer.patience = observer.steps + min(int(steps / 2), PATIENCE_STEPS)
    return run.target.ranks.all(over)


def comes_too_late(run: Run, observer: Observer) -> str:
    """Say of the first window, once it has lasted a few steps, that the run will be over before any group is ready."""
    total, memory = run.settings.total_steps, run.memory
    if (
        total is None
        or observer.steps != _FEW_STEPS
        or memory.attempts
        or run.target.ranks.rank
        or observer.saw_nothing
    ):
        return ""
    late, left = (
        _late([g for g in run.structure.groups if g.pin is None], observer, gradients=False),
        total - memory.step,
    )
    if len(late) < sum(group.pin is None for group in run.structure.groups) or min(late.values()) <= left:
        return ""
    return (
        f"apoptosis: after {observer.steps} steps of the first window {observer.lacks()}; at this pace too few come in "
        f"the {left:,} steps that remain of total_steps={total:,} for an event. Larger batches, or a longer run, show "
        "more rows."
    )


def _worth_waiting(run: Run, observer: Observer, *, gradients: bool) -> float:
    """Return the steps until some group that is worth waiting for has seen its rows, 0 if none is."""
    groups = [group for group in run.structure.groups if group.pin is None]
    late = _late(groups, observer, gradients=gradients)
    reported = replace(seen_by_policy(run), batch_rows=observer.examples / observer.steps)
    macs = {g.name: g.num_channels * g.macs_per_channel for g in groups if not g.conflicts_with}  # no channel twice
    ready = sum(macs[name] for name in macs if name not in late)
    waiting = [(macs.get(name, 0.0), steps) for name, steps in late.items()]
    due = any(is_due(reported, steps) for name, steps in late.items() if name in run.memory.behind)
    due = due or any(steps <= SOON_SHARE * observer.steps for steps in late.values())
    if due or worth_waiting(ready, waiting, delay_of(reported, observer.steps)):
        return max(1.0, min(late.values()))
    return 0.0


def _late(groups: Sequence[Group], observer: Observer, *, gradients: bool) -> dict[str, float]:
    """Return the groups that cannot change yet, with the steps they still need; those of one width wait together."""
    lacking = observer.lacking(gradients=gradients)
    longest, tied = max(lacking.values(), default=0.0), with_equals(lacking, groups)
    return {group.name: lacking.get(group.name, longest) for group in groups if group.name in tied}


def left_out(run: Run, observer: Observer) -> dict[str, Why]:
    """Return the groups that an event leaves for the next one, the same on all ranks: what some rank lacks rows for."""
    groups = [group for group in run.structure.groups if group.pin is None]
    late = _late(groups, observer, gradients=True) if observer.cut_short else {}
    own = {name: observer.seen_by(name) for name in late}
    found: dict[str, Why] = {}
    for reported in run.target.ranks.gathered(own):
        found |= {name: waits(sites) for name, sites in reported.items() if name not in found}
    return found


def kept_window(run: Run, window: Mapping[str, Any] | None) -> Observer | None:
    """Return the window that a checkpoint holds, as it was, or None: of several ranks every one saw other rows.

    Raises: one of CORRUPT_STATE_ERRORS (state): it is of other groups or damaged.
    """
    if window is None or run.target.ranks.size > 1:
        return None
    observer = new_window(run, tuple(group for group in run.structure.groups if group.pin is None))
    observer.load_state_dict(window)
    return observer


class Tried(NamedTuple):
    """What came of an attempt.

    structure: as it is now. attempt: its record. event: if shapes changed. left: what the plan leaves as it is, a line
    by group.
    """

    structure: Structure
    attempt: Attempt
    event: Event | None = None
    left: Mapping[str, str] = {}


def attempt(run: Run, observer: Observer, start: float) -> Tried:
    """Plan and operate, or leave everything as it was.

    Args:
        run: what the attempt is part of.
        observer: the closed window.
        start: `time.perf_counter()` at the beginning of the event.

    Returns: what came of it, with its reason; after a rollback the tolerance is halved for the rest of the run.

    Raises: NonFiniteError: statistics, weights or outputs hold NaN or infinity; nothing was tried.
    """
    ranks = run.target.ranks
    sent, compiling = ranks.bytes_sent, _count_compiling(run)
    waiting = left_out(run, observer)
    observer.pool()
    ranks.same_parameters("before an event", run.target.model)
    plan = plan_now(run, _seen_again(run, observer), ranks, waiting, last=True)
    target, memory, acceptance = run.target, run.memory, run.acceptance
    memory.behind = tuple(sorted(waiting))
    memory.require_full_sample = memory.require_full_sample or any(why.cause == "rows" for why in plan.left.values())
    left = {name: why.text for name, why in plan.left.items()}
    cause, reason = "gain", loss_of(seen_by_policy(run), plan.macs_after / _rows(run))
    if not plan.reductions:
        cause, reason = summary(plan.left)
    if not ranks.all(bool(plan.reductions) and not reason):
        return Tried(run.structure, record(run, "nothing", cause, reason), left=left)
    before = size_of(target, run.structure)
    probe = acceptance.begin(like_example(observer.inputs or target.call, target.call))
    outcome = apply_reductions(
        target, run.structure, plan.reductions, plan.dropped_variance, probe, acceptance.evaluate
    )
    if not outcome.committed:
        memory.rolled_back += 1
        memory.num_backoffs += outcome.change is not None
        return Tried(outcome.structure, record(run, "rolled back", "measured", outcome.refused), left=left)
    certificates = acceptance.record()
    memory.num_events += 1
    for reduction in outcome.done:
        for key, error in plan.errors[reduction.group].items():
            memory.site_cost[key] = memory.site_cost.get(key, 0.0) + error
    event = make_event(
        step=memory.step,
        plan=plan,
        outcome=outcome,
        before=before,
        after=size_of(target, outcome.structure),
        certificates=certificates,
        measured_on="held-out examples" if acceptance.held_out else "training inputs",
        seconds=time.perf_counter() - start,
        notes=(*(f"{name}: {why.text}" for name, why in waiting.items()), *_notes(ranks, sent, compiling)),
    )
    return Tried(outcome.structure, record(run, "event"), event, left)


def record(run: Run, outcome: Outcome, cause: str = "", reason: str = "") -> Attempt:
    """Return the record of an attempt that ends at this step."""
    open_groups = sum(group.pin is None for group in run.structure.groups)
    opened = run.memory.window_start
    return Attempt(
        step=run.memory.step, opened=opened, outcome=outcome, considered=open_groups, cause=cause, reason=reason
    )


def _seen_again(run: Run, observer: Observer) -> Observations:
    """Return what a window saw; at tolerance 0 joined with what its inputs show under today's weights.

    Rows of a few steps ago are of other weights: what is redundant in them to round-off need not be so now. They count
    all the same, so that a channel that was alive a few steps ago is not taken for dead.
    """
    found = observer.observations(last=True)
    if run.settings.tolerance != 0 or has_shards(run.target.model):  # ranks would have to make equally many passes
        return found
    ranks, model = run.target.ranks, run.target.model
    if not ranks.all(bool(observer.calls)):
        return found
    groups = [group for group in run.structure.groups if group.pin is None]
    calls = [like_example(call, run.target.call) for call in observer.calls]
    try:
        _, again = sample(model, groups, calls, tolerance=0.0, modes=2, seed=run.settings.seed, ranks=ranks)
    except ArgumentError:  # the model does not run on them in evaluation mode
        return found
    return found | {key: in_both(found.get(key), seen) for key, seen in again.items()}


def _count_compiling(run: Run) -> float:
    """Let events cost what compiling took, which they make necessary again; return its seconds."""
    seconds: float = run.target.ranks.first(compile_seconds())
    if seconds > 0 and not run.settings.calibrated:
        found = run.target.ranks.first(overhead_macs(0, compile_seconds=seconds, device=device_of(run.target.model)))
        run.memory.overhead = max(run.memory.overhead, found)
    return seconds


def _notes(ranks: Ranks, sent: int, compiling: float) -> tuple[str, ...]:
    summed = f"{ranks.bytes_sent - sent:,} bytes summed over {ranks.size} ranks" if ranks.size > 1 else ""
    again = f"what torch.compile took {compiling:.1f} s for is compiled again" if compiling > 0 else ""
    return tuple(note for note in (summed, again) if note)
