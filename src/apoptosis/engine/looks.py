"""Looks at how activations spread, which say whether the features of a network still form.

Holds: when a look is taken and what the last two say. Elsewhere: the hooks and the measure (observe.spread), the limit
(decide.policy).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from apoptosis.decide.policy import first_look, still_forming
from apoptosis.decide.state import RunState, Settings, has_goal
from apoptosis.distributed.ranks import Ranks
from apoptosis.interrupts import uninterrupted
from apoptosis.model.passes import compile_seconds
from apoptosis.observe import Look, growth
from apoptosis.records import Structure

LEAST_DOUBLINGS = 0.4  # of the steps between two looks that are compared


class Looks:
    """Takes a look in the step after `first`, and in the first step of every window until there was an event.

    A look is over with the step; what it found is in the run's memory then. first: 0 where nothing hangs on looks.
    """

    def __init__(self, model: nn.Module, memory: RunState, settings: Settings) -> None:
        self._model, self._settings = model, settings
        self._look: Look | None = None
        self.first = first_of(memory, settings)

    def go_on(self, memory: RunState, structure: Structure) -> None:
        """Begin the look that was open where a resumed run was saved."""
        if memory.step and memory.step in (self.first, memory.window_start) and not memory.closed:
            self.take(memory, structure, again=True)

    def due(self, step: int) -> bool:
        """Whether a look ends or begins now."""
        return self._look is not None or step == self.first

    def take(self, memory: RunState, structure: Structure, *, again: bool) -> None:
        """End the look that is open; again: begin one for the next step. Compiled models would compile again for it."""
        if self._look is not None:
            memory.spreads[memory.step - 1] = self._look.close()
            memory.spreads = _last_two(memory.spreads)
            self._look = None
        if again and first_of(memory, self._settings) and not compile_seconds():
            with uninterrupted():
                self._look = Look(self._model, (site.module for group in structure.groups for site in group.sites))

    def pause(self) -> None:
        """Take the hooks of the look off that is open; what it has found is kept."""
        if self._look is not None:
            self._look.close()

    def open(self) -> None:
        """Put the hooks of the look on again."""
        if self._look is not None:
            self._look.open()

    def close(self) -> None:
        """Give the look up that is open."""
        self.pause()
        self._look = None


def first_of(memory: RunState, settings: Settings) -> int:
    """Return the step of the first look (policy.first_look), 0 where nothing hangs on looks."""
    wanted = settings.automatic and not has_goal(memory, settings) and not memory.num_events
    return first_look(settings.total_steps) if wanted else 0


def _last_two(spreads: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return the last look and the one before it; of looks too close to tell growth from chance, the earlier one."""
    steps = sorted(spreads)
    kept = steps[:1]
    for step in steps[1:]:
        if math.log2(step / kept[-1]) >= LEAST_DOUBLINGS:
            kept.append(step)
    return {step: spreads[step] for step in kept[-2:]}


def forming(memory: RunState, settings: Settings, ranks: Ranks) -> str:
    """Say why it is too early for any event, "" if it is not: by the last two looks, of all ranks together."""
    if not first_of(memory, settings):
        return ""
    own = {step: {k: float(v) for k, v in found.items()} for step, found in sorted(memory.spreads.items())[-2:]}
    every = ranks.gathered(own)
    looks = sorted(own)
    if len(looks) < 2 or any(sorted(one) != looks for one in every):  # a rank that compiled something takes none
        return ""
    seen = [set(found) for one in every for found in one.values()]
    whole = sorted(set.intersection(*seen))  # what all ranks saw in both
    before, after = ({key: sum(one[step][key] for one in every) for key in whole} for step in looks)
    return still_forming(growth(before, after, doublings=math.log2(looks[1] / looks[0])))
