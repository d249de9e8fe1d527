"""What a pruning step works on: the model with its optimizers, how it is called, and what captures of it found.

Holds: capturing the model again, pins from outside (the user's, those of failed edits) and from before. Elsewhere: what
to remove (planner), how a tensor is edited (transaction.py), the step itself (engine.step).
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from apoptosis.distributed.protocol import Layout
from apoptosis.distributed.ranks import Ranks
from apoptosis.distributed.sharded import reshard
from apoptosis.distributed.wrappers import rebuild_wrappers
from apoptosis.errors import ArgumentError, CaptureError
from apoptosis.graph import analyse, layout_of
from apoptosis.graph.explain import Code
from apoptosis.graph.groups.counts import with_follows
from apoptosis.graph.groups.frozen import frozen_names, is_of_frozen
from apoptosis.graph.trace.failures import Fault
from apoptosis.model.evaluate import num_rows
from apoptosis.model.outputs import ReadLogits
from apoptosis.records import Frozen, NormWidths, Pin, Structure, TensorEdit
from apoptosis.surgery.numbers import value_of

_SHOWN_PINS = 3  # of a network that cannot shrink at all
_TIMED = 8  # captures whose times are kept
_LONG_CAPTURE = 0.5  # seconds; a longer one is not repeated just to be timed


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a pruning step changes (the model, its optimizers, averaged copies), and how to call and read the model.

    wrappers: around the model, which is without them here. norm_widths: whether channels under norms may go. ranks:
    that take the same step at the same time. capture_seconds: what the last captures took.
    """

    model: nn.Module
    optimizers: tuple[Optimizer, ...]
    call: tuple[tuple[Any, ...], dict[str, Any]]
    averaged_models: tuple[nn.Module, ...] = ()
    read: ReadLogits | None = None
    wrappers: tuple[nn.Module, ...] = ()
    ranks: Ranks = field(default_factory=Ranks)
    norm_widths: NormWidths = "pinned"
    frozen: Frozen = "keep"
    capture_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMED))

    @property
    def num_examples(self) -> int:
        """Examples in the example input."""
        return max(1, num_rows(self.call))

    def capture(self) -> Structure:
        """Capture the model as it is now."""
        begin = time.thread_time()
        found = analyse(self.model, *self.call, norm_widths=self.norm_widths, frozen=self.frozen)
        self.capture_seconds.append(time.thread_time() - begin)
        return found

    def rebuild_wrappers(self, layouts: Sequence[Layout | None] = ()) -> None:
        """Let wrappers and sharded optimizers take the tensors as they are now, after a rollback too."""
        rebuild_wrappers(self.wrappers, self.model, self.optimizers, layouts)


def seconds_of_capture(target: Target, *, wanted: bool = True) -> float:
    """Return what a capture takes, in seconds: the best of those so far, the first of which meets cold caches.

    By the clock of this thread, on which other programs count for little: the figure decides. Where there was a single
    one, and that was short, another is made if all ranks want to know.
    """
    found = target.capture_seconds
    if target.ranks.all(wanted and len(found) < 2 and min(found) <= _LONG_CAPTURE):
        target.capture()
    return min(found)


def refreshed(target: Target, structure: Structure) -> Structure:
    """Return the structure, captured again if the model was changed outside of apoptosis: shapes, types or layers.

    Or if the user froze or unfroze parameters: pins because of frozen ones go where they do not hold any more.
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
            f"captured: {error} Make a new Apoptosis with an example input of today, and a new optimizer."
        ) from error
    return with_known(target, structure, new)


def with_known(target: Target, old: Structure, new: Structure) -> Structure:
    """Return a new structure with what is known from before: pins set from outside, numbers that follow widths."""
    pins = {g.name: g.pin for g in old.groups if g.pin is not None and not is_of_frozen(g.pin)}
    kept = without_branches(with_pins(new, pins), old.refused)
    there = dict(target.model.named_modules())  # those of an emptied branch are not
    follows = [follow for follow in old.follows if follow.module in there]
    return with_follows(kept, follows, {follow: value_of(target.model, follow) for follow in follows})


def without_branches(structure: Structure, left_out: Mapping[str, str]) -> Structure:
    """Return the structure in which these branches, by name, are not to be emptied, each for its reason."""
    if not left_out:
        return structure
    groups = tuple(
        replace(group, branch=None, unbranched=left_out[group.branch.name])
        if group.branch is not None and group.branch.name in left_out
        else group
        for group in structure.groups
    )
    return replace(structure, groups=groups, refused={**structure.refused, **left_out})


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
            pins[group.name] = Code.EXCLUDED().pin(group.name, group.num_channels)
    return pins


def warn_if_fixed(structure: Structure, name: str) -> None:
    """Warn, once per construction, when nothing of a network may shrink; the first reasons come along.

    It is called two functions below the user's line.
    """
    pins = [group.pin for group in structure.groups if group.pin is not None]
    if len(pins) < len(structure.groups):
        return
    shown = "; ".join(str(pin).rstrip(".") for pin in pins[:_SHOWN_PINS]) or "its forward pass reads no weight"
    more = f"; and {len(pins) - _SHOWN_PINS} more, see pins()" if len(pins) > _SHOWN_PINS else ""
    warnings.warn(f"nothing can be removed from {name}: {shown}{more}.", UserWarning, stacklevel=4)


def kept_positions(edits: Sequence[TensorEdit]) -> dict[str, Mapping[int, Tensor]]:
    """Tensor name -> dim -> positions that stay, as verify() wants them."""
    return {edit.tensor: edit.keep for edit in edits}


def first_fault(ranks: Ranks, fault: Fault | None) -> Fault | None:
    """Return the first rank's fault with its number, None where no rank has one."""
    found = ((rank, fault) for rank, fault in enumerate(ranks.gathered(fault)) if fault is not None)
    rank, first = next(found, (0, None))
    return first if first is None or ranks.size == 1 else first._replace(brief=f"rank {rank}: {first.brief}")


def broken_pin(structure: Structure, name: str, fault: Fault) -> Pin:
    """Return the pin of a group without some of whose channels the model computes something else, or nothing."""
    num = next(g.num_channels for g in structure.groups if g.name == name)
    return replace(Code.BROKEN(fault=fault.brief), remedy=fault.remedy).pin(name, num)
