"""What a window observes, how long it stays open, and what it leaves out.

Holds: whether groups that have seen too few rows are waited for, and the warning where they cannot see enough before
the run ends. Elsewhere: what is observed (observe), when a window opens (decide.policy, engine).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from apoptosis.decide.acceptance import AcceptanceTest
from apoptosis.decide.policy import (
    PATIENCE_STEPS,
    SOON_SHARE,
    Decision,
    Telemetry,
    decide,
    delay_of,
    has_to_end,
    is_due,
    tolerance_at,
    worth_waiting,
)
from apoptosis.decide.state import RunState, Settings, has_goal, telemetry
from apoptosis.distributed.ranks import Ranks
from apoptosis.graph import replay
from apoptosis.observe import Observer, needs_float64
from apoptosis.planner import Why, groups_to_observe, waits, with_tied
from apoptosis.records import Group, Structure
from apoptosis.surgery.target import Target

_FEW_STEPS = 3  # of a window, after which its pace is known


def new_window(
    target: Target, settings: Settings, memory: RunState, structure: Structure, acceptance: AcceptanceTest
) -> Observer:
    """Return a window that sees other positions than the one before, and on every rank others."""
    exactly = settings.tolerance == 0 and settings.goal is None
    return Observer(
        target.model,
        groups_to_observe(structure) if has_goal(memory, settings) else structure.open_groups,
        seed=settings.seed * 1_000_003 + len(memory.history) + 500_009 * target.ranks.rank,
        exact=exactly or needs_float64(settings.tolerance),
        keep_calls=exactly,
        keep_inputs=has_goal(memory, settings) or not acceptance.held_out,
        replay=replay,
        gradients=settings.criterion.grad_factor and not exactly,
        ranks=target.ranks,
        whole=memory.require_full_sample or exactly,
    )


def next_window(memory: RunState, settings: Settings, structure: Structure, rows: int) -> Decision:
    """Decide when the next window opens. rows: examples in the example input."""
    if not structure.open_groups:
        again = 2 * memory.step + 1 if structure.frozen else None  # it may be unfrozen by then
        tolerance = tolerance_at(settings.tolerance, memory.num_backoffs)
        return Decision(at_step=again, tolerance=tolerance, reason="no group can be pruned")
    return decide(telemetry(memory, settings, structure, rows=rows))


def may_be_cut_short(observer: Observer) -> bool:
    """Whether a window has lasted long enough to ask if it should go on."""
    return observer.steps >= max(PATIENCE_STEPS, observer.patience)


def is_cut_short(observer: Observer, groups: Sequence[Group], seen: Telemetry, behind: Collection[str]) -> bool:
    """Whether a window ends although some groups have not seen their rows.

    It does where those do not hold enough of the multiply-adds to be waited for (policy.worth_waiting). What the last
    event left out (behind) is waited for, unless events follow one another so closely that a later one will do
    (policy.is_due).
    """
    seen = replace(seen, batch_rows=observer.examples / observer.steps)
    if has_to_end(seen, observer.steps) and len(_late(groups, observer, gradients=True)) < len(groups):
        observer.cut_short = True
        return True
    steps = _steps_to_wait(observer, groups, seen, behind, gradients=False)
    steps = steps or _steps_to_wait(observer, groups, seen, behind, gradients=True)
    observer.patience = observer.steps + min(int(steps / 2), PATIENCE_STEPS)
    observer.cut_short = steps == 0.0
    return observer.cut_short


def _steps_to_wait(
    observer: Observer, groups: Sequence[Group], seen: Telemetry, behind: Collection[str], *, gradients: bool
) -> float:
    """Return the steps until some group that is worth waiting for has seen its rows, 0 if none is."""
    late = _late(groups, observer, gradients=gradients)
    macs = {g.name: g.num_channels * g.macs_per_channel for g in groups if not g.conflicts_with}  # no channel twice
    ready = sum(macs[name] for name in macs if name not in late)
    waiting = [(macs.get(name, 0.0), steps) for name, steps in late.items()]
    due = any(is_due(seen, steps) for name, steps in late.items() if name in behind)
    due = due or any(steps <= SOON_SHARE * observer.steps for steps in late.values())
    if due or worth_waiting(ready, waiting, delay_of(seen, observer.steps)):
        return max(1.0, min(late.values()))
    return 0.0


def _late(groups: Sequence[Group], observer: Observer, *, gradients: bool) -> dict[str, float]:
    """Return the groups that cannot change yet, with the steps they still need; those of one width wait together."""
    lacking = observer.lacking(gradients=gradients)
    longest, tied = max(lacking.values(), default=0.0), with_tied(lacking, groups)
    return {group.name: lacking.get(group.name, longest) for group in groups if group.name in tied}


def left_out(observer: Observer, groups: Sequence[Group], ranks: Ranks) -> dict[str, Why]:
    """Return the groups that an event leaves for the next one, the same on all ranks: what some rank lacks rows for."""
    late = _late(groups, observer, gradients=True) if observer.cut_short else {}
    own = {name: observer.seen_by(name) for name in late}
    found: dict[str, Why] = {}
    for reported in ranks.gathered(own):
        found |= {name: waits(sites) for name, sites in reported.items() if name not in found}
    return found


def comes_too_late(observer: Observer, groups: Sequence[Group], *, step: int, total_steps: int | None) -> str:
    """Say of the first window, once it has lasted a few steps, that the run will be over before any group is ready."""
    if total_steps is None or observer.steps != _FEW_STEPS or observer.saw_nothing:
        return ""
    late, left = _late(groups, observer, gradients=False), total_steps - step
    if len(late) < len(groups) or min(late.values()) <= left:
        return ""
    return (
        f"apoptosis: after {observer.steps} steps of the first window {observer.lacks()}; at this pace too few come in "
        f"the {left:,} steps that remain of total_steps={total_steps:,} for an event. Larger batches, or a longer run, "
        "show more rows."
    )
