"""Apoptosis: the only conductor. One call per training step; shrinks model and optimizer in place when it pays.

Lives here: the order of the one-way path (observe -> moments -> policy -> planner -> certificates -> transaction ->
record) and what survives between steps. Does not live here: any formula.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from apoptosis.arguments import check_exclude, check_model, check_numbers, check_optimizers_given, check_others
from apoptosis.calibration import overhead_macs
from apoptosis.criteria import get_criterion
from apoptosis.errors import ApoptosisError, CheckpointError, NonFiniteError
from apoptosis.graph import analyse
from apoptosis.ledger import Event, Ledger
from apoptosis.numerics.decompose import roundoff_floor
from apoptosis.observe import NOTHING_SEEN, Observer
from apoptosis.operate import Patient, exclude_pins, make_event, num_parameters, operate, size_of, with_pins
from apoptosis.planner import Observations, Plan, make_plan
from apoptosis.policy import SITE_LIMIT_FACTOR, Decision, PastEvent, Telemetry, decide, pays, site_limit
from apoptosis.probe import ReadLogits, as_call, check_runs, has_classes, like_example, make_probe, num_rows
from apoptosis.records import Group, Pin, Structure
from apoptosis.state import VERSION, Memory, Settings, allowed, check_fits, read_memory, sum_up, telemetry
from apoptosis.surgery import check_followers, check_optimizers
from apoptosis.verdict import Verdict

Log = Callable[[dict[str, Any]], None]


class Apoptosis:
    """Removes redundant neurons while a network trains.

    Args:
        model: the network, changed in place at events; never wrapped.
        optimizer: one optimizer or a sequence of them.
        example_input: what one forward pass takes: a tensor, a tuple (positional) or a dict (keyword arguments).
        tolerance: cap per consumer site and event on the relative rms change of the consumer's output (a share; the
            errors of one site over all events add up to at most 8 times that). None: the library's own schedule.
            0: only what is redundant to round-off in float64.
        criterion: "interpolative", "constant", "pairwise", "duplicate", "magnitude" or "random".
        total_steps: optimizer steps of the whole run; without it every turn comes at twice the steps of the last.
        budget: what all removals together may cost in accuracy (a share, 0.002 = 0.2 points), measured on `probe`.
        probe: held-out inputs of the form of example_input, or (inputs, labels).
        align: widths are rounded up to a multiple of this.
        exclude: names or wildcards of groups to leave alone.
        log: called with one JSON-able dict per event, rolled back ones included.
        logits: reads (examples, classes) logits off the model's output, where the output is not just that tensor.
        seed: of the private random generator (positions of feature maps, criterion "random").

    Raises:
        ArgumentError, BudgetError, CaptureError, UnsupportedOptimizerError: before anything has changed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        example_input: Any,
        *,
        tolerance: float | None = None,
        criterion: str = "interpolative",
        total_steps: int | None = None,
        budget: float | None = None,
        probe: Any = None,
        align: int = 8,
        exclude: Iterable[str] = (),
        log: Log | None = None,
        logits: ReadLogits | None = None,
        seed: int = 0,
    ) -> None:
        start = time.perf_counter()
        check_model(model)
        optimizers = check_optimizers_given(optimizer, trains=model)
        check_numbers(tolerance=tolerance, align=align, total_steps=total_steps, budget=budget)
        check_others(criterion=criterion, seed=seed, log=log, logits=logits)
        patterns = check_exclude(exclude)
        chosen = get_criterion(criterion)
        check_optimizers(optimizers, model)
        self._patient = Patient(
            model=model, optimizers=optimizers, followers=(), call=as_call(example_input), read=logits
        )
        self._verdict = Verdict(budget, None if probe is None else make_probe(probe, example_input))
        self._log = log
        begin = time.perf_counter()
        structure = analyse(model, *self._patient.call)
        overhead = overhead_macs(time.perf_counter() - begin)
        self._structure = with_pins(structure, exclude_pins(structure, patterns))
        self._has_classes = has_classes(model, self._patient.call, logits)
        if self._verdict.probe is not None:
            check_runs(model, self._verdict.probe)
        self._verdict.check(readable=self._has_classes)
        self._memory = Memory(
            full=(num_parameters(model), structure.macs), full_shapes=dict(structure.shapes), overhead=overhead
        )
        widest = max((g.num_channels for g in structure.groups), default=1)
        self._settings = Settings(
            criterion=chosen,
            tolerance=tolerance,
            total_steps=total_steps,
            align=align,
            seed=seed,
            site_limit=site_limit(tolerance) or SITE_LIMIT_FACTOR * roundoff_floor(widest),
        )
        self._observer: Observer | None = None
        self._memory.decision = self._decide()
        self._memory.own_seconds += time.perf_counter() - start

    # ------------------------------------------------------------------ what a user asks

    def groups(self) -> tuple[Group, ...]:
        """Coupled channel groups that may shrink, in forward order."""
        return tuple(g for g in self._structure.groups if g.pin is None)

    def pins(self) -> tuple[Pin, ...]:
        """Channels that are never removed, each with its reason."""
        return tuple(g.pin for g in self._structure.groups if g.pin is not None)

    @property
    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter and buffer at full width, by name."""
        return dict(self._memory.full_shapes)

    @property
    def structure(self) -> Structure:
        """What the last capture found."""
        return self._structure

    @property
    def seconds(self) -> float:
        """Wall time spent in apoptosis so far: capture, hooks, planning, surgery, measuring."""
        return self._memory.own_seconds + self.hook_seconds

    @property
    def decision(self) -> Decision:
        """When the next window opens, or why none does."""
        return self._memory.decision

    @property
    def hook_seconds(self) -> float:
        """The part of `seconds` spent in hooks, inside the user's forward passes."""
        return self._memory.hook_seconds + (self._observer.hook_seconds if self._observer is not None else 0.0)

    def plan(self) -> Plan:
        """Say what an event would do now, from what the open window has seen so far: a dry run, changes nothing."""
        observations = {} if self._observer is None else self._observer.observations()
        return self._make_plan(observations)

    def ledger(self) -> Ledger:
        """Sum up what all removals so far cost at most, and with what confidence."""
        return sum_up(
            self._memory,
            self._verdict,
            parameters=num_parameters(self._patient.model),
            macs=self._structure.macs,
            has_classes=self._has_classes,
            site_limit=self._settings.site_limit,
            hook_seconds=self.hook_seconds,
        )

    def follow(self, averaged: nn.Module) -> None:
        """Shrink an averaged copy (AveragedModel, or a plain copy of the model) along with the model from now on.

        Raises: ArgumentError: the copy's tensors are not those of the model.
        """
        check_followers([averaged], self._patient.model)
        self._patient = replace(self._patient, followers=(*self._patient.followers, averaged))

    def close(self) -> None:
        """Take every hook off and never act again; step() becomes a no-op."""
        self._drop_window()
        self._memory.closed = True

    def state_dict(self) -> dict[str, Any]:
        """All that decides what happens next, a half-filled window included; plain values and tensors."""
        return {
            "version": VERSION,
            "widths": {g.name: g.num_channels for g in self._structure.groups},
            "pins": [asdict(pin) for pin in self.pins()],
            "memory": self._memory.as_dict(),
            "verdict": self._verdict.state_dict(),
            "window": None if self._observer is None else self._observer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` stopped. The model must have the widths it had then (apoptosis.load sees to that).

        Raises: CheckpointError: the state is of another network or other widths; nothing has changed then.
        """
        window = self._observer
        if window is not None:  # the capture below is no pass of the user's
            window.close()
        try:
            self._restore(state)
        except BaseException:
            if window is not None:
                window.open()
            raise

    def _restore(self, state: Mapping[str, Any]) -> None:
        structure = analyse(self._patient.model, *self._patient.call)
        widths = {g.name: g.num_channels for g in structure.groups}
        check_fits(state, widths)
        try:
            pins = {entry["group"]: Pin(**entry) for entry in state["pins"]}
            own = {pin.group: pin for pin in self.pins() if pin.group in widths}  # exclude= of this run
            structure = with_pins(with_pins(structure, pins), own)
            memory = read_memory(state["memory"])
            observer = None
            if state["window"] is not None:
                observer = self._new_observer(tuple(g for g in structure.groups if g.pin is None))
                observer.load_state_dict(state["window"])
            self._verdict.load_state_dict(state["verdict"])  # the last that can fail; it changes all or nothing
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, ApoptosisError) as error:
            raise CheckpointError(f"apoptosis state is damaged or of another network: {error!r}.") from error
        self._drop_window()
        self._structure, self._memory = structure, memory
        if observer is not None and not memory.closed:
            observer.open()
            self._observer = observer

    # ------------------------------------------------------------------ the loop

    def step(self) -> Event | None:
        """Call once after optimizer.step(). Returns an Event if shapes changed, else None."""
        if self._memory.closed:
            return None
        self._memory.step += 1
        observer, due = self._observer, self._memory.decision.at_step
        if observer is None and (due is None or self._memory.step < due):
            return None
        if observer is not None and not observer.end_step():
            if self._memory.step == self._settings.total_steps:  # the run is over
                self._drop_window()
            return None
        start = time.perf_counter()
        try:
            if observer is not None:
                return self._event(observer)
            self._open_window()
            return None
        finally:
            self._memory.own_seconds += time.perf_counter() - start

    def _open_window(self) -> None:
        self._observer = self._new_observer(self.groups())
        self._observer.open()
        self._memory.window_start = self._memory.step

    def _new_observer(self, groups: Sequence[Group]) -> Observer:
        return Observer(
            self._patient.model,
            groups,
            seed=self._settings.seed * 1_000_003 + len(self._memory.history),
            exact=self._settings.tolerance == 0,
            keep_inputs=not self._verdict.held_out,
        )

    def _drop_window(self) -> None:
        if self._observer is not None:
            self._observer.close()
            self._memory.hook_seconds += self._observer.hook_seconds
            self._observer = None

    def _event(self, observer: Observer) -> Event | None:
        start = time.perf_counter()
        self._drop_window()
        self._memory.batch_rows = observer.examples / max(1, self._memory.step - self._memory.window_start)
        event, macs = None, self._structure.macs
        refused = ""
        try:
            if observer.blind:
                raise NonFiniteError(NOTHING_SEEN)
            event, refused = self._attempt(observer, start)
        except NonFiniteError as error:  # nothing was tried: no reason for the policy to back off
            refused = str(error)
            warnings.warn(
                f"apoptosis skipped an event at step {self._memory.step}: {error}", RuntimeWarning, stacklevel=3
            )
        else:
            after, undone = self._structure.macs, bool(refused)
            past = PastEvent(step=self._memory.step, macs_before=macs, macs_after=after, rolled_back=undone)
            self._memory.history = (*self._memory.history, past)
        finally:
            self._memory.decision = self._decide()
        if self._log is not None and (refused or event is not None):
            told = {"step": self._memory.step} if event is None else event.as_dict()
            self._log({"kind": "event", "rolled_back": bool(refused), "reason": refused, **told})
        return event

    def _attempt(self, observer: Observer, start: float) -> tuple[Event | None, str]:
        """Return an event if a plan pays and passes, or why it was rolled back."""
        plan = self._make_plan(observer.observations())
        if plan.reductions and pays(self._telemetry(), plan.macs_after / self._example_rows()):
            return self._surgery(plan, observer, start)
        return None, ""

    def _surgery(self, plan: Plan, observer: Observer, start: float) -> tuple[Event | None, str]:
        """One transaction: an event, or why it was rolled back (then the tolerance is halved from now on)."""
        before = size_of(self._patient, self._structure)
        probe = self._verdict.begin(like_example(observer.inputs or self._patient.call, self._patient.call))
        outcome = operate(
            self._patient, self._structure, plan.reductions, plan.dropped_variance, probe, self._verdict.judge
        )
        self._structure = outcome.structure
        if not outcome.committed:
            self._memory.rolled_back += 1
            self._memory.halvings += outcome.change is not None
            return None, outcome.refused
        certificates = self._verdict.settle()
        self._memory.num_events += 1
        for reduction in outcome.done:
            for key, error in plan.errors[reduction.group].items():
                self._memory.site_cost[key] = self._memory.site_cost.get(key, 0.0) + error
        event = make_event(
            step=self._memory.step,
            plan=plan,
            outcome=outcome,
            before=before,
            after=size_of(self._patient, self._structure),
            certificates=certificates,
            measured_on="held-out examples" if self._verdict.held_out else "training inputs",
            seconds=time.perf_counter() - start,
        )
        return event, ""

    # ------------------------------------------------------------------ small things

    def _make_plan(self, observations: Observations) -> Plan:
        request = allowed(self._memory, self._settings, self.groups())
        return make_plan(self._patient.model, self._structure, observations, request)

    def _example_rows(self) -> int:
        return max(1, num_rows(self._patient.call))

    def _telemetry(self) -> Telemetry:
        return telemetry(self._memory, self._settings, self._structure, rows=self._example_rows())

    def _decide(self) -> Decision:
        if not self.groups():
            return Decision(at_step=None, tolerance=0.0, reason="every group is pinned")
        return decide(self._telemetry())
