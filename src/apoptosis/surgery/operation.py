"""One surgery as a transaction: edit, capture again, follow the ids, measure on the probe, commit or roll back.

Holds: the order of these steps and what ends in a rollback. Elsewhere: what to remove (planner), how a
tensor is edited (surgery), what a change may cost (the caller's `accept`).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apoptosis.distributed.fsdp import has_shards, reset_fsdp_state, reshard
from apoptosis.distributed.ranks import Ranks
from apoptosis.distributed.wrappers import rebuild
from apoptosis.distributed.zero import rebuild_buckets
from apoptosis.errors import (
    ArgumentError,
    CaptureError,
    NonFiniteError,
    OutOfMemoryError,
    RankError,
    ShapeError,
    StructureChangedError,
)
from apoptosis.graph import analyse, gains, layout_of, verify_up_to_scale
from apoptosis.graph.groups.counts import with_follows
from apoptosis.graph.groups.frozen import FROZEN, frozen_names
from apoptosis.graph.trace.failures import after_failure, without_hint
from apoptosis.graph.verify.factors import LEFT_OUT
from apoptosis.interrupts import restoring
from apoptosis.model.evaluate import Probe, comparable, compare, outputs, training_outputs
from apoptosis.model.outputs import Change, ReadLogits, together
from apoptosis.model.passes import forget_compiled
from apoptosis.records import Frozen, NormWidths, Pin, Reduction, Structure, TensorEdit
from apoptosis.surgery import Transaction, build_edits, norm_edits
from apoptosis.surgery.numbers import value_of

_BROKEN = (CaptureError, StructureChangedError, ShapeError)  # what pins the group whose edit brought it about
_RESIZED = "outputs whose size varies"  # no fault: they are compared in training mode instead
_SHOWN_PINS = 3  # of a network that cannot shrink at all
_LONG_CAPTURE = 0.5  # seconds; a longer one is not repeated just to be timed
Accept = Callable[[Change], str]  # why the change is refused, "" when it is accepted


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What one surgery touches: the model, its optimizers, averaged copies, and how to call and read the model.

    parallel: the DistributedDataParallel modules around the model, which is without its wrappers here. norm_widths:
    whether channels under norms may go. ranks: that do the same surgery at the same time.
    """

    model: nn.Module
    optimizers: tuple[Optimizer, ...]
    call: tuple[tuple[Any, ...], dict[str, Any]]
    followers: tuple[nn.Module, ...] = ()
    read: ReadLogits | None = None
    parallel: tuple[nn.Module, ...] = ()
    ranks: Ranks = field(default_factory=Ranks)
    norm_widths: NormWidths = "pinned"
    frozen: Frozen = "keep"

    def capture(self) -> Structure:
        """Capture the model as it is now."""
        return analyse(self.model, *self.call, norm_widths=self.norm_widths, frozen=self.frozen)


class _Before(NamedTuple):
    """What the network returned before: in evaluation mode, and in training mode where that is to be compared.

    asked: whether training mode was asked for, whatever came of it.
    """

    evaluation: list[Any]
    training: list[Any] | None
    asked: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """structure: as it is now (new after a commit). change: measured, None if it never came to that. refused: why."""

    committed: bool
    structure: Structure
    change: Change | None
    refused: str = ""
    pins: tuple[Pin, ...] = ()
    done: tuple[Reduction, ...] = ()


def timed_capture(target: Target) -> tuple[Structure, float]:
    """Capture a model and say what that takes in seconds: the better of two, the first of which meets cold caches."""
    found = []
    for _ in range(2):
        begin = time.perf_counter()
        structure = target.capture()
        found.append(time.perf_counter() - begin)
        if target.ranks.any(found[-1] > _LONG_CAPTURE):
            break
    return structure, min(found)


def refreshed(target: Target, structure: Structure) -> Structure:
    """Return the structure, captured again if other hands have changed the model: shapes, types or layers.

    Or if the user froze or unfroze parameters: pins that spoke of frozen ones go where they do not hold any more.
    """
    reshard(target.model)
    frozen = frozen_names(target.model) if target.frozen == "keep" else frozenset()
    if frozen == structure.frozen and layout_of(target.model) == structure.layout:
        return structure
    try:
        new = target.capture()
    except CaptureError as error:
        raise CaptureError(
            f"the model was changed in the course of the run (layers, shapes or types), and what it is now cannot be "
            f"captured: {error} Make Apoptosis anew with what it takes now, and a new optimizer."
        ) from error
    return with_known(target, structure, new)


def with_known(target: Target, old: Structure, new: Structure) -> Structure:
    """Return a new structure with what is known from before: pins set from outside, numbers that follow widths."""
    pins = {g.name: g.pin for g in old.groups if g.pin is not None and FROZEN not in g.pin.reason}
    kept = with_pins(new, pins)
    return with_follows(kept, old.follows, {follow: value_of(target.model, follow) for follow in old.follows})


def with_pins(structure: Structure, pins: Mapping[str, Pin]) -> Structure:
    """Return the structure with further groups pinned (by name); groups pinned already keep their own reason."""
    if not pins:
        return structure
    groups = tuple(
        replace(group, pin=pins[group.name]) if group.name in pins and group.pin is None else group
        for group in structure.groups
    )
    return replace(structure, groups=groups)


def new_pins(before: Structure, after: Structure) -> tuple[Pin, ...]:
    """Return the pins of groups that were open before."""
    open_groups = {group.name for group in before.groups if group.pin is None}
    return tuple(group.pin for group in after.groups if group.pin is not None and group.name in open_groups)


def without_pins(structure: Structure, before: Structure, names: Iterable[str]) -> Structure:
    """Return the structure with the pins of these groups as they were before."""
    old = {group.name: group.pin for group in before.groups if group.name in set(names)}
    groups = tuple(replace(g, pin=old[g.name]) if g.name in old else g for g in structure.groups)
    return replace(structure, groups=groups)


def exclude_pins(structure: Structure, patterns: Sequence[str]) -> dict[str, Pin]:
    """Pins for the groups that the user left out; a pattern is a group's name or a wildcard.

    Raises: ArgumentError: a pattern that matches no group (a typing error would silently exclude nothing).
    """
    pins: dict[str, Pin] = {}
    for pattern in patterns:
        hits = [g for g in structure.groups if fnmatchcase(g.name, pattern)]
        if not hits:
            names = ", ".join(g.name for g in structure.groups[:20])
            raise ArgumentError(f"exclude={pattern!r} matches no group; the groups are: {names}.")
        for group in hits:
            pins[group.name] = Pin(group=group.name, num_channels=group.num_channels, reason=LEFT_OUT)
    return pins


def warn_if_fixed(structure: Structure, name: str) -> None:
    """Warn, once per construction, when nothing of a network may shrink; the first reasons come along."""
    pins = [group.pin for group in structure.groups if group.pin is not None]
    if len(pins) < len(structure.groups):
        return
    shown = "; ".join(str(pin).rstrip(".") for pin in pins[:_SHOWN_PINS]) or "its forward pass reads no weight"
    more = f"; and {len(pins) - _SHOWN_PINS} more, see pins()" if len(pins) > _SHOWN_PINS else ""
    warnings.warn(f"nothing can be removed from {name}: {shown}{more}.", UserWarning, stacklevel=3)


def kept_positions(edits: Sequence[TensorEdit]) -> dict[str, Mapping[int, Tensor]]:
    """Tensor name -> dim -> positions that stay, as verify() wants them."""
    return {edit.tensor: edit.keep for edit in edits}


def apply_reductions(
    target: Target,
    structure: Structure,
    reductions: Sequence[Reduction],
    dropped_variance: Mapping[str, Tensor],
    probe: Probe | None,
    accept: Accept,
) -> Outcome:
    """Carry out reductions in place, or leave everything bitwise as it was.

    A group whose edit breaks the forward pass or changes which channel a column reads is rolled back and pinned, and
    the others are tried again without it. A change that `accept` refuses rolls everything back.
    """
    pins: dict[str, Pin] = {}
    todo, ranks = list(reductions), target.ranks
    outcome: Outcome | None = None
    try:
        before = None if probe is None else _outputs_before(target, probe)
        old_numbers = True  # the training loop may have set a temperature, say, since they were captured
        while todo:
            outcome, fault = _attempt(target, structure, todo, dropped_variance, probe, before, accept, old_numbers)
            if outcome is not None:
                break
            if probe is not None and fault == _RESIZED:
                before = _outputs_before(target, probe, training=True)
                continue
            if old_numbers:  # nothing is pinned, and no weight takes a factor, for what the user has changed
                old_numbers, now = False, target.capture()
                changed = ranks.any(now.scalars != structure.scalars)
                structure = replace(structure, scalars=now.scalars, multiples=now.multiples, scalable=now.scalable)
                if changed or not fault:
                    continue
            failing_groups = _guilty(target, structure, todo, dropped_variance, probe) or {todo[0].group: fault}
            for name, reason in failing_groups.items():
                pins[name] = broken_pin(structure, name, reason)
            todo = [r for r in todo if r.group not in pins]
    except BaseException as error:
        if target.ranks.size == 1 or isinstance(error, NonFiniteError):  # on all ranks; else they cannot meet again
            set_up_again(target)
        raise
    if outcome is None:
        broken = "no group can be edited: " + "; ".join(str(p) for p in pins.values())
        refused = broken if pins else "nothing to remove"
        outcome = Outcome(committed=False, structure=structure, change=None, refused=refused)
    if not outcome.committed:
        set_up_again(target)
    return replace(outcome, pins=tuple(pins.values()), structure=with_pins(outcome.structure, pins))


def set_up_again(target: Target) -> None:
    """Let wrappers and sharded optimizers take the tensors as they are now.

    After a rollback, too: a tensor given back its storage has lost DistributedDataParallel's listener.
    """
    for wrapper in target.parallel:
        rebuild(wrapper)
    reset_fsdp_state(target.model)
    rebuild_buckets(target.optimizers)


def _attempt(
    target: Target,
    structure: Structure,
    reductions: list[Reduction],
    dropped_variance: Mapping[str, Tensor],
    probe: Probe | None,
    before: _Before | None,
    accept: Accept,
    old_numbers: bool,
) -> tuple[Outcome | None, str]:
    """One try with all of `reductions`: an outcome, or None and what went wrong with the structure.

    Nothing went wrong ("") where numbers need a factor and those they are compared with may be old, and where training
    mode has to be compared, too (_RESIZED).
    """
    transaction = Transaction(target.model, target.optimizers, target.followers)
    with restoring(transaction.close):
        tried = _tried(transaction, target, structure, reductions, dropped_variance, probe, before, accept, old_numbers)
    if tried[0] is not None and tried[0].committed:
        set_up_again(target)
        forget_compiled()
    return tried


def _tried(
    transaction: Transaction,
    target: Target,
    structure: Structure,
    reductions: list[Reduction],
    dropped_variance: Mapping[str, Tensor],
    probe: Probe | None,
    before: _Before | None,
    accept: Accept,
    old_numbers: bool,
) -> tuple[Outcome | None, str]:
    fault, again, after, short = "", False, None, None
    with transaction:
        try:
            new, scaled = _edit(transaction, target, structure, reductions, dropped_variance)
            again = scaled and old_numbers
            if not again and probe is not None and before is not None:
                after = _outputs_after(target, probe, training=before.training is not None)
        except _BROKEN as error:
            fault = str(error) or type(error).__name__
        except OutOfMemoryError as error:  # says nothing about a group; on one rank, it ends the event on all
            short = error
        target.ranks.run_collectively(partial(_raise, short))
        fault, again = target.ranks.first_error(fault), target.ranks.any(again)
        if fault or again:
            transaction.rollback()
            return None, fault
        change = None
        if probe is not None and before is not None and after is not None:
            change = _measured(target, probe, before, after)
            if (change.resized or not change.mode) and not before.asked:
                transaction.rollback()
                return None, _RESIZED
            refused = accept(change)
            if refused:
                transaction.rollback()
                return Outcome(committed=False, structure=structure, change=change, refused=refused), ""
        target.ranks.same_parameters("after an event", target.model)
        known = with_known(target, structure, new)
        transaction.commit()
    return Outcome(committed=True, structure=known, change=change, done=tuple(reductions)), ""


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _measured(target: Target, probe: Probe, before: _Before, after: tuple[list[Any], list[Any] | None]) -> Change:
    """Compare outputs on the probes of all ranks. Raises: NonFiniteError: outputs before are not finite."""
    training = None if before.training is None or after[1] is None else (before.training, after[1])
    change = target.ranks.run_collectively(
        partial(compare, before.evaluation, after[0], probe.labels, target.read, probe=probe, training=training)
    )
    return together(target.ranks.gathered(change))


def _edit(
    transaction: Transaction,
    target: Target,
    structure: Structure,
    reductions: Sequence[Reduction],
    dropped_variance: Mapping[str, Tensor],
) -> tuple[Structure, bool]:
    """Edit, capture again, follow the ids, make up for scores that are scaled by a size.

    Returns the new structure, which no scale changes, and whether there were such scores; raises what makes a group a
    pinned one.
    """
    edits = build_edits(structure, reductions, dropped_variance)
    normalised = any(site.normal is not None for group in structure.groups for site in group.sites)
    today = target.capture() if normalised else structure
    transaction.apply(edits, structure, norm_edits(structure, reductions))
    new = target.capture()
    scales = verify_up_to_scale(structure, new, kept_positions(edits))
    sizes = gains(today, new, kept_positions(edits)) if normalised else ()
    transaction.rescale((*scales, *sizes))
    return target.capture() if sizes else new, bool(scales)


def _passes(target: Target, probe: Probe) -> int:
    """Return how many passes every rank makes over its probe, where ranks gather parameters together in each."""
    own = len(probe.pieces())
    if not has_shards(target.model):
        return own
    return int(target.ranks.range_of(torch.tensor([own], dtype=torch.int64, device="cpu"))[1])


def _outputs_before(target: Target, probe: Probe, *, training: bool = False) -> _Before:
    """Run a model on a probe: in evaluation mode, and in training mode if asked for or if that gives no numbers."""
    ranks, passes = target.ranks, _passes(target, probe)
    found = ranks.run_collectively(lambda: outputs(target.model, probe, passes=passes))
    asked = training or ranks.any(not comparable(found, target.read))
    other = None
    if asked:
        other = ranks.run_collectively(lambda: training_outputs(target.model, probe, target.read, passes=passes))
        other = other if ranks.all(other is not None) else None
    return _Before(found, other, asked)


def _outputs_after(target: Target, probe: Probe, *, training: bool) -> tuple[list[Any], list[Any] | None]:
    """Return what the edited network says on examples that the network before took, in one mode or both.

    Raises: CaptureError: it fails on them. OutOfMemoryError: memory runs out.
    """
    passes = _passes(target, probe)
    try:
        found = outputs(target.model, probe, passes=passes)
    except (OutOfMemoryError, RankError):
        raise
    except Exception as error:  # the user's forward may raise anything
        raise CaptureError(f"the forward pass fails on the probe: {type(error).__name__}: {error}") from error
    other = training_outputs(target.model, probe, target.read, passes=passes, checked=False) if training else None
    return found, other


def _guilty(
    target: Target,
    structure: Structure,
    reductions: list[Reduction],
    dropped: Mapping[str, Tensor],
    probe: Probe | None,
) -> dict[str, str]:
    """Which groups fail on their own, with the reason; every trial is rolled back.

    Groups that one number of a module governs (Group.tied_groups) can only be tried, and fail, together.
    """
    found: dict[str, str] = {}
    equal = {group.name: group.tied_groups for group in structure.groups}
    for first in reductions:
        if first.group in found:
            continue
        trial = [first, *(r for r in reductions if r.group in equal[first.group])]
        transaction = Transaction(target.model, target.optimizers, target.followers)
        with restoring(transaction.close):
            try:
                _edit(transaction, target, structure, trial, dropped)
                if probe is not None:
                    _outputs_after(target, probe, training=False)
            except _BROKEN as error:
                found.update((reduction.group, str(error)) for reduction in trial)
    return {name: reason for own in target.ranks.gathered(found) for name, reason in own.items()}


def broken_pin(structure: Structure, name: str, reason: str) -> Pin:
    """Return the pin of a group without some of whose channels the model computes something else, or nothing."""
    num = next(g.num_channels for g in structure.groups if g.name == name)
    text = f"removing channels broke the forward pass: {without_hint(reason).rstrip('.')}"
    return Pin(group=name, num_channels=num, reason=text, remedy=after_failure(reason))
