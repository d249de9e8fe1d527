"""Apoptosis: the only conductor. One call per training step; shrinks model and optimizer in place when it pays.

Lives here: the order of the one-way path (observe -> moments -> policy -> planner -> certificates -> transaction ->
record) and what survives between steps. Does not live here: any formula.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from apoptosis.arguments import check_exclude, check_model, check_numbers, check_optimizers_given, check_others
from apoptosis.budget import ALPHA
from apoptosis.calibration import overhead_macs
from apoptosis.criteria import get_criterion
from apoptosis.errors import NonFiniteError
from apoptosis.graph import analyse
from apoptosis.ledger import Event, Ledger
from apoptosis.numerics.decompose import roundoff_floor
from apoptosis.observe import NOTHING_SEEN, ROWS_PER_CHANNEL, Observer
from apoptosis.operate import Patient, exclude_pins, make_event, num_parameters, operate, size_of, with_pins
from apoptosis.planner import Plan, Request, make_plan
from apoptosis.policy import SITE_LIMIT_FACTOR, Decision, PastEvent, Telemetry, allot, decide, pays, site_limit
from apoptosis.probe import ReadLogits, as_call, check_runs, has_classes, like_example, make_probe, num_rows
from apoptosis.records import Group, Pin, Structure
from apoptosis.state import dump_state, restore_state
from apoptosis.surgery import check_followers, check_optimizers
from apoptosis.verdict import Verdict

MAX_DROP = 0.9  # an event leaves at least a tenth of every group

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
        self._criterion = get_criterion(criterion)
        check_optimizers(optimizers, model)
        self._patient = Patient(
            model=model, optimizers=optimizers, followers=(), call=as_call(example_input), read=logits
        )
        self._verdict = Verdict(budget, None if probe is None else make_probe(probe, example_input))
        self._tolerance, self._total_steps, self._align = tolerance, total_steps, align
        self._log, self._seed = log, seed
        begin = time.perf_counter()
        structure = analyse(model, *self._patient.call)
        self._overhead = overhead_macs(time.perf_counter() - begin)
        self._structure = with_pins(structure, exclude_pins(structure, patterns))
        self._has_classes = has_classes(model, self._patient.call, logits)
        if self._verdict.probe is not None:
            check_runs(model, self._verdict.probe)
        self._verdict.check(readable=self._has_classes)
        self._full = (num_parameters(model), structure.macs)
        self.full_shapes = dict(structure.shapes)
        self._step, self._halvings, self._rolled_back, self._num_events = 0, 0, 0, 0
        self._history: tuple[PastEvent, ...] = ()
        self._site_cost: dict[str, float] = {}
        widest = max((g.num_channels for g in structure.groups), default=1)
        self._site_limit = site_limit(tolerance) or SITE_LIMIT_FACTOR * roundoff_floor(widest)
        self._batch_rows = 0.0
        self._observer: Observer | None = None
        self._window_start = 0
        self._closed, self._hook_seconds, self._own_seconds = False, 0.0, 0.0
        self._decision = self._decide()
        self._own_seconds += time.perf_counter() - start

    # ------------------------------------------------------------------ what a user asks

    def groups(self) -> tuple[Group, ...]:
        """Coupled channel groups that may shrink, in forward order."""
        return tuple(g for g in self._structure.groups if g.pin is None)

    def pins(self) -> tuple[Pin, ...]:
        """Channels that are never removed, each with its reason."""
        return tuple(g.pin for g in self._structure.groups if g.pin is not None)

    @property
    def structure(self) -> Structure:
        """What the last capture found."""
        return self._structure

    @property
    def seconds(self) -> float:
        """Wall time spent in apoptosis so far: capture, hooks, planning, surgery, measuring."""
        return self._own_seconds + self.hook_seconds

    @property
    def decision(self) -> Decision:
        """When the next window opens, or why none does."""
        return self._decision

    @property
    def hook_seconds(self) -> float:
        """The part of `seconds` spent in hooks, inside the user's forward passes."""
        return self._hook_seconds + (self._observer.hook_seconds if self._observer is not None else 0.0)

    def plan(self) -> Plan:
        """Say what an event would do now, from what the open window has seen so far: a dry run, changes nothing."""
        observations = {} if self._observer is None else self._observer.observations()
        return make_plan(self._patient.model, self._structure, observations, self._request(self._decision.tolerance))

    def ledger(self) -> Ledger:
        """Sum up what all removals so far cost at most, and with what confidence."""
        account, held_out = self._verdict.account, self._verdict.held_out
        cost = account.spent if held_out else self._verdict.training_flips
        return Ledger(
            events=self._num_events,
            attempts=len(self._history),
            rolled_back=self._rolled_back,
            parameters=(self._full[0], num_parameters(self._patient.model)),
            macs=(self._full[1], self._structure.macs),
            accuracy_cost=cost if self._has_classes else None,
            confidence=1.0 - ALPHA if held_out else 1.0,
            population=held_out,
            probe_rows=account.rows,
            budget=account.budget,
            site_cost=dict(self._site_cost),
            site_limit=self._site_limit,
            seconds=self.seconds,
            hook_seconds=self.hook_seconds,
            notes=("some probe rows served more than one attempt",) if account.reused else (),
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
        self._closed = True

    def state_dict(self) -> dict[str, Any]:
        """All that decides what happens next, a half-filled window included; plain values and tensors."""
        return dump_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` stopped. The model must have the widths it had then (apoptosis.load sees to that).

        Raises: CheckpointError: the state is of another network or other widths; nothing has changed then.
        """
        restore_state(self, state)

    # ------------------------------------------------------------------ the loop

    def step(self) -> Event | None:
        """Call once after optimizer.step(). Returns an Event if shapes changed, else None."""
        if self._closed:
            return None
        self._step += 1
        observer = self._observer
        if observer is None:
            due = self._decision.at_step
            if due is None or self._step < due:
                return None
        elif not observer.end_step():
            return None
        start = time.perf_counter()
        try:
            if observer is not None:
                return self._event(observer)
            self._open_window()
            return None
        finally:
            self._own_seconds += time.perf_counter() - start

    def _open_window(self) -> None:
        self._observer = self._new_observer(self.groups())
        self._observer.open()
        self._window_start = self._step

    def _new_observer(self, groups: Sequence[Group]) -> Observer:
        return Observer(
            self._patient.model,
            groups,
            seed=self._seed * 1_000_003 + len(self._history),
            exact=self._tolerance == 0,
            keep_inputs=not self._verdict.held_out,
        )

    def _drop_window(self) -> None:
        if self._observer is not None:
            self._observer.close()
            self._hook_seconds += self._observer.hook_seconds
            self._observer = None

    def _event(self, observer: Observer) -> Event | None:
        start = time.perf_counter()
        self._drop_window()
        self._batch_rows = observer.examples / max(1, self._step - self._window_start)
        event, macs = None, self._structure.macs
        refused = ""
        try:
            if observer.blind:
                raise NonFiniteError(NOTHING_SEEN)
            event, refused = self._attempt(observer, start)
        except NonFiniteError as error:  # nothing was tried: no reason for the policy to back off
            refused = str(error)
            warnings.warn(f"apoptosis skipped an event at step {self._step}: {error}", RuntimeWarning, stacklevel=3)
        else:
            after, undone = self._structure.macs, bool(refused)
            past = PastEvent(step=self._step, macs_before=macs, macs_after=after, rolled_back=undone)
            self._history = (*self._history, past)
        finally:
            self._decision = self._decide()
        if refused:
            self._emit({"kind": "event", "rolled_back": True, "reason": refused, "step": self._step})
        elif event is not None:
            self._emit({"kind": "event", "rolled_back": False, "reason": "", **event.as_dict()})
        return event

    def _attempt(self, observer: Observer, start: float) -> tuple[Event | None, str]:
        """Return an event if a plan pays and passes, or why it was rolled back."""
        request = self._request(self._decision.tolerance)
        plan = make_plan(self._patient.model, self._structure, observer.observations(), request)
        if plan.reductions and pays(self._telemetry(), plan.macs_after / self._example_rows()):
            return self._surgery(plan, observer, start)
        return None, ""

    def _surgery(self, plan: Plan, observer: Observer, start: float) -> tuple[Event | None, str]:
        """One transaction: an event, or why it was rolled back (then the tolerance is halved from now on)."""
        before = size_of(self._patient, self._structure)
        call = self._patient.call
        probe = self._verdict.begin(like_example(observer.inputs or call, call))
        outcome = operate(
            self._patient, self._structure, plan.reductions, plan.dropped_variance, probe, self._verdict.judge
        )
        self._structure = outcome.structure
        if not outcome.committed:
            self._rolled_back += 1
            self._halvings += outcome.change is not None
            return None, outcome.refused
        certificates = self._verdict.settle()
        self._num_events += 1
        for reduction in outcome.done:
            for key, error in plan.errors[reduction.group].items():
                self._site_cost[key] = self._site_cost.get(key, 0.0) + error
        event = make_event(
            step=self._step,
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

    def _request(self, tolerance: float) -> Request:
        limit = self._site_limit
        return Request(
            criterion=self._criterion,
            tolerance=tolerance,
            allotted=allot(tolerance, {g.name: g.num_channels * g.macs_per_channel for g in self.groups()}),
            allowance={s.key: limit - self._site_cost.get(s.key, 0.0) for g in self.groups() for s in g.sites},
            align=self._align,
            max_drop=MAX_DROP,
            seed=self._seed + self._step,
        )

    def _example_rows(self) -> int:
        return max(1, num_rows(self._patient.call))

    def _telemetry(self) -> Telemetry:
        event = 0.0
        for group in self.groups():
            event += len(group.sites) * (ROWS_PER_CHANNEL + 1.0) * group.num_channels**3
        return Telemetry(
            step=self._step,
            total_steps=self._total_steps,
            macs=self._structure.macs / self._example_rows(),
            batch_rows=self._batch_rows,
            event_macs=event,
            overhead_macs=self._overhead,
            tolerance=self._tolerance,
            halvings=self._halvings,
            history=self._history,
        )

    def _decide(self) -> Decision:
        if not self.groups():
            return Decision(at_step=None, tolerance=0.0, reason="every group is pinned")
        return decide(self._telemetry())

    def _emit(self, record: dict[str, Any]) -> None:
        if self._log is not None:
            self._log(record)
