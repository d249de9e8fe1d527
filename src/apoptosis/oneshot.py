"""shrink_: one pruning step on a trained network.

Holds: observing on the given batches, then one step at the largest tolerance within the limit. Elsewhere: a schedule.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from apoptosis.criteria import Ranking, get_criterion
from apoptosis.decide.acceptance import AcceptanceResult, AcceptanceTest, sanity_limit
from apoptosis.decide.goal import FullSize, Goal, check_goal, least_widths, read_goal, share_of
from apoptosis.decide.ledger import Event
from apoptosis.decide.timing import measure_timings
from apoptosis.distributed.wrappers import check_alone
from apoptosis.engine.applying import Check, Outcome, apply_reductions
from apoptosis.engine.event_builder import Size, make_event, size_of
from apoptosis.engine.sensitivity import Way, towards
from apoptosis.errors import ArgumentError
from apoptosis.graph.explain import Code
from apoptosis.model.arguments import (
    check_exclude,
    check_limits,
    check_model,
    check_numbers,
    check_optimizers_given,
    check_others,
)
from apoptosis.model.evaluate import Probe, as_call, as_probe, make_probe
from apoptosis.model.outputs import Change
from apoptosis.model.trials import looked_at
from apoptosis.observe import Observer
from apoptosis.planner import Costs, Observations, Plan, Request, groups_to_observe, make_plan, may_be_empty
from apoptosis.planner.sampling import has_modes, sample
from apoptosis.records import Frozen, NormWidths, Pin, Reduction, Structure
from apoptosis.surgery import check_optimizers
from apoptosis.surgery.rehearsal import rehearse
from apoptosis.surgery.target import Target, exclude_pins, new_pins, with_pins

_TRIES = 6  # surgeries beyond the sanity limit before it is given up
_OCTAVES = 12  # halvings of the tolerance in search of one within the limit
_STEPS = 32  # of the grid of tolerances between one power of two and the next

Result = tuple[Plan, Outcome]


def shrink_(
    model: nn.Module,
    example_input: Any,
    batches: Iterable[Any],
    *,
    tolerance: float | None = None,
    criterion: str = "interpolative",
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    probe: Any = None,
    align: int = 1,
    exclude: Iterable[str] = (),
    norm_widths: NormWidths = "pinned",
    frozen: Frozen = "keep",
    seed: int = 0,
    target: Any = None,
    min_width: float = 0.0,
) -> Event:
    """Remove redundant channels from a trained network, once, in place.

    Args:
        model: the network; batches are run through it in evaluation mode, which leaves no trace.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments.
        batches: each of the form of example_input; read until every site has seen enough. One suffices, but a width
            is only trusted when there were three rows for every channel kept.
        tolerance: cap per consumer site on the relative rms change of its output, 0 for what is redundant to
            round-off. This or target= is needed.
        criterion: as in Apoptosis.
        optimizer: one or several whose state follows; None if the network is not trained any more. With one, what goes
            at tolerance 0 under batch normalisation is redundant in training mode, too.
        probe: held-out inputs, or (inputs, labels). None: the change is measured on the largest batch.
        align: widths are rounded up to a multiple of this.
        exclude: names or wildcards of groups to leave alone.
        norm_widths: as in Apoptosis.
        frozen: as in Apoptosis.
        seed: of the private random generator.
        target: as in Apoptosis, in place of a tolerance: the size to reach with the least change of the outputs that
            trials on the given batches predict; it is never exceeded.
        min_width: as in Apoptosis.

    Returns: the Event; falsy when nothing could go, with the reasons in its notes.

    Raises: ArgumentError, CaptureError, UnsupportedOptimizerError, NonFiniteError: model and optimizer are untouched.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> _ = net[0].weight.data[4:].copy_(net[0].weight.data[:4]), net[0].bias.data[4:].copy_(net[0].bias.data[:4])
        >>> event = shrink_(net, torch.zeros(2, 4), [torch.randn(512, 4)], tolerance=1e-3)
        >>> event.groups
        {'0': (8, 4)}
    """
    start = time.perf_counter()
    model, wrappers = check_alone(check_model(model))
    optimizers = check_optimizers_given(optimizer, trains=model if optimizer is not None else None)
    given, align, _, _ = check_numbers(tolerance=tolerance, align=align)
    options: dict[str, Any] = {"norm_widths": norm_widths, "frozen": frozen}
    seed, _ = check_others(criterion, seed, **options)
    _check_batches(batches)
    goal, bounds = read_goal(target), check_limits(min_width=min_width, max_removed=1.0)
    if (given is None) == (goal is None):
        raise ArgumentError("shrink_ has no schedule: give tolerance=, a number, or target=, a size; one of the two.")
    chosen = get_criterion(criterion)
    check_optimizers(optimizers, model)
    target = Target(model=model, optimizers=optimizers, call=as_call(example_input), wrappers=wrappers, **options)
    held_out = None if probe is None else make_probe(probe, example_input)
    captured = target.capture()
    held_out = looked_at(model, held_out, target.call, None, remedy="Give a probe= on whose inputs it returns some.")
    acceptance = AcceptanceTest(None, held_out, sanity=sanity_limit(model, given, goal))
    structure = rehearse(target, captured, left_out := exclude_pins(captured, check_exclude(exclude)), align)
    given = chosen.tolerance if given is None else given
    modes = 2 if given == 0 and optimizers and has_modes(model) else 1
    calls = (_call_of(batch, example_input) for batch in batches)
    groups = structure.open_groups if goal is None else groups_to_observe(structure)
    observer, observations = sample(model, groups, calls, tolerance=given, modes=modes, seed=seed)
    request = Request(criterion=chosen, tolerance=given, align=align, max_drop=1.0, seed=seed)
    request = replace(request, least=least_widths(bounds["min_width"], structure.groups, {}), empty=goal is not None)
    job = _Job(target, structure, request, observer, observations, acceptance)
    before = size_of(target, structure)
    plan, outcome = job.carry_out(goal, before)
    notes = [*(str(pin) for pin in new_pins(with_pins(captured, left_out), structure)), *job.notes]
    notes += plan.notes if outcome.committed else [outcome.refused, *plan.notes, *_pinned(job.structure, notes)]
    return make_event(
        step=0,
        plan=plan,
        outcome=outcome,
        before=before,
        after=size_of(target, outcome.structure),
        measured_on="held-out examples" if acceptance.held_out else "of the given inputs",
        seconds=time.perf_counter() - start,
        notes=tuple(notes),
    )


def _pinned(structure: Structure, said: Sequence[str]) -> list[str]:
    return [text for g in structure.groups if g.pin is not None and (text := str(g.pin)) not in said]


def _check_batches(batches: object) -> None:
    if not isinstance(batches, Iterable) or isinstance(batches, Tensor | Mapping | str):
        raise ArgumentError(f"batches is a {type(batches).__name__}: give a sequence or loader of batches, [batch].")


class _Job:
    """One shrink_, tried at as many tolerances as it takes; notes: what was rolled back, and why."""

    def __init__(
        self,
        target: Target,
        structure: Structure,
        request: Request,
        observer: Observer,
        observations: Observations,
        acceptance: AcceptanceTest,
    ) -> None:
        self._target, self._request, self._acceptance, self.structure = target, request, acceptance, structure
        self._observer, self._observations = observer, observations
        self._rankings: dict[str, Ranking] = {}  # the same at every tolerance
        self._changes: dict[float, float] = {}  # of the outputs, by tolerance
        self.notes: list[str] = []

    def carry_out(self, goal: Goal | None, size: Size) -> Result:
        """Do what was asked for: reach a goal, or remove what the tolerance allows. size: of the network now."""
        if goal is None:
            return self.exactly() if self._request.tolerance == 0 else self.within_limit()
        target, timings = self._target, None
        if goal.measure == "seconds":
            timings = measure_timings(target.model, target.call, self.structure, target.optimizers)
        full = FullSize(parameters=size.parameters, macs=size.macs, timings=timings)
        least = partial(self._request.fewest, step=self._request.align)
        empty = may_be_empty(self.structure, self._request.least) if self._request.empty else ()
        check_goal(goal, self.structure, full, target.num_examples, least, empty)
        return self.to_goal(goal, full)

    def exactly(self) -> Result:
        """Remove what is redundant; groups whose removal still changes the outputs are left out one by one."""
        for _ in range(1 + len(self.structure.groups)):
            result, refused = self._try(0.0)
            if not refused:
                break
            self.structure = with_pins(self.structure, self._pins_of_failing(result[0]))
        return result

    def within_limit(self) -> Result:
        """Remove as much as the tolerance, or else the largest one whose change of the outputs is within the limit.

        Tolerances below the given one are powers of two and, from the first that is within, the steps of a grid up to
        the one before: the same for every given tolerance, so that a larger one never removes less.
        """
        given, sanity = self._request.tolerance, self._acceptance.sanity
        limit = sanity
        result, refused = self._try(given)
        for _ in range(_TRIES):
            tested = result[1].result
            if not refused or tested is None:
                break
            tolerance = self._largest_below(given, limit)
            measured = self._measured(tolerance)
            result, refused = self._try(tolerance)
            # held-out examples may change more than the given inputs do
            limit = min(0.999 * measured, limit * sanity / max(tested.change.rms, sanity))
        return result

    def to_goal(self, goal: Goal, full: FullSize) -> Result:
        """Reach a goal with the least change of the outputs."""
        inputs, request = self._observer.inputs or self._target.call, self._request
        way, seen, rows = Way(goal=goal, full=full), self._observations, self._target.num_examples
        for _ in range(_TRIES):  # groups that cannot be edited as chosen are pinned, and the others take their part
            way = replace(way, known={})
            self._request, _ = towards(way, self._target, self.structure, seen, request, self._rankings, inputs)
            plan = self._plan(request.tolerance)
            tried = self._apply(plan, plan.reductions, self._given_inputs(), _measure_only) if plan.reductions else None
            if tried is None or not tried.pins:
                break
            self.structure = tried.structure
        result = self._try(request.tolerance)[0]
        left = Costs(self.structure, full.timings).of({})
        self.notes.append(goal.progress(share_of(goal, left, full, rows)))
        return result

    def _largest_below(self, given: float, limit: float) -> float:
        """Return the largest tolerance of the grid that changes the outputs on the given inputs within a limit."""
        top = math.ceil(math.log2(given)) - 1  # the next power of two
        for octave in range(top, top - _OCTAVES, -1):
            if self._measured(2.0**octave) > limit:
                continue
            low, high = octave * _STEPS, (octave + 1) * _STEPS
            while high - low > 1:
                middle = (low + high) // 2
                tried = 2.0 ** (middle / _STEPS)
                within = tried < given and self._measured(tried) <= limit
                low, high = (middle, high) if within else (low, middle)
            return float(2.0 ** (low / _STEPS))
        return float(2.0 ** (top - _OCTAVES))

    def _plan(self, tolerance: float) -> Plan:
        request = replace(self._request, tolerance=tolerance)
        return make_plan(self._target.model, self.structure, self._observations, request, rankings=self._rankings)

    def _try(self, tolerance: float) -> tuple[Result, bool]:
        """Carry out what one tolerance allows; and whether that was rolled back because the outputs changed."""
        plan, acceptance = self._plan(tolerance), self._acceptance
        examples = acceptance.examples(self._observer.inputs)
        outcome = self._apply(plan, plan.reductions, examples.probe, partial(acceptance.check, examples))
        self.structure = outcome.structure
        if outcome.committed and outcome.result is not None:
            acceptance.record(outcome.result)
        refused = bool(plan.reductions) and not outcome.committed and outcome.result is not None
        if refused:
            self.notes.append(f"rolled back at tolerance {tolerance:.3g}: {outcome.refused}")
        return (plan, outcome), refused

    def _apply(self, plan: Plan, reductions: Sequence[Reduction], probe: Probe | None, check: Check) -> Outcome:
        return apply_reductions(self._target, self.structure, reductions, plan.dropped_variance, probe, check)

    def _measured(self, tolerance: float) -> float:
        """Return the relative rms change of the outputs on the given inputs, which is undone again."""
        if tolerance not in self._changes:
            plan, probe, result = self._plan(tolerance), self._given_inputs(), None
            if plan.reductions and probe is not None:
                outcome = self._apply(plan, plan.reductions, probe, _measure_only)
                self.structure, result = outcome.structure, outcome.result
            self._changes[tolerance] = 0.0 if result is None else result.change.rms
        return self._changes[tolerance]

    def _given_inputs(self) -> Probe | None:
        """Return the largest given batch to measure on, so that no confidence of held-out examples is spent."""
        inputs = self._observer.inputs
        return self._acceptance.probe if inputs is None else as_probe(inputs)

    def _pins_of_failing(self, plan: Plan) -> dict[str, Pin]:
        """Return pins for the groups that change the outputs too much, each tried by itself and rolled back.

        All that are beyond the limit alone; where none is, the one that changes most, and the first if none runs alone.
        Measured on the given inputs, so that no confidence of held-out ones is spent.
        """
        probe, found = self._given_inputs(), {plan.reductions[0].group: 0.0}
        for reduction in plan.reductions:
            result = self._apply(plan, [reduction], probe, _measure_only).result
            if result is not None:
                found[reduction.group] = result.change.rms
        failing = [name for name, rms in found.items() if not rms <= self._acceptance.sanity]
        failing = failing or sorted(found, key=found.__getitem__)[-1:]
        widths = {group.name: group.num_channels for group in self.structure.groups}
        return {name: Code.CHANGES_OUTPUTS(rms=found[name]).pin(name, widths[name]) for name in failing}


def _measure_only(change: Change) -> AcceptanceResult:
    return AcceptanceResult(change=change, refused="measured only")


def _call_of(batch: Any, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor) and not isinstance(batch, Tensor):
        remedy = ""
        if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
            names = ("x", "y", *(f"z{i}" for i in range(2, len(batch))))[: len(batch)]
            given = ", ".join(names) + ("," if len(names) == 1 else "")
            remedy = f" For a loader of ({given}) give (x for {given} in loader)."
        raise ArgumentError(f"batches: example_input is a tensor, but a batch is a {type(batch).__name__}.{remedy}")
    if isinstance(example, tuple) and (not isinstance(batch, tuple | list) or len(batch) != len(example)):
        raise ArgumentError(
            f"batches: example_input is a tuple of {len(example)} arguments, but a batch is a {type(batch).__name__}"
            f"{f' of {len(batch)}' if isinstance(batch, tuple | list) else ''}. Give tuples of the model's arguments, "
            "without labels."
        )
    if isinstance(example, Mapping) and not isinstance(batch, Mapping):
        raise ArgumentError(f"batches: example_input is a dict, but a batch is a {type(batch).__name__}.")
    return as_call(tuple(batch) if isinstance(batch, list) else batch, "batches")
