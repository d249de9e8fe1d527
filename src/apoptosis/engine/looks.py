"""Looks at how activations spread, which say whether the features of a network still form.

Holds: when a look is taken and what the last two say. Elsewhere: the hooks and the measure (observe.spread), the limit
(decide.policy).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from apoptosis.decide.policy import first_look, still_forming
from apoptosis.decide.state import RunState, Settings, has_goal
from apoptosis.distributed.ranks import Ranks
from apoptosis.model.passes import compile_seconds
from apoptosis.observe import Look, growth
from apoptosis.records import Structure


class Looks:
    """Takes a look in the step after `first`, and in the first step of every window until there was an event.

    A look is over with the step; what it found is in the run's memory then. first: 0 where nothing hangs on looks.
    """

    def __init__(self, model: nn.Module, memory: RunState, settings: Settings, structure: Structure) -> None:
        self._model, self._settings = model, settings
        self._look: Look | None = None
        self.first = first_of(memory, settings)
        if memory.step and memory.step in (self.first, memory.window_start) and not memory.closed:  # a run is resumed
            self.take(memory, structure, again=True)

    def due(self, step: int) -> bool:
        """Whether a look ends or begins now."""
        return self._look is not None or step == self.first

    def take(self, memory: RunState, structure: Structure, *, again: bool) -> None:
        """End the look that is open; again: begin one for the next step. Compiled models would compile again for it."""
        if self._look is not None:
            memory.spreads[memory.step - 1] = self._look.close()
            memory.spreads = {step: memory.spreads[step] for step in sorted(memory.spreads)[-2:]}
            self._look = None
        if again and first_of(memory, self._settings) and not compile_seconds():
            self._look = Look(self._model, (site.module for group in structure.groups for site in group.sites))

    def close(self) -> None:
        """Give the look up that is open."""
        if self._look is not None:
            self._look.close()
            self._look = None


def first_of(memory: RunState, settings: Settings) -> int:
    """Return the step of the first look (policy.first_look), 0 where nothing hangs on looks."""
    wanted = settings.automatic and not has_goal(memory, settings) and not memory.num_events
    return first_look(settings.total_steps) if wanted else 0


def forming(memory: RunState, settings: Settings, structure: Structure, ranks: Ranks) -> str:
    """Say why it is too early for any event, "" if it is not: by the last two looks, of all ranks together."""
    looks = sorted(memory.spreads)[-2:]
    if not first_of(memory, settings) or len(looks) < 2:
        return ""
    names = sorted({site.module for group in structure.groups for site in group.sites})
    own = [float(memory.spreads[step].get(name, 0.0)) for step in looks for name in names]
    found = ranks.total(torch.tensor(own, dtype=torch.float64, device="cpu")).tolist()
    before, after = (
        dict(zip(names, found[: len(names)], strict=True)),
        dict(zip(names, found[len(names) :], strict=True)),
    )
    return still_forming(growth(before, after, doublings=math.log2(looks[1] / looks[0])))
