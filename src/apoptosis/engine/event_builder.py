"""Builds the Event that reports one pruning step.

Holds: counting parameters and bytes before and after, putting an Event together. Elsewhere: the step (step.py), how an
event prints itself (decide.ledger).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from apoptosis.decide.ledger import Attempt, Event
from apoptosis.model.outputs import Change
from apoptosis.planner import Plan, merged
from apoptosis.records import Structure
from apoptosis.surgery import layers
from apoptosis.surgery.target import Target

if TYPE_CHECKING:
    from apoptosis.engine.applying import Outcome

_SHOWN = 3  # outputs that are named


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Number of parameters, bytes of parameters, buffers and optimizer state, and MACs per example."""

    parameters: int
    bytes: int
    macs: float


def size_of(target: Target, structure: Structure) -> Size:
    """Measure a target."""
    parameters, macs = num_parameters(target.model), structure.macs / target.num_examples
    return Size(parameters=parameters, bytes=state_bytes(target), macs=macs)


def make_event(
    *,
    step: int,
    plan: Plan,
    outcome: Outcome,
    before: Size,
    after: Size,
    measured_on: str,
    seconds: float,
    notes: tuple[str, ...] = (),
) -> Event:
    """Put together the report of one pruning step, from what was planned, what was measured and what came of it."""
    done = [reduction.group for reduction in outcome.done]
    left = {group.name for group in outcome.structure.groups}
    gone = {name for name, (_, after) in plan.widths.items() if outcome.committed and not after and name not in left}
    promised = merged(certificate for name in done for certificate in plan.certificates[name])
    change = None if outcome.result is None else outcome.result.change
    limit = None if outcome.result is None or not outcome.committed else outcome.result.certificate
    return Event(
        step=step,
        tolerance=plan.tolerance,
        criterion=plan.criterion,
        groups={name: plan.widths[name] for name in plan.widths if name in done or name in gone},
        parameters=(before.parameters, after.parameters),
        macs=(before.macs, after.macs),
        bytes_freed=before.bytes - after.bytes,
        certificates=promised if limit is None else (*promised, limit),
        measured={} if change is None else measured(change),
        measured_on=f"on {change.rows if change is not None else 0} {measured_on}",
        outputs="not compared" if change is None or not change.mode else f"{change.mode} mode",
        seconds=seconds,
        notes=(*notes, *_resized(change), *(str(pin) for pin in outcome.pins)),
    )


def measured(change: Change) -> dict[str, float]:
    """Return what was measured of a change, by the names that events and the log have for it."""
    found: dict[str, float] = {}
    if change.mode:
        found["output_rms"] = change.rms
    if change.changed is not None:
        found["integers_changed"] = change.changed
    if change.readable:
        found |= {"flips": change.flips / change.rows, "margin_share": change.margin_share}
    return found


def _resized(change: Change | None) -> tuple[str, ...]:
    """Name outputs that could not be compared because their size changed with their values."""
    if change is None or not change.resized:
        return ()
    shown = ", ".join(f"'{path}'" if path else "the output" for path in change.resized[:_SHOWN])
    more = f" and {len(change.resized) - _SHOWN} more" if len(change.resized) > _SHOWN else ""
    return (f"not compared, because the size differs after the event: {shown}{more}",)


def state_bytes(target: Target) -> int:
    """Bytes of parameters, buffers and optimizer state now."""
    total = sum(t.numel() * t.element_size() for t in (*target.model.parameters(), *target.model.buffers()))
    for optimizer in (layer for each in target.optimizers for layer in layers(each)):
        for state in optimizer.state.values():
            if isinstance(state, dict):
                total += sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, torch.Tensor))
    return total


def num_parameters(model: nn.Module) -> int:
    """Parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def log_entry(
    attempt: Attempt, event: Event | None, *, left: Mapping[str, str], measured: Mapping[str, float]
) -> dict[str, Any]:
    """Return what a user's log gets for an attempt, as plain values.

    Args: left: what the plan left as it was, a line by group. measured: what was measured where there is no event.
    """
    if attempt.outcome in ("nothing", "skipped"):
        found = {"measured": dict(measured)} if measured else {}
        return {"kind": "attempt", **attempt.as_dict(), "groups": dict(left), **found}
    told = {"step": attempt.step, "measured": dict(measured)} if event is None else event.as_dict()
    return {"kind": "event", "rolled_back": event is None, "reason": attempt.reason, **told}
