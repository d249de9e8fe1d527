"""Going on where a saved run stopped: all of it is made before anything of the run at hand changes.

Holds: what a run goes on with, made of a saved state, and whether residual branches have to be tried for it. Elsewhere:
the state as plain values (decide.state), taking it over (engine), files (checkpoint).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from apoptosis.decide.acceptance import AcceptanceTest
from apoptosis.decide.state import (
    CORRUPT_STATE_ERRORS,
    UNDECIDED,
    RunState,
    Settings,
    check_fits,
    has_goal,
    read_state,
)
from apoptosis.distributed.protocol import Layout
from apoptosis.distributed.wrappers import layouts_of, read_layouts
from apoptosis.engine.beginning import limit_of_outputs
from apoptosis.engine.window import new_window, next_window
from apoptosis.errors import CheckpointError, RankError
from apoptosis.observe import Observer
from apoptosis.records import Structure
from apoptosis.surgery import check_averaged_models
from apoptosis.surgery.branch_trials import try_branches
from apoptosis.surgery.target import Target, with_known, without_branches

_FOLLOW_LATER = (
    "Load the run's checkpoint first, and then register averaged copies, or load their own files before (set_widths_ "
    "gives them the widths of that time)."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run goes on with. observer: of the window that is open, or is to be opened. layouts: of its wrappers."""

    structure: Structure
    memory: RunState
    acceptance: AcceptanceTest
    observer: Observer | None
    layouts: Sequence[Layout | None] = ()


def read_run(target: Target, now: Run, settings: Settings, state: Mapping[str, Any]) -> Run:
    """Make of a saved state what a run goes on with; nothing of the run at hand changes, and no hook is put on.

    Args: target: with the widths that it had then. now: the run at hand.

    Raises: CheckpointError: the state is of another network or other widths, or damaged. RankError: ranks load
        different ones.
    """
    ranks, captured = target.ranks, target.capture()
    structure = with_known(target, replace(now.structure, refused={}), captured)
    check_fits(state, {g.name: g.num_channels for g in structure.groups})
    check_averaged_models(target.averaged_models, target.model, _FOLLOW_LATER)
    try:
        own = tuple(g.pin for g in now.structure.groups if g.pin is not None)
        structure, memory, window = read_state(state, settings, structure, own)
        refused = {str(name): str(why) for name, why in state.get("refused", {}).items()}  # older ones have none
        structure = _with_branches(target, structure, now, settings, memory, refused)
        memory.timings = memory.timings or now.memory.timings
        layouts = read_layouts(target.wrappers, state.get("buckets", ()))  # older ones have none
        ranks.same("the checkpoint that they load", {"step": memory.step, "events": memory.num_events})
        ranks.same_parameters("in the checkpoint that they load", target.model)
        layouts, observer, acceptance = ranks.first(layouts), None, copy.copy(now.acceptance)
        if window is not None and ranks.size == 1:  # of several ranks every one saw other rows
            observer = new_window(target, settings, memory, structure, acceptance)
            observer.load_state_dict(window)
        acceptance.load_state_dict(state["verdict"])
    except (CheckpointError, RankError):  # say themselves what differs
        raise
    except CORRUPT_STATE_ERRORS as error:
        raise CheckpointError(f"apoptosis state is damaged or of another network: {error!r}.") from error
    acceptance.sanity = limit_of_outputs(target, memory, settings)
    if memory.decision == UNDECIDED:  # other settings: a longer run, say, has another schedule
        memory.decision = next_window(memory, settings, structure, target.num_examples)
    observer = None if memory.closed else observer
    return Run(structure=structure, memory=memory, acceptance=acceptance, observer=observer, layouts=layouts)


def _with_branches(
    target: Target, structure: Structure, now: Run, settings: Settings, memory: RunState, refused: Mapping[str, str]
) -> Structure:
    """Return the structure without the branches that cannot be emptied, in this run or the one that was saved.

    A network that was pretrained looks otherwise before its checkpoint is loaded: then its branches were not tried.

    Args: structure: as captured, with all branches. memory: of the saved run. refused: branches by name, in that run.
    """
    if not has_goal(memory, settings):
        return without_branches(structure, now.structure.refused)
    if has_goal(now.memory, settings):
        return without_branches(structure, {**now.structure.refused, **refused})
    layouts = layouts_of(target.wrappers)
    try:
        return try_branches(target, without_branches(structure, refused))
    finally:
        if target.wrappers:  # trials exchange the storage that they know
            target.rebuild_wrappers(layouts)
