"""Apoptosis: one call per training step; shrinks model and optimizer in place when it pays.

Holds: the class that users make, when windows open and end, and what survives between steps. Elsewhere: what can be
asked of a run (run_view.py), one pruning step from plan to rollback (step.py), how long a window waits (window.py), any
formula.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from apoptosis.decide.acceptance import AcceptanceTest
from apoptosis.decide.ledger import Event
from apoptosis.decide.policy import Decision, PastEvent, Telemetry
from apoptosis.decide.state import (
    MAX_DROP,
    Removal,
    telemetry,
    write_state,
)
from apoptosis.distributed.ranks import ranks_of
from apoptosis.distributed.wrappers import layouts_of, step_checks
from apoptosis.engine.beginning import (
    check_agreed,
    check_reachable,
    limit_of_outputs,
    limit_of_sites,
    new_memory,
    read_settings,
    rehearsed,
    warn_at_end,
    warn_if_few,
)
from apoptosis.engine.event_builder import log_entry
from apoptosis.engine.looks import Looks
from apoptosis.engine.resuming import Run, read_run
from apoptosis.engine.run_view import RunView
from apoptosis.engine.step import PruningStep, StepResult
from apoptosis.engine.window import comes_too_late, is_cut_short, may_be_cut_short, new_window, next_window
from apoptosis.errors import ArgumentError, NonFiniteError
from apoptosis.interrupts import uninterrupted
from apoptosis.model.arguments import (
    check_exclude,
    check_model,
    check_optimizers_given,
    check_others,
)
from apoptosis.model.evaluate import as_call, make_probe
from apoptosis.model.outputs import ReadLogits
from apoptosis.model.trials import has_classes, looked_at
from apoptosis.observe import CHANGED_BY_OTHERS, NOTHING_SEEN, UNFINISHED, Observer
from apoptosis.records import Frozen, NormWidths, Timings
from apoptosis.surgery import as_averaged_model, check_averaged_models, check_optimizers, warn_of_averages
from apoptosis.surgery.target import (
    Target,
    refreshed,
)

if TYPE_CHECKING:
    from apoptosis.display.progress import Reporter

_UNREAD_REMEDY = "Give logits= to read numbers off its output, or a probe= on whose inputs it returns some."
_LEFT = (
    "Apoptosis.{}() after the end of its with block, where its hooks were taken off: put the training loop inside the "
    "block, or enter it again (`with apo:`) to go on."
)
Log = Callable[[dict[str, Any]], None]


def _progress_line(progress: bool | str) -> Callable[[int | None], Reporter | None] | None:
    """Return what makes a progress line for so many steps, None where none was asked for. Raises: ArgumentError."""
    if progress is None or progress is False:
        return None
    from apoptosis.display.progress import check_progress, make_reporter

    return partial(make_reporter, check_progress(progress))


class Apoptosis(RunView):
    """Removes redundant neurons while a network trains.

    Args:
        model: the network, changed in place at events. Compiled models and DistributedDataParallel are
            looked through: names are those of the module inside.
        optimizer: one optimizer or a sequence of them.
        example_input: what one forward pass takes: a tensor, a tuple (positional) or a dict (keyword arguments).
        tolerance: cap per consumer site and event on the relative rms change of what the loss sees of the consumer's
            output (a share; the errors of one site over all events add up to at most 8 times that). None:
            the criterion's own. 0: only what is redundant to round-off in float64.
        criterion: one of `apoptosis.criteria.criteria()`.
        total_steps: optimizer steps of the whole run; without it every event step comes at twice the last.
        budget: what all removals together may cost in accuracy (a share, 0.002 = 0.2 points), measured on `probe`.
        probe: held-out inputs of the form of example_input, or (inputs, labels).
        align: widths are rounded up to a multiple of this.
        exclude: names or wildcards of groups to leave alone.
        log: called (on rank 0) with one JSON-able dict per attempt: kind "event" (committed or rolled back), or kind
            "attempt" with the reason why nothing was removed; what it raises reaches the caller of step(), after that.
        norm_widths: "pinned" leaves channels under LayerNorm and RMSNorm (a transformer's residual width) alone;
            "compensated" lets multiples of others and constants go, and the norms make up for them.
        frozen: "keep" leaves weights that require no gradient while others do (a base model under adapters) as they
            are, with the channels they make and read; "cut" lets them shrink.
        logits: reads (examples, classes) logits off the model's output, where the output is not just that tensor.
        seed: of the private random generator (positions of feature maps, criterion "random").
        calibration: fixed cost of an event in MACs (`apo.calibration` of an earlier run). None: measured, and raised at
            an event by what torch.compile took until then.
        target: what to reach, early in the run and with the least loss that trials predict: a speed-up ("2x", by
            multiply-adds) or a share ({"macs": 0.5}, {"parameters": 0.25}, {"seconds": 0.5}) of what there is now. It
            needs total_steps, takes the place of the tolerance, and is never exceeded. None: what the tolerance allows.
        min_width: channels that every group keeps at least: a share of what it has now, or a number.
        max_removed: largest share of a group's channels that one event removes.
        pretrained: whether the network was trained before, so that events come early. None: it was if the weights of
            its norms are not what they start as.
        timings: what a training step takes (`apo.timings` of an earlier run), for a target in seconds. None: measured
            now, in a second or a few passes. Decisions are a function of it; a busy machine may measure another one.
        progress: True for a progress line on a terminal or in a notebook (on rank 0), by tqdm or rich, whichever is
            there; "tqdm" or "rich" for that one.

    In a `with` block the hooks of an open window are taken off at its end, also by an error; model and optimizer stay
    as they are then. step() is refused after it, until the block is entered again.

    Raises:
        ArgumentError, BudgetError, CaptureError, UnsupportedOptimizerError: before anything has changed.
    """

    _line: Reporter | None = None
    _looked = False  # whether averages that do not follow were looked for

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
        norm_widths: NormWidths = "pinned",
        frozen: Frozen = "keep",
        logits: ReadLogits | None = None,
        seed: int = 0,
        calibration: float | None = None,
        target: Any = None,
        min_width: float = 0.0,
        max_removed: float = MAX_DROP,
        pretrained: bool | None = None,
        timings: Timings | None = None,
        progress: bool | str = False,
    ) -> None:
        start = time.perf_counter()
        model, wrappers = check_model(model)
        optimizers = check_optimizers_given(optimizer, trains=model)
        options: dict[str, Any] = {"norm_widths": norm_widths, "frozen": frozen}
        seed, known = check_others(criterion, seed, calibration, log=log, logits=logits, **options)
        bounds: dict[str, Any] = {"target": target, "min_width": min_width, "max_removed": max_removed}
        numbers: dict[str, Any] = {"tolerance": tolerance, "align": align, "total_steps": total_steps, "budget": budget}
        settings, budget = read_settings(criterion, seed, calibrated=known is not None, **numbers, **bounds)
        patterns, line = check_exclude(exclude), _progress_line(progress)
        check_optimizers(optimizers, model)
        ranks, self._step_checks = ranks_of(wrappers, model), step_checks(wrappers)
        call, self._log = as_call(example_input), log
        self._target = Target(
            model=model, optimizers=optimizers, call=call, ranks=ranks, read=logits, wrappers=wrappers, **options
        )
        held_out = None if probe is None else make_probe(probe, example_input)
        structure = self._target.capture()
        self._structure = rehearsed(self._target, structure, settings, patterns, pretrained)
        self._has_classes = has_classes(model, call, logits)
        held_out = looked_at(model, held_out, call, logits, remedy=_UNREAD_REMEDY, ranks=ranks)
        self._memory = new_memory(self._target, structure, settings, known, pretrained, timings)
        sanity = limit_of_outputs(self._target, self._memory, settings)
        self._acceptance = AcceptanceTest(budget, held_out, sanity=sanity, ranks=ranks)
        self._acceptance.check_budget(readable=self._has_classes, named=logits is not None)
        self._settings = replace(settings, site_limit=limit_of_sites(settings.tolerance, structure))
        check_reachable(self._target, self._structure, self._memory, self._settings, self.groups())
        warn_if_few(settings.total_steps)
        check_agreed(self._target, self._settings, self._structure, budget=budget, probe=self._acceptance.held_out)
        self._memory.decision = self._decide()
        self._looks = Looks(model, self._memory, self._settings)
        self._line = None if line is None or ranks.rank else line(self._settings.total_steps)
        self._memory.own_seconds += time.perf_counter() - start

    # ------------------------------------------------------------------ what a user may do

    def follow(self, averaged: Any) -> None:
        """Shrink an averaged copy of the model along with it from now on.

        Args:
            averaged: AveragedModel or a plain copy, an object that holds one (`ema_model` of ema-pytorch, `module`), a
                dict of tensors by the model's names, a list of them in the order of its parameters (of all, or of
                those that require a gradient), or an object that holds one (`shadow_params`, `shadow`).

        Raises: ArgumentError: the copy's tensors are not those of the model.
        """
        averaged = as_averaged_model(averaged, self._target.model)
        late = "The model has lost channels since: make the copy of the model as it is now, or follow it before."
        wrong = "It is a copy of another network."
        check_averaged_models([averaged], self._target.model, late if self._memory.num_events else wrong)
        self._target = replace(self._target, averaged_models=(*self._target.averaged_models, averaged))

    def close(self) -> None:
        """Take every hook off and never act again; step() becomes a no-op."""
        self._release()
        self._memory.closed = True

    def __enter__(self) -> Self:
        self._left = False
        return self

    def __exit__(self, *error: object) -> None:
        self._release()
        self._left = True

    def _release(self) -> None:
        self._drop_window()
        if self._line is not None:
            self._line.close()
            self._line = None

    def state_dict(self) -> dict[str, Any]:
        """All that decides what happens next, a half-filled window included; plain values and tensors."""
        alone = self._target.ranks.size == 1  # else a resumed run opens another window
        window = self._observer.state_dict() if self._observer is not None and alone else None
        buckets = layouts_of(self._target.wrappers)
        return write_state(self._memory, self._settings, self._structure, self._acceptance, window, buckets)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` stopped. The model must have the widths it had then (apoptosis.load sets them).

        Raises: CheckpointError: the state is of another network or other widths. RankError: ranks load different ones.
        ArgumentError: a with block was left. Nothing has changed then.
        """
        if self._left:
            raise ArgumentError(_LEFT.format("load_state_dict"))
        run: dict[str, Any] = {"structure": self._structure, "memory": self._memory, "acceptance": self._acceptance}
        now, before, layouts = Run(**run, observer=self._observer), dict(vars(self)), layouts_of(self._target.wrappers)
        new, looks = None, None
        try:
            if now.observer is not None:  # the capture below is no pass of the user's
                now.observer.pause()
            new = read_run(self._target, now, self._settings, state)
            self._target.rebuild_wrappers(new.layouts)  # the model may have got the widths of a checkpoint
            looks = Looks(self._target.model, new.memory, self._settings)
            looks.go_on(new.memory, new.structure)
            if new.observer is not None:
                new.observer.open()
            with uninterrupted():
                self._looks.pause()
                if now.observer is not None:
                    now.observer.close()
                self._structure, self._memory, self._acceptance = new.structure, new.memory, new.acceptance
                self._observer, self._looks = new.observer, looks
        except BaseException:
            with uninterrupted():
                for opened in (looks, None if new is None else new.observer):
                    if opened is not None:
                        opened.close()
                vars(self).update(before)
                self._looks.open()
                if now.observer is not None:
                    now.observer.open()
            if new is not None:
                self._target.rebuild_wrappers(layouts)
            raise

    # ------------------------------------------------------------------ the loop

    def step(self) -> Event | None:
        """Call once after optimizer.step(). Returns an Event if shapes changed, else None."""
        if self._memory.closed:
            return None
        if self._left:
            raise ArgumentError(_LEFT.format("step"))
        for check in self._step_checks:
            check()
        self._memory.step += 1
        if self._line is not None:
            self._line.update(self._memory.step, self._memory.num_events, self._brief)
        if self._looks.due(self._memory.step):
            self._looks.take(self._memory, self._structure, again=self._memory.step == self._looks.first)
        if self._memory.step - 1 == self._settings.total_steps:
            warn_at_end(self._memory.step)
        observer, due = self._observer, self._memory.decision.at_step
        if observer is None and (due is None or self._memory.step < due):
            return None
        if observer is not None and not self._is_over(observer):
            if text := self._still_open(observer):
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            return None
        start = time.perf_counter()
        try:
            with torch.inference_mode(False):  # tensors made in it could not be trained
                if observer is not None:
                    return self._event(observer)
                self._open_window()
            return None
        finally:
            self._memory.own_seconds += time.perf_counter() - start

    def __del__(self) -> None:
        self._release()

    def _open_window(self) -> None:
        self._structure = refreshed(self._target, self._structure)
        if not self.groups():
            self._memory.decision = self._decide()
            return
        if not self._looked:
            warn_of_averages(self._target.model, self._target.averaged_models)
            self._looked = True
        self._memory.window_start = self._memory.step
        observer = new_window(self._target, self._settings, self._memory, self._structure, self._acceptance)
        try:
            observer.open()
            self._observer = observer
            self._looks.take(self._memory, self._structure, again=True)
        except BaseException:
            observer.close()
            self._observer = None
            raise

    def _is_over(self, observer: Observer) -> bool:
        """Note that a step of the open window has passed; return whether the window is over, on all ranks alike.

        It is when every group has seen its rows, or is given up; or when the others are not worth waiting for.
        """
        over = observer.end_step()
        observer.cut_short = False
        if not over and may_be_cut_short(observer):
            over = is_cut_short(observer, self.groups(), self._telemetry(), self._memory.behind)
        return self._target.ranks.all(over)

    def _still_open(self, observer: Observer) -> str:
        """Give an open window up with the last step of the run; return the warning that is due, or ""."""
        step, total = self._memory.step, self._settings.total_steps
        if step == total:
            lacks = f"the run was over before {observer.lacks()}"
            cause, reason = ("unseen", NOTHING_SEEN) if observer.saw_nothing else ("rows", lacks)
            self._drop_window()
            self._memory.decision = self._decide()
            self._memory.attempts += ((result := self._skipped(cause, reason)).attempt,)
            self._report(result)
            return f"apoptosis saw nothing of this run: {NOTHING_SEEN}" if observer.saw_nothing else ""
        if self._memory.attempts or self._target.ranks.rank:
            return ""
        return comes_too_late(observer, self.groups(), step=step, total_steps=total)

    def _drop_window(self) -> None:
        if "_looks" in vars(self):  # not where the constructor failed
            self._looks.close()
        if self._observer is not None:
            self._observer.close()
            self._memory.hook_seconds += self._observer.hook_seconds
            self._observer = None

    def _event(self, observer: Observer) -> Event | None:
        """End the window, take a pruning step with what it saw, and decide when the next window opens."""
        start, memory, ranks = time.perf_counter(), self._memory, self._target.ranks
        self._drop_window()
        rows = observer.examples / max(1, memory.step - memory.window_start)
        memory.batch_rows = float(ranks.total(torch.tensor([rows], dtype=torch.float64, device="cpu"))) / ranks.size
        full_sample, before = memory.require_full_sample, self._structure
        self._structure = refreshed(self._target, before)
        changed = "" if self._structure is before else CHANGED_BY_OTHERS
        fault = UNFINISHED if observer.unfinished else NOTHING_SEEN if observer.saw_nothing else changed
        results: list[StepResult] = []
        try:
            if fault := ranks.first_error(fault):
                raise NonFiniteError(fault)
            step = PruningStep(
                target=self._target,
                structure=self._structure,
                memory=memory,
                settings=self._settings,
                acceptance=self._acceptance,
                observer=observer,
                start=start,
            )
            for result in step.tries():
                self._keep(result, self._structure.macs, full_sample)
                results.append(result)
        except NonFiniteError as error:  # nothing was tried: no reason for the policy to back off
            results.append(self._skipped("fault", str(error)))
            memory.attempts += (results[-1].attempt,)
            warnings.warn(f"apoptosis skipped an event at step {memory.step}: {error}", RuntimeWarning, stacklevel=3)
        finally:
            memory.decision = self._decide()
        for result in results:  # after all that ranks do together: a log may fail, on one of them
            self._report(result)
        return results[-1].event

    def _keep(self, result: StepResult, macs: float, full_sample: bool) -> None:
        """Take over what came of a pruning step. macs: before it. full_sample: whether its window saw all rows."""
        memory, attempt, self._structure = self._memory, result.attempt, result.structure
        memory.attempts += (attempt,)
        memory.removals += () if result.event is None else (Removal.of(result.event),)
        # one that was too early does not count, nor one of too few rows: later windows see all that they ask for
        early = attempt.cause in ("forming", "exchange") or full_sample != memory.require_full_sample
        if attempt.outcome != "nothing" or not early:
            sizes = {"macs_before": macs, "macs_after": self._structure.macs}
            memory.history += (PastEvent(step=memory.step, rolled_back=attempt.outcome == "rolled back", **sizes),)

    def _skipped(self, cause: str, reason: str) -> StepResult:
        return StepResult(self._structure, self._memory.attempt(len(self.groups()), "skipped", cause, reason))

    def _report(self, result: StepResult) -> None:
        """Pass the record of an attempt to the user's log."""
        if self._log is not None and not self._target.ranks.rank:
            self._log(log_entry(result.attempt, result.event, left=result.left, measured=result.measured))

    # ------------------------------------------------------------------ small things

    def _telemetry(self) -> Telemetry:
        return telemetry(self._memory, self._settings, self._structure, rows=self._target.num_examples)

    def _decide(self) -> Decision:
        return next_window(self._memory, self._settings, self._structure, self._target.num_examples)
