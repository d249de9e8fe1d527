"""The transaction: edits reach model, optimizers and averaged copies together, or not at all.

Holds: computing all new values first, exchanging them under every tensor's identity, commit and rollback.
Elsewhere: the values themselves (values.py, optimizers.py), measuring what the edits did (engine.applying).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apoptosis.distributed.sharded import FullTensors, full_tensor, shard_like
from apoptosis.distributed.wrappers import kind_in_place
from apoptosis.errors import ArgumentError, ShapeError
from apoptosis.interrupts import restoring
from apoptosis.model.built import built_shapes
from apoptosis.model.kept import copies, cut
from apoptosis.model.module_state import Exchange
from apoptosis.modules.attention import attention_changes
from apoptosis.modules.norms import NormEdit
from apoptosis.records import IntArray, Kept, Structure, TensorEdit
from apoptosis.surgery.attributes import attribute_changes, check_recurrence, tensors_with_rows
from apoptosis.surgery.averaged_models import Tensors, check_averaged_models, copy_of, named_tensors
from apoptosis.surgery.branches import EmptyEdit, empty_branch, empty_copy, note_order, release
from apoptosis.surgery.dry_run import check_optimizers
from apoptosis.surgery.norms import norm_changes
from apoptosis.surgery.numbers import number_changes
from apoptosis.surgery.optimizers import StateChange, state_changes
from apoptosis.surgery.splits import SplitChange, followed, removed_classes, split_changes
from apoptosis.surgery.undo_log import UndoLog
from apoptosis.surgery.values import apply_edit, merge_like


class Transaction:
    """One set of edits of model, optimizers and averaged copies; undone bitwise until it is committed.

    Every Parameter and buffer keeps its identity and hooks: only its storage and shape are exchanged, so optimizers,
    ties and the user's references stay valid, and a loss of the step before may still be alive. (Calling backward
    once more through a graph from before the surgery is refused by autograd, as after any in-place change.)

    As a context manager it commits at the end of the block, and rolls back when the block raises.

    Args:
        model: the model. optimizers: those that hold its parameters; state of other models is left alone.
        averaged_models: averaged copies (`AveragedModel`, or modules with the model's tensor names), which get the same
            folds and slices on their own values.
        trial: whether it will be rolled back in any case, so that nothing has to be known of what there was.

    Raises:
        UnsupportedOptimizerError: see `check_optimizers`. ArgumentError: see `check_averaged_models`.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> keep = torch.tensor([0, 2])
        >>> edits = [TensorEdit(tensor="0.weight", keep={0: keep}), TensorEdit(tensor="0.bias", keep={0: keep}),
        ...          TensorEdit(tensor="2.weight", keep={1: keep})]
        >>> with Transaction(net) as transaction:
        ...     transaction.apply(edits)
        >>> net[0].out_features, net[2].in_features, tuple(net(torch.ones(4, 2)).shape)
        (2, 2, (4, 1))
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer] = (),
        averaged_models: Sequence[nn.Module] = (),
        *,
        trial: bool = False,
    ) -> None:
        check_optimizers(optimizers, model)
        self._optimizers = tuple(optimizers)
        self._averaged = tuple(averaged_models)
        self._targets = [model, *(copy_of(averaged) for averaged in averaged_models)]
        self._tensors_only = {i for i, averaged in enumerate(averaged_models, 1) if isinstance(averaged, Tensors)}
        check_averaged_models(averaged_models, model)
        if not trial:
            self._note()
        self._undo_log = UndoLog()
        self._open = True

    def _note(self) -> None:
        """Note what the model and its copies are before they lose anything, for checkpoints from then."""
        for i, target in enumerate(self._targets):
            if i not in self._tensors_only:
                built_shapes(target, {name: tuple(tensor.shape) for name, tensor in named_tensors(target).items()})
        for optimizer in self._optimizers:
            note_order(optimizer, self._targets[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with restoring(self.close):
            if kind is None and self._open:
                self.commit()

    def apply(
        self, edits: Sequence[TensorEdit], structure: Structure | None = None, norms: Sequence[NormEdit] = ()
    ) -> None:
        """Compute everything that changes, then change it.

        Args:
            edits: at most one per tensor, all for the shapes before the event.
            structure: before the event; attributes by which a forward pass splits channels (number of heads, size of a
                head) follow its splits. Without it only attributes that follow a tensor's shape change.
            norms: what norms have to know of the channels that go, see `norm_edits`.

        Raises:
            ShapeError: an edit does not fit its tensor or a split. UnsupportedOptimizerError: state without a rule.
            ArgumentError: an edit of an unknown tensor, two edits of one tensor, or a transaction that is over.
            Whatever is raised, everything is as before the call.
        """
        self._apply(edits, structure, norms, values=True)

    def rehearse(self, edits: Sequence[TensorEdit], structure: Structure, norms: Sequence[NormEdit]) -> None:
        """Give tensors and attributes the sizes that `apply` would give them, to try a forward pass; then roll back.

        Tensors keep their memory, of which they show a part: no number in them means anything, none is written, and
        optimizers are left alone. Folds and whatever else makes numbers are passed over.

        Raises: as `apply`.
        """
        self._apply(edits, structure, norms, values=False)

    def _apply(
        self, edits: Sequence[TensorEdit], structure: Structure | None, norms: Sequence[NormEdit], *, values: bool
    ) -> None:
        if not self._open or len(self._undo_log):
            raise ArgumentError("a transaction takes one set of edits; open another one.")
        by_name = {edit.tensor: edit for edit in edits}
        if len(by_name) < len(edits):
            raise ArgumentError("two edits of one tensor in one transaction.")
        self._write(by_name, _around(self._targets[0], structure, edits, norms), values=values)

    def rescale(self, edits: Sequence[TensorEdit]) -> None:
        """Multiply parts of tensors that `apply` has written, as `verify_up_to_scale` wants it.

        Args:
            edits: at most one per tensor, of scales alone, for the shapes as they are now.

        Raises:
            ArgumentError: an edit that does more than scale, of an unknown tensor, two edits of one tensor, or a
            transaction that is over. ShapeError: an edit does not fit its tensor. Whatever is raised, roll back.
        """
        by_name = {edit.tensor: edit for edit in edits}
        if not self._open or len(by_name) < len(edits) or any(e.keep or e.folds or e.offsets or e.merge for e in edits):
            raise ArgumentError("a transaction that is open is rescaled by one edit per tensor, of scales alone.")
        self._write(by_name, _Around())

    def empty(self, edits: Sequence[EmptyEdit]) -> None:
        """Replace residual branches by their constants, after `apply` where channels go as well.

        What is inside goes from the model, its averaged copies and the optimizers; the parameter that holds a constant
        keeps its identity and state, or is made and joins the group of the layer's weight.

        Args: edits: at most one per branch; see `empty_edits`.

        Raises:
            ShapeError: a module cannot be replaced. ArgumentError: a transaction that is over, or an averaged copy that
            cannot lose entries. Whatever is raised, roll back.
        """
        if not self._open:
            raise ArgumentError("a transaction that is over empties no branch.")
        model = self._targets[0]
        with restoring(lambda: None if done else self._undo_log.undo()):
            done = False
            for edit in edits:
                parameters = dict(model.named_parameters(remove_duplicate=False))
                for averaged in self._averaged:
                    empty_copy(self._undo_log, averaged, model, edit)
                made = empty_branch(self._undo_log, model, edit)
                gone = [parameters[name] for name in edit.branch.removed if name in parameters]
                new = [] if made is None else [(parameters[edit.weight], made)]
                for optimizer in self._optimizers:
                    release(self._undo_log, optimizer, gone, new)
            done = True
        torch.clear_autocast_cache()

    def _write(self, by_name: Mapping[str, TensorEdit], around: _Around, *, values: bool = True) -> None:
        plans = _plan_targets(self._targets, by_name, around, values, tensors_only=self._tensors_only)
        parameters = dict(self._targets[0].named_parameters(remove_duplicate=False))
        optimizers = self._optimizers if values else ()
        states = [change for o in optimizers for change in state_changes(o, parameters, by_name)]
        written: list[bool] = []
        with restoring(lambda: None if written else self._undo_log.undo()):
            self._swap(plans, states)
            written.append(True)
        torch.clear_autocast_cache()  # an enclosing autocast would go on with the old weights' casts

    def rollback(self) -> None:
        """Put everything back, bitwise, and end the transaction.

        Tensors, gradients, optimizer state, module attributes and averaged copies are as before `apply`.
        """
        self._undo_log.undo()
        self._open = False

    def close(self) -> None:
        """Roll back unless it is over. Called where a transaction may have been interrupted while it ended."""
        if self._open:
            self.rollback()

    def commit(self) -> None:
        """Let go of the old values and end the transaction."""
        self._undo_log.forget()
        self._open = False

    def _swap(self, plans: Sequence[_Plan], states: Iterable[StateChange]) -> None:
        for plan in plans:
            for tensor, value, grad in plan.tensors:
                self._undo_log.set_tensor(tensor, value, grad)
            for module, name, attribute in plan.attributes:
                self._undo_log.set_attribute(module, name, attribute)
                if isinstance(module, nn.RNNBase):  # for cuDNN: one chunk of memory, which undoing leaves again
                    module.flatten_parameters()
            for setter, old, new in plan.kept:
                self._undo_log.call(setter, old, new)
        for change in states:
            self._undo_log.set_item(change.state, change.key, change.value)


@dataclass(frozen=True, slots=True)
class _Around:
    """What attributes follow beside the tensors' shapes, by module: splits, norms, and numbers found to be widths.

    kept, removed: what is kept between passes, and the numbers of the channels that go.
    """

    splits: Mapping[str, Sequence[SplitChange]] = field(default_factory=dict)
    norms: Mapping[str, NormEdit] = field(default_factory=dict)
    numbers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    kept: Sequence[Kept] = ()
    removed: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


def _around(
    model: nn.Module, structure: Structure | None, edits: Sequence[TensorEdit], norms: Sequence[NormEdit]
) -> _Around:
    if structure is None:
        return _Around(norms={edit.module: edit for edit in norms})
    return _Around(
        splits=split_changes(structure, edits),
        norms={edit.module: edit for edit in norms},
        numbers=number_changes(model, structure, edits),
        kept=structure.kept,
        removed=removed_classes(structure, edits),
    )


class _Plan:
    """New tensors (with gradients), attributes and what is kept between passes, of the model or one averaged copy."""

    def __init__(self) -> None:
        self.tensors: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.attributes: list[tuple[nn.Module, str, Any]] = []
        self.kept: list[Exchange] = []


def _plan_targets(
    targets: Sequence[nn.Module],
    edits: Mapping[str, TensorEdit],
    around: _Around,
    values: bool,
    tensors_only: Set[int] = frozenset(),
) -> list[_Plan]:
    """Plan the same edits for the model and its averaged copies; tensors_only: which of these are no modules."""
    # All values come from before the exchange, so a tensor that a copy shares with the model is set twice alike.
    plans = []
    for number, target in enumerate(targets):
        tensors = named_tensors(target)
        plan, full = _Plan(), FullTensors(named_tensors(targets[0]) | tensors if number in tensors_only else tensors)
        edited: dict[int, TensorEdit] = {}
        for name, edit in edits.items():
            if name not in tensors and number in tensors_only:
                continue
            if name not in tensors:
                raise ArgumentError(f"an edit names tensor '{name}', which {type(target).__name__} does not have.")
            tensor = tensors[name]
            if id(tensor) in edited:
                raise ShapeError(f"tensor '{name}' is tied to another one, and both have an edit.")
            edited[id(tensor)] = edit
            if not values:
                plan.tensors.append((tensor, _part_of_memory(tensor, edit), None))
                continue
            grad = tensor.grad if tensor.is_leaf else None
            new_grad = None if grad is None else shard_like(merge_like(edit, full_tensor(grad)), grad)
            edited_tensor = shard_like(apply_edit(edit, full_tensor(tensor), full), tensor)
            plan.tensors.append((tensor, edited_tensor, new_grad))
        if number in tensors_only:
            plans.append(plan)
            continue
        plan.attributes = _plan_attributes(target, edited, around)
        new = {name: value for name, (_, value, _) in zip(edits, plan.tensors, strict=True)}
        plan.kept = cut(target, around.kept, around.removed)
        plan.kept += copies(target, around.kept, {name: edit.keep for name, edit in edits.items()}, new)
        plans.append(plan)
    return plans


def _part_of_memory(tensor: Tensor, edit: TensorEdit) -> Tensor:
    """Return a tensor of the size after an edit that lies in the memory of the one before."""
    shape = [edit.keep[dim].numel() if dim in edit.keep else size for dim, size in enumerate(tensor.shape)]
    stride = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return tensor.detach().as_strided(shape, stride)


def _plan_attributes(
    target: nn.Module, edited: Mapping[int, TensorEdit], around: _Around
) -> list[tuple[nn.Module, str, Any]]:
    changes: list[tuple[nn.Module, str, Any]] = []
    for qualified, module in target.named_modules():
        merged: dict[str, Any] = {}
        if qualified in around.splits:
            merged.update(followed(module, around.splits[qualified]))
        merged.update(attention_changes(module, edited))
        if qualified in around.norms:
            merged.update(norm_changes(module, around.norms[qualified]))
        check_recurrence(module, edited)
        for leaf, tensor in tensors_with_rows(module).items():
            if id(tensor) in edited:
                merged.update(attribute_changes(module, leaf, edited[id(tensor)].keep, tuple(tensor.shape)))
        merged.update(around.numbers.get(qualified, {}))
        if "__class__" in merged and (wrapper := kind_in_place(module)):
            raise ShapeError(f"module '{qualified}' gets another class, and {wrapper} has wrapped it by itself.")
        changes.extend((module, name, value) for name, value in merged.items())
    return changes
