"""What a run begins with: its memory, limits that follow from the network, and what all ranks have to agree on.

Holds: these. Elsewhere: checking single arguments (model.arguments), how ranks compare (distributed.ranks).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from apoptosis.criteria import get_criterion
from apoptosis.decide.acceptance import sanity_limit
from apoptosis.decide.goal import check_goal, read_goal
from apoptosis.decide.overhead import overhead_macs
from apoptosis.decide.policy import SITE_LIMIT_FACTOR, site_limit
from apoptosis.decide.state import FEWEST_STEPS, PRETRAINED_RMS, STEPS_NOT_EPOCHS, RunState, Settings, allowed, has_goal
from apoptosis.decide.timing import measure_timings
from apoptosis.distributed.protocol import kind_of
from apoptosis.distributed.sharded import has_shards
from apoptosis.engine.event_builder import num_parameters
from apoptosis.errors import ArgumentError
from apoptosis.model.arguments import check_limits, check_numbers
from apoptosis.model.built import built_shapes
from apoptosis.model.passes import device_of
from apoptosis.model.pretrained import looks_pretrained
from apoptosis.numerics.linalg import roundoff_floor
from apoptosis.planner import may_be_empty
from apoptosis.records import Group, Structure, Timings
from apoptosis.surgery.rehearsal import rehearse
from apoptosis.surgery.target import Target, exclude_pins, seconds_of_capture, warn_if_fixed, without_pins


def read_settings(
    criterion: str,
    seed: int,
    *,
    tolerance: float | None,
    align: int,
    total_steps: int | None,
    budget: float | None,
    target: Any,
    min_width: float,
    max_removed: float,
    calibrated: bool,
) -> tuple[Settings, float | None]:
    """Read the numbers that a user gave; arguments are those of Apoptosis.

    Returns: the settings, without the limit of sites, which the network decides; and the budget.

    Raises: ArgumentError: naming the argument, its value and its range.
    """
    tolerance, align, total_steps, budget = check_numbers(
        tolerance=tolerance, align=align, total_steps=total_steps, budget=budget
    )
    chosen = get_criterion(criterion)
    settings = Settings(
        criterion=chosen,
        tolerance=chosen.tolerance if tolerance is None else tolerance,
        total_steps=total_steps,
        align=align,
        seed=seed,
        automatic=tolerance is None and target is None,
        calibrated=calibrated,
        goal=read_goal(target, total_steps),
        **check_limits(min_width=min_width, max_removed=max_removed),
    )
    return settings, budget


def rehearsed(
    target: Target, structure: Structure, settings: Settings, patterns: Sequence[str], pretrained: bool | None
) -> Structure:
    """Return the structure as trials of the model leave it; a warning says so where nothing may shrink.

    Args: structure: as captured. patterns: of groups to leave alone. pretrained: as given.
    """
    left_out = exclude_pins(structure, patterns)
    early = _is_pretrained(target, pretrained) and settings.automatic and settings.total_steps is not None
    found = rehearse(target, structure, left_out, settings.align, branches=settings.goal is not None or early)
    warn_if_fixed(without_pins(found, structure, left_out), type(target.model).__name__)
    return found


def _is_pretrained(target: Target, given: bool | None) -> bool:
    """Return what was given, else whether the network looks so on rank 0.

    Raises: ArgumentError: what was given is no truth value.
    """
    if given is not None and not isinstance(given, bool):
        raise ArgumentError(f"pretrained={given!r} must be True, False or None.")
    return target.ranks.first(looks_pretrained(target.model) if given is None else given)


def new_memory(
    target: Target,
    structure: Structure,
    settings: Settings,
    calibration: float | None,
    pretrained: bool | None,
    timings: Any,
) -> RunState:
    """Return the state of a run that begins.

    Args: structure: at full width. calibration: fixed cost of an event in MACs; None: what captures took so far tells
        it. pretrained: None to look. timings: of an earlier run, or None.

    Raises: ArgumentError: timings= is no table of timings.
    """
    model, device = target.model, device_of(target.model)
    seconds = seconds_of_capture(target, wanted=calibration is None)  # ranks vote, whatever was given to one of them
    overhead = overhead_macs(seconds, device=device) if calibration is None else calibration
    return RunState(
        full=(num_parameters(model), structure.macs / target.num_examples),
        full_shapes=built_shapes(model, structure.shapes),
        full_widths={g.name: g.num_channels for g in structure.groups},
        overhead=target.ranks.first(overhead),
        timings=_timed(target, structure, settings, timings),
        pretrained=_is_pretrained(target, pretrained),
    )


def _timed(target: Target, structure: Structure, settings: Settings, given: Any) -> Timings | None:
    """Return the table of what a training step takes, where the goal is in seconds: the one given, or measured now.

    Raises: ArgumentError: what was given is no such table, or one for another number of examples.
    """
    if given is not None and not isinstance(given, Timings):
        raise ArgumentError(f"timings={given!r}: give `apo.timings` of an earlier run.")
    if given is not None and given.rows != target.num_examples:
        rows = f"{given.rows:,} examples, the example input has {target.num_examples:,}"
        raise ArgumentError(f"timings= are of {rows}: give an example input of as many, or the timings of this one.")
    if settings.goal is None or settings.goal.measure != "seconds":
        return None
    if given is None:
        given = measure_timings(target.model, target.call, structure, target.optimizers)
    return Timings.from_dict(target.ranks.first(given.as_dict()))


def limit_of_sites(tolerance: float, structure: Structure) -> float:
    """Return what the errors of one site may add up to: at tolerance 0 some round-offs of the widest group."""
    widest = max((group.num_channels for group in structure.groups), default=1)
    return site_limit(tolerance) or SITE_LIMIT_FACTOR * roundoff_floor(widest)


def limit_of_outputs(target: Target, memory: RunState, settings: Settings) -> float:
    """Return the relative rms change of the outputs beyond which an event is rolled back, without a budget."""
    if settings.goal is None and has_goal(memory, settings):
        return PRETRAINED_RMS
    return sanity_limit(target.model, settings.tolerance, settings.goal)


def check_agreed(
    target: Target, settings: Settings, structure: Structure, *, budget: float | None, probe: bool
) -> None:
    """Check that all ranks were asked for the same of the same network.

    Args: budget: as given. probe: whether there are held-out examples.

    Raises: RankError: they were not; what differs is named. UnsupportedOptimizerError: an optimizer steps over others.
    """
    for optimizer in target.optimizers:
        kind_of(optimizer).check_ranks(optimizer, target.ranks.size)
    asked = settings.as_dict() | {"seed": settings.seed, "budget": budget, "probe": probe}
    asked |= {
        "whether calibration= is given": settings.calibrated,
        "whether a tolerance or target= is given": settings.automatic,
    }
    asked |= {"example input, multiply-adds": structure.macs, "example input, rows": target.num_examples}
    widths = {f"group {g.name}": (g.num_channels, g.pin is None, *(site.key for site in g.sites))
              for g in structure.groups}  # fmt: skip
    target.ranks.same("arguments or groups of Apoptosis", asked | widths)


def check_reachable(
    target: Target, structure: Structure, memory: RunState, settings: Settings, groups: Sequence[Group]
) -> None:
    """Check that the goal can be reached. groups: that are open.

    Raises: ArgumentError: it cannot; with what would remain, and what holds most.
    """
    request = replace(allowed(memory, settings, groups), max_drop=1.0)
    least = partial(request.fewest, step=settings.align)
    whole = request.empty and not has_shards(target.model)
    empty = may_be_empty(structure, request.least) if whole else ()
    check_goal(settings.goal, structure, memory.full_size, target.num_examples, least, empty)


def warn_if_few(total_steps: int | None) -> None:
    """Warn of a run of so few steps that epochs must have been given."""
    if total_steps is not None and total_steps < FEWEST_STEPS:
        what = f"apoptosis: total_steps={total_steps} is too short for an event. {STEPS_NOT_EPOCHS}"
        warnings.warn(what, RuntimeWarning, stacklevel=3)


def warn_at_end(step: int) -> None:
    """Warn of the first step beyond those that the run was to have."""
    what = f"apoptosis: step {step:,} is beyond total_steps={step - 1:,}: no further event comes. {STEPS_NOT_EPOCHS}"
    warnings.warn(what, RuntimeWarning, stacklevel=3)
