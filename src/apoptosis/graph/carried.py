"""Channels that cross from one forward pass to the next in attributes of the model.

Lives here: what tensors in attributes are known to carry when a pass begins, what they carry when it ends, and whether
another round of captures is needed to know both. Does not live here: the tensors themselves (kept), operators.

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

from apoptosis.graph.findings import Findings, Reason
from apoptosis.graph.tracer import Tracer
from apoptosis.graph.values import SIZE_LIMIT, Value, nothing, spoiled, varying
from apoptosis.kept import (
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
from apoptosis.module_state import Path, Walk, name_of
from apoptosis.records import IntArray, Kept

ROUNDS = 4  # at most
_TWO_WAYS = "'{}' is kept between passes, and channels lie along other axes of it in one pass than in the next"


@dataclass(slots=True)
class _Mode:
    """What is kept in one mode: known at the beginning of its pass, found at the end, and what the pass read of it."""

    given: dict[Path, Value] = field(default_factory=dict)
    found: dict[Path, Value] = field(default_factory=dict)
    read: set[Path] = field(default_factory=set)


class Carried:
    """What a model keeps from pass to pass, over rounds of captures.

    Args:
        model: the model.
        args, kwargs: what it is called with.

    Attributes: buffers: names of those that every pass writes anew, with a row for each example. Their shapes and
        numbers are no part of the network. fault: what the first try failed with.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._model, self._leaves = model, leaves_of(args, kwargs)
        known = known_of(model)
        self._guesses = iter(()) if known is not None else iter(_guesses(model, self._leaves))
        self._guess: tuple[int, int] | None = None
        self._known = known or Known()
        self.buffers = self._known.buffers
        self._modes: dict[str, _Mode] = {}
        self._rows: dict[Path, Rows] = {}
        self.fault = ""
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
                axis = _axis_of(tensor, size)
                if axis is not None:
                    new[id(tensor)] = with_rows(tensor, axis, number)
            exchange(walk, new)

    def begin(self, tracer: Tracer) -> None:
        """Say what tensors carry at the beginning of a pass."""
        mode = self._modes.setdefault(tracer.mode, _Mode())
        mode.given, values = {}, mode.found
        for path, tensor in kept_tensors(self._model, self.buffers).items():
            if tensor.layout is not torch.strided or not tracer.memory.is_other(tensor):
                continue
            value = entry_of(path, values)
            if value is None or not _is_of(value.ids, tensor):
                origin = f"'{name_of(path)}', which is kept between passes," if path in values else "a constant"
                value = nothing(tensor.dim(), origin, free=value is not None and value.free)
            elif value.live:
                mode.given[path] = value
            tracer.memory.put(tensor, value)
            tracer.memory.kept[tracer.memory.at(tensor)] = path

    def end(self, tracer: Tracer) -> None:
        """Note what tensors carry at the end of a pass."""
        mode, findings = self._modes[tracer.mode], tracer.findings
        rewritten = self._rewritten(tracer) - self.buffers
        self.buffers, self._new_buffers = self.buffers | rewritten, self._new_buffers or bool(rewritten)
        mode.found, mode.read = {}, set(tracer.memory.read_kept)
        for path, tensor in kept_tensors(self._model, self.buffers).items():
            if tensor.layout is not torch.strided or not tracer.memory.is_other(tensor):
                continue
            value = tracer.memory.recorded(tensor)
            if value is None or (not value.live and value.origin == "a constant" and not value.free):
                continue
            ids = _completed(value.ids)
            name = name_of(path)
            mode.found[path] = Value(ids, free=value.free, origin=f"'{name}'", paths=spoiled([value.paths]))
            rows = rows_of(tensor.shape, varying(ids), self._leaves)
            if rows is not None:
                self._rows[path] = rows
            if path in mode.given and path in mode.read and value.live:
                _tie(findings, name, mode.given[path].ids, ids)

    def _rewritten(self, tracer: Tracer) -> frozenset[str]:
        """Return buffers that a pass wrote channels to, and that have a row for each example."""
        found = []
        for name, tensor in self._model.named_buffers():
            owner = tracer.findings.slots.owners.get(name)
            if owner is None or tensor.layout is not torch.strided:
                continue
            if tracer.view(tensor) is not None:
                written, shape = name in tracer.memory.written, owner.shape
            else:
                value, shape = tracer.memory.recorded(tensor), tuple(tensor.shape)
                written = value is not None and (value.live or shape != owner.shape)
            if written and (shape != owner.shape or (len(shape) > 1 and _axis_of_rows(shape, self._leaves))):
                found.append(name)
        return frozenset(found)

    # ------------------------------------------------------------------ rounds

    def tries_again(self, fault: str) -> bool:
        """Prepare another try after a round that failed: with rows that fit the inputs, or of one pass at a time.

        fault: what it failed with. Returns whether there is anything else to try; `fault` is then what failed first.
        """
        if self.rounds:  # the model does not run twice in a row
            self._most = 1
        else:
            self.fault = self.fault or fault
            self._guess = next(self._guesses, None)
            if self._guess is None:
                return False
        self._modes, self._rows, self.rounds, self.buffers = {}, {}, 0, self._known.buffers
        return True

    def goes_on(self) -> bool:
        """Whether another round would know more."""
        self.rounds += 1
        if self.rounds >= self._most or (not self._known.read and self._known.values):
            return False  # a capture before found that nothing of it is read
        new, self._new_buffers = self._new_buffers, False
        return new or any(
            value.live and entry_of(path, mode.given) is None
            for mode in self._modes.values()
            for path, value in mode.found.items()
        )

    def settle(self, findings: Findings, signature: object) -> None:
        """Tie what one mode leaves to what the other reads, and keep what is known for passes to come."""
        training, evaluation = (self._modes.get(mode, _Mode()) for mode in ("training", "evaluation"))
        for path in training.found.keys() & evaluation.found.keys():
            one, other = training.found[path].ids, evaluation.found[path].ids
            if path in training.read | evaluation.read:
                _tie(findings, name_of(path), one, other)
        values = {name: dict(mode.found) for name, mode in self._modes.items()}
        recent = dict([*self._known.values.items()][-3:])
        known = Known(rows=self._rows, buffers=self.buffers, read=self._is_read, values=recent | {signature: values})
        remember(self._model, known)

    @property
    def _is_read(self) -> bool:
        return any(mode.read & mode.given.keys() for mode in self._modes.values())

    def kept(self, labels: IntArray) -> tuple[Kept, ...]:
        """Return what the model keeps, with the numbers of channels by slot."""
        found: dict[Path, Kept] = {}
        for mode in self._modes.values():
            for path, value in mode.found.items():
                if value.live:
                    found.setdefault(path, Kept(path=path, labels=np.where(value.ids > 0, labels[value.ids], -1)))
        return tuple(found.values())


def recall(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], signature: object) -> Carried:
    """Return what earlier captures at the same widths found, for a pass that is run again."""
    carried = Carried(model, args, kwargs)
    known = known_of(model)
    for mode, found in (known.values.get(signature, {}) if known is not None else {}).items():
        carried._modes[mode] = _Mode(found=found)
    return carried


def _is_of(ids: IntArray, tensor: Tensor) -> bool:
    return ids.ndim == tensor.dim() and all(n in (1, size) for n, size in zip(ids.shape, tensor.shape, strict=True))


def _tie(findings: Findings, name: str, one: IntArray, other: IntArray) -> None:
    if not (bool(one.any()) and bool(other.any())):
        return
    if varying(one) == varying(other) and one.shape == other.shape:
        findings.tie(one, other)
        return
    for ids in (one, other):
        findings.pin(ids, Reason(_TWO_WAYS.format(name)))


def _completed(ids: IntArray) -> IntArray:
    """Fill positions that no channel has come to yet where every position along one axis has one channel alone.

    A cache that is filled from one end, or a place at a time, carries at its other places what it carries at these.
    """
    axes = sorted(varying(ids))
    if len(axes) < 2 or bool(ids.all()):
        return ids
    for axis in reversed(axes):
        others = tuple(other for other in axes if other != axis)
        most = ids.max(axis=others, keepdims=True)
        if bool(((ids == 0) | (ids == most)).all()) and np.unique(most).size > 1:
            return np.asarray(most, dtype=np.int64)
    return ids


def _axis_of(tensor: Tensor, size: int) -> int | None:
    return next((axis for axis in range(min(2, tensor.dim())) if tensor.shape[axis] == size), None)


def _axis_of_rows(shape: Sequence[int], leaves: Sequence[Tensor]) -> bool:
    return any(leaf.dim() and size in leaf.shape[:2] for leaf in leaves for size in shape[:2])


def _guesses(model: nn.Module, leaves: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return (rows that kept tensors may have from another batch, rows of this one), the most frequent first."""
    sizes: dict[int, int] = {}
    for tensor in kept_tensors(model, (name for name, _ in model.named_buffers())).values():
        for size in tensor.shape[:2] if tensor.numel() < SIZE_LIMIT else ():
            sizes[size] = sizes.get(size, 0) + 1
    numbers = list(dict.fromkeys(size for leaf in leaves for size in leaf.shape[:2]))[:2]
    return [(size, n) for size in sorted(sizes, key=lambda s: -sizes[s])[:4] for n in numbers if n != size and size]
