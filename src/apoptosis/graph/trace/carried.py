"""Channels that cross from one forward pass to the next in attributes of the model.

Holds: what tensors in attributes are known to carry when a pass begins, what they carry when it ends, and whether
another round of captures is needed to know both. Elsewhere: the tensors themselves (kept), operators.

A round is one capture in each mode. In the first, what a model keeps is a constant. In every further one the model has
run once more before the pass that is followed, so that this finds what passes leave, and what they leave is known from
the round before. After one more round than there are passes from the writing of a tensor to its reading nothing new is
found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apoptosis.errors import CaptureError
from apoptosis.graph.explain import Code
from apoptosis.graph.trace.result import TraceResult
from apoptosis.graph.trace.tracer import Tracer
from apoptosis.graph.trace.values import CONSTANT, SIZE_LIMIT, Origin, Value, drop_paths, nothing, varying, without_gaps
from apoptosis.model.kept import (
    Known,
    Rows,
    entry_of,
    exchange,
    fit,
    kept_tensors,
    known_of,
    leaves_of,
    remember,
    rows_of,
    with_rows,
)
from apoptosis.model.module_state import Path, Walk, name_of
from apoptosis.records import IntArray, Kept

ROUNDS = 4  # at most


@dataclass(slots=True)
class _Mode:
    """What is kept in one mode: known at the beginning of its pass, found at the end, and what the pass read of it.

    there: tensors at the beginning, which are held so that no other one takes their ids.
    """

    there: dict[Path, Tensor] = field(default_factory=dict)
    given: dict[Path, Value] = field(default_factory=dict)
    found: dict[Path, Value] = field(default_factory=dict)
    read: set[Path] = field(default_factory=set)


class Carried:
    """What a model keeps from pass to pass, over rounds of captures.

    Args:
        model: the model.
        args, kwargs: what it is called with.

    Attributes: buffers: names of those that every pass writes anew, with a row for each example. Their shapes and
        numbers are no part of the network.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._model, self._leaves = model, leaves_of(args, kwargs)
        known = known_of(model)
        found = [] if known is not None else _guesses(model, self._leaves)
        self._guesses = iter(found)
        self._guess: tuple[int, int] | None = None
        self._known = known or Known()
        self.buffers = self._known.buffers
        self._modes: dict[str, _Mode] = {}
        self._rows: dict[Path, Rows] = {}
        self._copies: dict[Path, str] = {}
        self._fault: dict[str, Any] = {}  # of the first try, as CaptureError takes it
        self._hint = _hint(model) if found else ""
        self._most, self._new_buffers = ROUNDS, False
        self.rounds = 0

    # ------------------------------------------------------------------ one pass

    def prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Let what is kept from other batches have the rows of this one. To be called inside `internal_passes`."""
        fit(self._model, args, kwargs)
        if self._guess is not None:
            size, number = self._guess
            walk, new = Walk(self._model), dict[int, Any]()
            for tensor in kept_tensors(self._model, (n for n, _ in self._model.named_buffers()), walk).values():
                axis = next((axis for axis in range(min(2, tensor.dim())) if tensor.shape[axis] == size), None)
                if axis is not None:
                    new[id(tensor)] = with_rows(tensor, axis, number)
            exchange(walk, new)

    def begin(self, tracer: Tracer) -> None:
        """Say what tensors carry at the beginning of a pass."""
        mode = self._modes.setdefault(tracer.mode, _Mode())
        mode.given, values = {}, mode.found
        mode.there = kept_tensors(self._model, self.buffers)
        for path, tensor in mode.there.items():
            if tensor.layout is not torch.strided or not tracer.memory.is_other(tensor):
                continue
            value = entry_of(path, values)
            if value is None or not _is_of(value.ids, tensor):
                value = nothing(tensor.dim(), CONSTANT if value is None else value.origin)
            elif value.has_channels:
                mode.given[path] = value
            tracer.memory.put(tensor, value)
            tracer.memory.kept[tracer.memory.at(tensor)] = path

    def end(self, tracer: Tracer) -> None:
        """Note what tensors carry at the end of a pass."""
        mode, trace = self._modes[tracer.mode], tracer.trace
        rewritten = self._rewritten(tracer) - self.buffers
        self.buffers, self._new_buffers = self.buffers | rewritten, self._new_buffers or bool(rewritten)
        mode.found, mode.read = {}, set(tracer.memory.read_kept)
        before = {id(tensor) for tensor in mode.there.values()}
        for path, tensor in kept_tensors(self._model, self.buffers).items():
            if tensor.layout is not torch.strided:
                continue
            if (view := tracer.view(tensor)) is not None:
                if tuple(tensor.shape) == view.info.shape and all(view.axes(d) <= {d} for d in view.varied()):
                    self._copies[path] = view.info.name
                continue
            value = tracer.memory.recorded(tensor) or nothing(tensor.dim())
            if id(tensor) in before and not value.has_channels:
                continue
            # a cache that is filled from one end, or a place at a time, carries the same channels at its other places
            ids, origin = without_gaps(value.ids), Origin(f"'{name_of(path)}' of the pass before", kept=True)
            mode.found[path] = Value(ids, is_filler=value.is_filler, origin=origin, paths=drop_paths([value.paths]))
            rows = rows_of(tensor.shape, varying(ids), self._leaves)
            if rows is not None:
                self._rows[path] = rows
            if path in mode.given and path in mode.read and value.has_channels:
                _tie(trace, name_of(path), mode.given[path].ids, ids)

    def _rewritten(self, tracer: Tracer) -> frozenset[str]:
        """Return buffers that a pass wrote channels to, and that have a row for each example."""
        found = []
        for name, tensor in self._model.named_buffers():
            info = tracer.trace.channel_ids.tensors.get(
                name
            )  # None also of a second name that has a tensor of its own now
            if tensor.layout is not torch.strided:
                continue
            before, shape = () if info is None else info.shape, tuple(tensor.shape)
            if tracer.view(tensor) is not None:
                written = name in tracer.memory.written
            else:
                value = tracer.memory.recorded(tensor)
                written = value is not None and (value.has_channels or shape != before)
            if written and (shape != before or (len(shape) > 1 and _has_rows(shape, self._leaves))):
                found.append(name)
        return frozenset(found)

    # ------------------------------------------------------------------ rounds

    def after(self, error: CaptureError) -> dict[str, Any] | None:
        """Prepare another try after a round that failed: with rows that fit the inputs, or of one pass at a time.

        Returns: None for another try; where there is nothing else to try, what CaptureError takes to tell what failed
        first, {} where that is this error.
        """
        if self.rounds:  # the model does not run twice in a row
            self._most = 1
        else:
            is_first = not self._fault
            self._fault = self._fault or {"text": str(error), **vars(error)}
            self._guess = next(self._guesses, None)
            if self._guess is None:
                return {} if is_first and not self._hint else self._fault | {"text": self._fault["text"] + self._hint}
        self._modes, self._rows, self._copies, self.rounds = {}, {}, {}, 0
        self.buffers = self._known.buffers
        return None

    def goes_on(self) -> bool:
        """Whether another round would know more."""
        self.rounds += 1
        if self.rounds >= self._most or (self._known.values and not (self._known.read or self._is_read)):
            return False  # a capture before found that nothing of it is read
        new, self._new_buffers = self._new_buffers, False
        if self.rounds == 1:
            new = new or bool(self._rows)  # a later pass may go another way because it is there
        return new or any(
            value.has_channels and entry_of(path, mode.given) is None
            for mode in self._modes.values()
            for path, value in mode.found.items()
        )

    def finish_round(self, trace: TraceResult, signature: object) -> None:
        """Tie what one mode leaves to what the other reads, and keep what is known for passes to come."""
        training, evaluation = (self._modes.get(mode, _Mode()) for mode in ("training", "evaluation"))
        for path in training.found.keys() & evaluation.found.keys():
            one, other = training.found[path].ids, evaluation.found[path].ids
            if path in training.read | evaluation.read:
                _tie(trace, name_of(path), one, other)
        values = {name: dict(mode.found) for name, mode in self._modes.items()}
        recent = dict([*self._known.values.items()][-3:])
        known = Known(rows=self._rows, buffers=self.buffers, read=self._is_read, values=recent | {signature: values})
        remember(self._model, known)

    @property
    def _is_read(self) -> bool:
        return any(path in mode.read for mode in self._modes.values() for path in mode.found)

    def kept(self, labels: IntArray) -> tuple[Kept, ...]:
        """Return what the model keeps, with the numbers of channels by id."""
        found: dict[Path, Kept] = {}
        for mode in self._modes.values():
            for path, value in mode.found.items():
                if value.has_channels:
                    found.setdefault(path, Kept(path=path, labels=np.where(value.ids > 0, labels[value.ids], -1)))
        none = np.zeros(0, dtype=np.int64)
        return (*found.values(), *(Kept(path=path, labels=none, copy_of=name) for path, name in self._copies.items()))


def recall(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], signature: object) -> Carried:
    """Return what earlier captures at the same widths found, for a pass that is run again."""
    carried = Carried(model, args, kwargs)
    known = known_of(model)
    for mode, found in (known.values.get(signature, {}) if known is not None else {}).items():
        carried._modes[mode] = _Mode(found=found)
    return carried


def _is_of(ids: IntArray, tensor: Tensor) -> bool:
    return ids.ndim == tensor.dim() and all(n in (1, size) for n, size in zip(ids.shape, tensor.shape, strict=True))


def _tie(trace: TraceResult, name: str, one: IntArray, other: IntArray) -> None:
    if not (bool(one.any()) and bool(other.any())):
        return
    if varying(one) == varying(other) and one.shape == other.shape:
        trace.tie(one, other)
        return
    for ids in (one, other):
        trace.pin(ids, Code.KEPT_TWO_WAYS(name=name))


def _has_rows(shape: Sequence[int], leaves: Sequence[Tensor]) -> bool:
    return any(leaf.dim() and size in leaf.shape[:2] for leaf in leaves for size in shape[:2])


def _hint(model: nn.Module) -> str:
    """Say which tensors are kept, one of which may be what does not fit the inputs."""
    shown = [f"'{name_of(path)}' {tuple(t.shape)}" for path, t in kept_tensors(model, ()).items() if t.dim() > 1][:2]
    if not shown:
        return ""
    return (
        f"; it keeps {', '.join(shown)} in attributes: if that is of another batch, reset it or let example_input fit"
    )


def _guesses(model: nn.Module, leaves: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return (rows that kept tensors may have from another batch, rows of this one), the most frequent first."""
    sizes: dict[int, int] = {}
    for tensor in kept_tensors(model, (name for name, _ in model.named_buffers())).values():
        for size in tensor.shape[:2] if tensor.numel() < SIZE_LIMIT else ():
            sizes[size] = sizes.get(size, 0) + 1
    numbers = list(dict.fromkeys(size for leaf in leaves for size in leaf.shape[:2]))[:2]
    return [(size, n) for size in sorted(sizes, key=lambda s: -sizes[s])[:4] for n in numbers if n != size and size]
