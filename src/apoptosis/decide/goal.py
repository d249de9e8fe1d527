"""What size a user asks for: the goal of a run, as a share of what the network takes at full width.

Holds: reading `target=`, the shares that events aim at on the way, what can be reached at all. Elsewhere: which widths
reach it with the least loss (planner.allocation), when events come (policy).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from apoptosis.errors import ArgumentError
from apoptosis.planner import Cost, Costs
from apoptosis.records import Group, Structure, Timings

Measure = Literal["macs", "parameters", "seconds"]
MEASURES: dict[Measure, str] = {
    "macs": "multiply-adds of a forward pass",
    "parameters": "parameters",
    "seconds": "time of a training step",
}
Least = Callable[[Group], int]
_PINS_SHOWN = 3  # of those that stand in the way
NEAR = 0.05  # a goal counts as reached within this share of it
_FORMS = 'target= takes a speed-up ("2x") or a share of what there is, {"macs": 0.5} or "macs=0.5"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A size to reach: this share of what `measure` counts at full width."""

    measure: Measure
    share: float

    def reached(self, share: float) -> bool:
        """Whether a network that takes this share of what it took at full width is at the goal, or NEAR it."""
        return share <= self.share * (1.0 + NEAR)

    def towards(self, now: float, part: float) -> float:
        """Return the share that lies `part` of the way (0..1) from `now` to the goal, in equal ratios.

        Example:
            >>> Goal(measure="macs", share=0.25).towards(1.0, 0.5)
            0.5
        """
        if now <= self.share:
            return now
        return float(now * (self.share / now) ** part)

    def progress(self, share: float) -> str:
        """Say how far a network that takes this share of what it took at full width has come.

        Example:
            >>> Goal(measure="macs", share=0.5).progress(0.503)
            'target: 0.5 of the multiply-adds of a forward pass: reached (0.503)'
        """
        return f"target: {self}: {'reached' if self.reached(share) else 'not reached yet'} ({share:.3g})"

    def __str__(self) -> str:
        return f"{self.share:.3g} of the {MEASURES[self.measure]}"


def read_goal(target: Any, total_steps: int | None = 1) -> Goal | None:
    """Read `target=`: None, a speed-up such as "2x" or 2.5 times ("2.5x"), {measure: share} or "measure=share".

    Raises: ArgumentError: it is neither, or asks for no less than there is, or for nothing; or the length of the run,
    by a share of which a goal is reached, is not known.

    Example:
        >>> read_goal("2x"), read_goal({"parameters": 0.25})
        (Goal(measure='macs', share=0.5), Goal(measure='parameters', share=0.25))
    """
    if target is None:
        return None
    if total_steps is None:
        raise ArgumentError(
            "target= is reached by a share of the run: give total_steps=, its number of optimizer steps."
        )
    if isinstance(target, str) and "=" in target:
        name, _, number = target.partition("=")
        return read_goal({name.strip(): _number(number)}, total_steps)
    if isinstance(target, str):
        return Goal(measure="macs", share=1.0 / _factor(target))
    if not isinstance(target, Mapping) or len(target) != 1:
        raise ArgumentError(f"target={target!r}: {_FORMS}.")
    ((measure, share),) = target.items()
    if measure not in MEASURES:
        raise ArgumentError(f"target={target!r}: give one of {', '.join(MEASURES)}; {_FORMS}.")
    if isinstance(share, bool) or not isinstance(share, Real) or not 0.0 < float(share) < 1.0:
        raise ArgumentError(f"target={target!r}: the share must lie between 0 and 1, both excluded.")
    return Goal(measure=measure, share=float(share))


def is_goal(given: str) -> bool:
    """Whether a text has the form of a size to reach, sensible or not.

    Example:
        >>> is_goal("2x"), is_goal("macs=0.5"), is_goal("price")
        (True, True, False)
    """
    name, sign, _ = given.partition("=")
    return name.strip() in MEASURES if sign else not math.isnan(_number(given.strip().lower().removesuffix("x")))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _factor(text: str) -> float:
    number = text.strip().lower()
    factor = _number(number[:-1]) if number.endswith("x") else math.nan
    if not 1.0 < factor < 1e6:
        raise ArgumentError(f"target={text!r}: {_FORMS}; a speed-up is a number above 1, followed by x.")
    return factor


@dataclass(frozen=True, slots=True, kw_only=True)
class FullSize:
    """What a network took at full width: parameters, multiply-adds per example, and the table that tells seconds."""

    parameters: int
    macs: float
    timings: Timings | None = None


def share_of(goal: Goal, cost: Cost, full: FullSize, rows: int) -> float:
    """Return a cost as a share of what there was at full width.

    Args: rows: examples in the example input, which `cost` is of.
    """
    if goal.measure == "parameters":
        return cost.parameters / max(1, full.parameters)
    if goal.measure == "seconds":
        return cost.seconds / full.timings.step if full.timings is not None and full.timings.step > 0 else 1.0
    return cost.macs / rows / full.macs if full.macs > 0 else 1.0


def least_widths(min_width: float, groups: Sequence[Group], full_widths: Mapping[str, int]) -> dict[str, int]:
    """Return the channels that stay of every group at least, by name.

    Args: min_width: a number, or below 1 a share of the full width. full_widths: channels at construction.

    Example:
        >>> wide = Group(name="a", num_channels=10, members=(), sites=())
        >>> least_widths(0.25, [wide], {"a": 40}), least_widths(4, [wide], {})
        ({'a': 10}, {'a': 4})
    """
    if min_width <= 0:
        return {}
    full = {g.name: full_widths.get(g.name, g.num_channels) for g in groups}
    return {n: min(width, math.ceil(min_width * width if min_width < 1 else min_width)) for n, width in full.items()}


def check_goal(
    goal: Goal | None, structure: Structure, full: FullSize, rows: int, least: Least, empty: Iterable[str] = ()
) -> None:
    """Check that a goal can be reached with every open group at its least width.

    Args: full, rows: as in `share_of`. least: channels that stay of a group. empty: groups that may lose them all.

    Raises: ArgumentError: it cannot; what can, and the pins that hold most, are named.
    """
    if goal is None:
        return
    narrow = {group.name: least(group) for group in structure.open_groups} | dict.fromkeys(empty, 0)
    share = share_of(goal, Costs(structure, full.timings).of(narrow), full, rows)
    if share <= goal.share:
        return
    pinned = [(g.num_channels * g.macs_per_channel, g.pin) for g in structure.groups if g.pin is not None]
    most = sorted(pinned, key=lambda one: -one[0])[:_PINS_SHOWN]
    named = [f"{pin} ({100 * macs / structure.macs:.3g} % of the multiply-adds)" for macs, pin in most if macs > 0]
    raise ArgumentError(
        f"target= asks for {goal}, and {share:.3g} remain with every group that may shrink at its least width and "
        "without the branches that may go." + (f" What is pinned: {'; '.join(named)}" if named else "")
    )
