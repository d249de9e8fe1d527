"""What became of every attempt of a run.

Holds: the record of an attempt and its wording. Elsewhere: the attempt itself (engine.step), what a plan says of a
group (planner/reasons.py), what the policy remembers (policy.PastEvent), why a run is idle (state.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Literal

FEWEST_STEPS = 6  # a run of fewer is too short for a window
STEPS_NOT_EPOCHS = (
    "total_steps= counts optimizer steps, not epochs: give epochs * len(loader), or leave it out where it is not known."
)

Outcome = Literal["event", "nothing", "rolled back", "skipped"]

REMEDIES = {
    "tolerance": "A larger tolerance= allows more; a network without redundant channels stays as it is.",
    "align": "A smaller align= allows finer steps.",
    "limit": "A larger tolerance= allows more over the whole run.",
    "rows": "Larger batches, or a longer run, show more rows.",
    "waiting": "Larger batches, or a longer run, show more rows.",
    "unseen": "Call the model in training mode, with gradients, on the batches of training.",
    "gain": "A longer run, or a larger tolerance=, saves more; on a network this small events may never pay.",
    "": "",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One window and what came of it.

    step: optimizer step at which it was decided. opened: at which the window was opened. outcome: "event": shapes
    changed; "nothing": nothing to remove, or not enough to pay; "rolled back": removed and put back; "skipped": nothing
    could be tried. considered: groups that were open. cause: of an outcome other than "event", for code ("tolerance",
    "rows", "gain", ...; `planner.Cause`). reason: the same as one line, "" for an event.
    """

    step: int
    opened: int
    outcome: Outcome
    considered: int = 0
    cause: str = ""
    reason: str = ""

    def __str__(self) -> str:
        return f"step {self.step}: {_words(self)}"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-able values."""
        return asdict(self)


def read_attempts(state: Mapping[str, Any]) -> tuple[Attempt, ...]:
    """Read the attempts of a run's memory; a checkpoint of an earlier version holds but what the policy remembers.

    Raises: KeyError, TypeError, ValueError: they are damaged.
    """
    if "attempts" in state:
        return tuple(Attempt(**entry) for entry in state["attempts"])
    found = []
    for past in state["history"]:
        saved = past["macs_after"] < past["macs_before"]
        outcome: Outcome = "rolled back" if past["rolled_back"] else "event" if saved else "nothing"
        reason = "" if outcome == "event" else "the checkpoint that the run was resumed from does not say why"
        found.append(Attempt(step=past["step"], opened=past["step"], outcome=outcome, reason=reason))
    return tuple(found)


def lines_of(attempts: Sequence[Attempt]) -> list[str]:
    """Return a line for every attempt without an event; of several in a row with one cause, the last one's reason."""
    found = []
    for (outcome, _), together in groupby(attempts, key=lambda a: (a.outcome, a.cause)):
        if outcome == "event":
            continue
        first, *others = together
        last = others[-1] if others else first
        steps = f"steps {first.step} to {last.step}, {1 + len(others)} attempts" if others else f"step {first.step}"
        found.append(f"{steps}: {_words(last)}")
    return found


def warn_if_few(total_steps: int | None) -> None:
    """Warn of a run of so few steps that epochs must have been given."""
    if total_steps is not None and total_steps < FEWEST_STEPS:
        what = f"apoptosis: total_steps={total_steps} is too short for an event. {STEPS_NOT_EPOCHS}"
        warnings.warn(what, RuntimeWarning, stacklevel=3)


def warn_at_end(step: int) -> None:
    """Warn of the first step beyond those that the run was to have."""
    what = f"apoptosis: step {step:,} is beyond total_steps={step - 1:,}: no event comes any more. {STEPS_NOT_EPOCHS}"
    warnings.warn(what, RuntimeWarning, stacklevel=3)


def _words(attempt: Attempt) -> str:
    what = {"nothing": "nothing removed", "event": "shapes changed"}.get(attempt.outcome, attempt.outcome)
    return what + (f": {attempt.reason}" if attempt.reason else "")
