"""Carries out what was planned: edits, test of the outputs, keep or roll back.

Holds: one try after another until groups that cannot be edited are left out. Elsewhere: what is planned, and what a
change may cost (step.py), how a tensor is edited (surgery).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apoptosis.decide.acceptance import AcceptanceResult
from apoptosis.distributed.sharded import has_shards
from apoptosis.engine.edited import BROKEN, outputs_of_edited
from apoptosis.errors import NonFiniteError, OutOfMemoryError
from apoptosis.graph import gains, verify_emptied, verify_up_to_scale
from apoptosis.graph.trace.failures import Fault, fault_of
from apoptosis.interrupts import restoring
from apoptosis.model.evaluate import Probe, comparable, compare, outputs, training_outputs
from apoptosis.model.outputs import Change, together
from apoptosis.model.passes import forget_compiled
from apoptosis.records import Pin, Reduction, Structure
from apoptosis.surgery import Transaction, build_edits, norm_edits
from apoptosis.surgery.branches import empty_edits, is_empty
from apoptosis.surgery.target import (
    Target,
    broken_pin,
    first_fault,
    kept_positions,
    with_known,
    with_pins,
    without_branches,
)

Check = Callable[[Change], AcceptanceResult]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What came of applying reductions.

    structure: as it is now (new after a commit). result: of the acceptance test, None if it never came to that.
    refused: why nothing has changed, "" after a commit. pins: of groups whose edits failed. done: what was applied.
    """

    committed: bool
    structure: Structure
    result: AcceptanceResult | None = None
    refused: str = ""
    pins: tuple[Pin, ...] = ()
    done: tuple[Reduction, ...] = ()


def apply_reductions(
    target: Target,
    structure: Structure,
    reductions: Sequence[Reduction],
    dropped_variance: Mapping[str, Tensor],
    probe: Probe | None,
    check: Check,
) -> Outcome:
    """Carry out reductions in place, or leave everything bitwise as it was.

    A group whose edit breaks the forward pass or changes which channel a column reads is rolled back and pinned, and
    the others are tried again without it. A reduction that keeps nothing empties the branch of its group
    (planner.propose_empty makes them); where that fails the branch is refused from then on, and nothing is pinned.
    A change that `check` refuses rolls everything back.
    """
    pins: dict[str, Pin] = {}
    refused: dict[str, str] = {}
    trial = _Trial(target, structure, dropped_variance, probe, check)
    todo, outcome = list(reductions), None
    try:
        trial.run_before()
        while todo:
            tried = trial.attempt(todo)
            if isinstance(tried, Outcome):
                outcome = tried
                break
            if tried.compare_training:
                trial.run_before(training=True)
                continue
            if (trial.old_numbers and trial.renew_numbers()) or tried.fault is None:
                continue  # nothing is pinned, and no weight takes a factor, for what the user has changed
            failing_groups = trial.failing_groups(todo) or {todo[0].group: tried.fault}
            emptied = {r.group for r in todo if is_empty(r)} & failing_groups.keys()
            refused |= _branches(trial.structure, {name: failing_groups[name] for name in emptied})
            narrowed = {name: fault for name, fault in failing_groups.items() if name not in emptied}
            pins |= {name: broken_pin(trial.structure, name, fault) for name, fault in narrowed.items()}
            todo = [r for r in todo if r.group not in failing_groups]
    except BaseException as error:
        if target.ranks.size == 1 or isinstance(error, NonFiniteError):  # on all ranks; else they cannot meet again
            target.rebuild_wrappers()
        raise
    if outcome is None:
        broken = [*map(str, pins.values()), *(f"branch '{name}': {why}" for name, why in refused.items())]
        text = "no group can be edited: " + "; ".join(broken) if broken else "nothing to remove"
        outcome = Outcome(committed=False, structure=trial.structure, refused=text)
    if not outcome.committed:
        target.rebuild_wrappers()
    structure = without_branches(with_pins(outcome.structure, pins), refused)
    return replace(outcome, pins=tuple(pins.values()), structure=structure)


def _branches(structure: Structure, faults: Mapping[str, Fault]) -> dict[str, str]:
    """Return by name the branches of groups that cannot be emptied, with the reason."""
    own = {group.name: group.branch for group in structure.groups}
    return {branch.name: fault.brief for name, fault in faults.items() if (branch := own[name]) is not None}


class _Outputs(NamedTuple):
    """What the network returns on a probe: in evaluation mode, and in training mode where that is to be compared.

    asked: whether training mode was asked for, whatever came of it.
    """

    evaluation: list[Any]
    training: list[Any] | None
    asked: bool


class _Failure(NamedTuple):
    """What a rolled back try failed with: the fault of the structure, or None.

    None was found where numbers need a factor and those they are compared with may be old, and where outputs of
    training mode have to be compared too, because sizes vary in evaluation mode.
    """

    fault: Fault | None = None
    compare_training: bool = False


@dataclass(slots=True)
class _Trial:
    """What the tries of one `apply_reductions` have in common.

    before: what the network returned before any edit. old_numbers: the plain numbers in the structure may be those of
    an earlier step: the training loop may have set a temperature, say, since they were captured.
    """

    target: Target
    structure: Structure
    dropped_variance: Mapping[str, Tensor]
    probe: Probe | None
    check: Check
    before: _Outputs | None = None
    old_numbers: bool = True

    def run_before(self, *, training: bool = False) -> None:
        """Run the model on the probe: in evaluation mode; in training mode if asked or if that gives no numbers."""
        if self.probe is None:
            return
        model, read, ranks, probe = self.target.model, self.target.read, self.target.ranks, self.probe
        passes = self._passes(probe)
        found = ranks.run_collectively(lambda: outputs(model, probe, passes=passes))
        asked = training or ranks.any(not comparable(found, read))
        other = None
        if asked:
            other = ranks.run_collectively(lambda: training_outputs(model, probe, read, passes=passes))
            other = other if ranks.all(other is not None) else None
        self.before = _Outputs(found, other, asked)

    def attempt(self, reductions: list[Reduction]) -> Outcome | _Failure:
        """Apply all of these reductions, test, and keep them or roll back."""
        target, ranks, before = self.target, self.target.ranks, self.before
        transaction = self._transaction()
        fault: Fault | None = None
        again, after, short = False, None, None
        with restoring(transaction.close), transaction:
            try:
                new, scaled = self._edit(transaction, reductions)
                again = scaled and self.old_numbers
                if not again and before is not None:
                    after = self._outputs_after(training=before.training is not None)
            except BROKEN as error:
                fault = fault_of(error)
            except OutOfMemoryError as error:  # says nothing about a group; on one rank, it ends the event on all
                short = error
            ranks.run_collectively(partial(_raise, short))
            fault, again = first_fault(ranks, fault), ranks.any(again)
            if fault or again:
                transaction.rollback()
                return _Failure(fault)
            result = None
            if before is not None and after is not None:
                change = self._change(before, after)
                if (change.resized or not change.mode) and not before.asked:
                    transaction.rollback()
                    return _Failure(compare_training=True)
                result = self.check(change)
                if result.refused:
                    transaction.rollback()
                    return Outcome(committed=False, structure=self.structure, result=result, refused=result.refused)
            ranks.same_parameters("after an event", target.model)
            known = with_known(target, self.structure, new)
            transaction.commit()
        target.rebuild_wrappers()
        forget_compiled()
        return Outcome(committed=True, structure=known, result=result, done=tuple(reductions))

    def renew_numbers(self) -> bool:
        """Put the plain numbers of today's forward pass into the structure; return whether they are others."""
        self.old_numbers, now, old = False, self.target.capture(), self.structure
        self.structure = replace(old, scalars=now.scalars, multiples=now.multiples, scalable=now.scalable)
        return self.target.ranks.any(now.scalars != old.scalars)

    def failing_groups(self, reductions: list[Reduction]) -> dict[str, Fault]:
        """Return the groups that fail on their own, with the reason; every trial is rolled back.

        Groups that one number of a module governs (Group.tied_groups) can only be tried, and fail, together.
        """
        found: dict[str, Fault] = {}
        tied = {group.name: group.tied_groups for group in self.structure.groups}
        for first in reductions:
            if first.group in found:
                continue
            together_with = [first, *(r for r in reductions if r.group in tied[first.group])]
            transaction = self._transaction()
            with restoring(transaction.close):
                try:
                    self._edit(transaction, together_with)
                    if self.probe is not None:
                        self._outputs_after(training=False)
                except BROKEN as error:
                    found.update((reduction.group, fault_of(error)) for reduction in together_with)
        return {name: fault for own in self.target.ranks.gathered(found) for name, fault in own.items()}

    def _transaction(self) -> Transaction:
        return Transaction(self.target.model, self.target.optimizers, self.target.averaged_models)

    def _edit(self, transaction: Transaction, reductions: Sequence[Reduction]) -> tuple[Structure, bool]:
        """Edit, capture again, compare channels, and multiply by factors where scores are divided by a size.

        Returns: the new structure, and whether there were such factors.

        Raises: what is in BROKEN, where the edit is wrong for the model; the caller then pins the group.
        """
        structure, target = self.structure, self.target
        emptied = empty_edits(structure, reductions)
        narrowed, scaled = structure, False
        if left := [reduction for reduction in reductions if not is_empty(reduction)]:
            narrowed, scaled = self._narrow(transaction, left)
        if not emptied:
            return narrowed, scaled
        transaction.empty(emptied)
        new = target.capture()
        verify_emptied(narrowed, new, [edit.branch for edit in emptied])
        return new, scaled

    def _narrow(self, transaction: Transaction, reductions: Sequence[Reduction]) -> tuple[Structure, bool]:
        """Edit, as `_edit` says, the groups that keep some of their channels."""
        structure, target = self.structure, self.target
        edits = build_edits(structure, reductions, self.dropped_variance)
        normalised = bool(structure.normalised)
        today = target.capture() if normalised else structure
        transaction.apply(edits, structure, norm_edits(structure, reductions))
        new = target.capture()
        scales = verify_up_to_scale(structure, new, kept_positions(edits))
        sizes = gains(today, new, kept_positions(edits)) if normalised else ()
        transaction.rescale((*scales, *sizes))
        return target.capture() if sizes else new, bool(scales)

    def _passes(self, probe: Probe) -> int:
        """Return how many passes every rank makes over its probe, where ranks gather parameters together in each."""
        own = len(probe.pieces())
        if not has_shards(self.target.model):
            return own
        return int(self.target.ranks.range_of(torch.tensor([own], dtype=torch.int64, device="cpu"))[1])

    def _outputs_after(self, *, training: bool) -> _Outputs | None:
        """Return what the edited network returns on examples that the network before took, in one mode or both.

        Raises: CaptureError: it fails on them. OutOfMemoryError: memory runs out.
        """
        model, probe = self.target.model, self.probe
        if probe is None:
            return None
        passes = self._passes(probe)
        found = outputs_of_edited(model, probe, passes=passes)
        other = None
        if training:
            other = training_outputs(model, probe, self.target.read, passes=passes, checked=False)
        return _Outputs(found, other, training)

    def _change(self, before: _Outputs, after: _Outputs) -> Change:
        """Compare outputs on the probes of all ranks. Raises: NonFiniteError: outputs before are not finite."""
        probe, ranks = self.probe, self.target.ranks
        labels = None if probe is None else probe.labels
        both = None
        if before.training is not None and after.training is not None:
            both = before.training, after.training
        change = ranks.run_collectively(
            partial(compare, before.evaluation, after.evaluation, labels, self.target.read, probe=probe, training=both)
        )
        return together(ranks.gathered(change))


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
