"""Trying, before anything is removed, whether residual branches can be emptied: shapes at other sizes, and a pass.

Holds: which branches stay, and why the others do not. Elsewhere: finding them (graph), emptying them (branches.py).

A constant gets the shape of an argument, and one capture shows one size. So every module that would be replaced as a
whole runs once more with one position less along every axis but the channels', all its arguments cut alike; and what it
returns is compared with its layer's constant, for an arbitrary one, so that nothing is left out that lies between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from apoptosis.distributed.sharded import has_shards
from apoptosis.distributed.wrappers import inner_optimizer, kind_in_place
from apoptosis.errors import CaptureError, ShapeError, StructureChangedError, one_line
from apoptosis.graph import verify_emptied
from apoptosis.interrupts import restoring
from apoptosis.model.passes import internal_passes
from apoptosis.planner.branches import branches_of
from apoptosis.records import Branch, StandIn, Structure
from apoptosis.surgery.branches import EmptyEdit
from apoptosis.surgery.target import Target, without_branches
from apoptosis.surgery.transaction import Transaction

_TOLERANCE = 1e-5  # relative, between a constant and what a module makes of it


def try_branches(target: Target, structure: Structure) -> Structure:
    """Return the structure without the branches that cannot be emptied; the model is afterwards as it was.

    Args:
        target: the model, and how to call it.
        structure: of the model as it is now.
    """
    branches = branches_of(structure)
    if not branches:
        return structure
    why = _refused_at_all(target.model, target.optimizers)
    if why:
        return without_branches(structure, {branch.name: why for branch in branches})
    found: dict[str, str] = target.ranks.first(target.ranks.run_collectively(partial(_tried, target, structure)))
    return without_branches(structure, found)


def _refused_at_all(model: nn.Module, optimizers: Sequence[Optimizer]) -> str:
    if has_shards(model) or any(kind_in_place(module) for module in model.modules()):
        return "the model's parameters are spread over processes"
    if any(inner_optimizer(optimizer) is not optimizer for optimizer in optimizers):
        return "the optimizer's state is spread over processes"
    return ""


def _tried(target: Target, structure: Structure) -> dict[str, str]:
    found = _of_other_sizes(target, branches_of(structure))
    left = [branch for branch in branches_of(structure) if branch.name not in found]
    if not left or not _fault(target, structure, left):
        return found
    for branch in left if len(left) > 1 else ():
        fault = _fault(target, structure, [branch])
        found |= {branch.name: fault} if fault else {}
    return found if len(left) > 1 else {**found, left[0].name: _fault(target, structure, left)}


def _fault(target: Target, structure: Structure, branches: Sequence[Branch]) -> str:
    """Return what goes wrong when branches are emptied, "" for nothing; everything is put back."""
    weights = {s.key: (s.weight, s.dim) for group in structure.groups for s in group.sites}
    edits = [EmptyEdit(branch=b, weight=weights[b.site][0], dim=weights[b.site][1]) for b in branches]
    transaction = Transaction(target.model, trial=True)
    with restoring(transaction.close):
        try:
            transaction.empty(edits)
            verify_emptied(structure, target.capture(), branches)
        except (CaptureError, StructureChangedError, ShapeError) as error:
            return str(error)
    return ""


# ---------------------------------------------------------------------- other sizes


@dataclass(slots=True)
class _Watch:
    """Runs modules again at other sizes while the model runs. why: by name of the branch, what went wrong."""

    model: nn.Module
    why: dict[str, str] = field(default_factory=dict)
    busy: bool = False

    def after(
        self, branch: Branch, stand_in: StandIn, module: nn.Module, args: Any, kwargs: Mapping[str, Any], out: Any
    ) -> None:
        """Check a module that has just run."""
        if self.busy or branch.name in self.why:
            return
        self.busy = True
        try:
            found = self._sizes(stand_in, module, args, kwargs)
            if not found and stand_in.kind == "branch":
                found = self._constant(branch, stand_in, module, args, kwargs)
        finally:
            self.busy = False
        if found:
            self.why[branch.name] = found

    def _sizes(self, stand_in: StandIn, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> str:
        anchor = _anchor(stand_in, args, kwargs)
        if anchor is None:
            return f"'{stand_in.module}' is called in another way than in the example"
        channels = stand_in.axis % anchor.dim()
        for axis in (axis for axis in range(anchor.dim()) if axis != channels and anchor.shape[axis] > 1):
            fits, why = self._shorter(stand_in, module, (args, kwargs), axis, beside=False)
            if why:
                fits, why = self._shorter(stand_in, module, (args, kwargs), axis, beside=True)
            if not fits:
                return why or f"what '{stand_in.module}' returns has not as many positions as its argument"
        return ""

    @staticmethod
    def _shorter(
        stand_in: StandIn, module: nn.Module, call: tuple[Any, Mapping[str, Any]], axis: int, *, beside: bool
    ) -> tuple[bool, str]:
        """Run a module with one position less along an axis; return whether its result has one less, or why it fails.

        beside: axes of the same size at other places are cut too.
        """
        anchor = _anchor(stand_in, *call)
        if anchor is None:
            return False, ""
        channels, size = stand_in.axis % anchor.dim(), anchor.shape[axis]
        cut = partial(_cut, size=size, axis=axis, ndim=anchor.dim(), beside=beside)
        args, kwargs = tree_map(cut, call)
        shorter = _anchor(stand_in, args, kwargs)
        try:
            out = _first(module(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - the user's forward may raise anything
            text = f"how many positions '{stand_in.module}' returns cannot be told"
            return False, f"{text}: with {size - 1} instead of {size} it fails ({one_line(error)})"
        return shorter is not None and out is not None and _alike(out, shorter, channels), ""

    def _constant(
        self, branch: Branch, stand_in: StandIn, module: nn.Module, args: Any, kwargs: Mapping[str, Any]
    ) -> str:
        """Compare what the module makes of a constant of its layer with what the stand-in would return."""
        layer = self.model.get_submodule(branch.norm or branch.layer)
        if layer is module:  # attention, whose projection is no module that runs
            return ""
        made: list[Tensor] = []

        def constant(layer: nn.Module, args: Any, out: Tensor) -> Tensor:
            axis = _channel_axis(layer, out)
            numbers = torch.linspace(-1.0, 2.0, out.shape[axis], dtype=torch.float64, device=out.device)
            made.append(numbers.to(out.dtype))
            return made[-1].reshape([-1 if i == axis else 1 for i in range(out.dim())]).expand_as(out).clone()

        handle = layer.register_forward_hook(constant)
        with restoring(handle.remove):
            out = _first(module(*args, **kwargs))
        if out is None or not made:
            return f"'{branch.layer}' does not run in every pass"
        axis = stand_in.axis % out.dim()
        wanted = made[-1].reshape([-1 if i == axis else 1 for i in range(out.dim())]).expand_as(out)
        if bool(((out - wanted).abs() <= _TOLERANCE * (1.0 + wanted.abs())).all()):
            return ""
        return f"'{stand_in.module}' does more with what '{branch.layer}' returns than pass it on"


def _of_other_sizes(target: Target, branches: Sequence[Branch]) -> dict[str, str]:
    """Return the branches whose constant's shape cannot be told, or is no constant of the layer, with the reason."""
    watch, model = _Watch(target.model), target.model
    pairs = [(b, s) for b in branches for s in b.stand_ins if s.kind == "branch" or (s.kind == "empty" and s.anchor[1])]
    if not pairs:
        return {}
    for training in (False, True):  # dropout modules let everything through in both
        with internal_passes(model, training=training, seed=0), ExitStack() as stack:
            for branch, stand_in in pairs:
                module = model.get_submodule(stand_in.module)
                hook = partial(watch.after, branch, stand_in)
                handle = module.register_forward_hook(hook, with_kwargs=True)
                stack.enter_context(restoring(handle.remove))
            try:
                args, kwargs = target.call
                model(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - the user's forward may raise anything
                return {branch.name: one_line(error) for branch, _ in pairs}
    return watch.why


def _channel_axis(layer: nn.Module, out: Tensor) -> int:
    """Return the axis of a layer's output along which its channels lie."""
    kernel = getattr(layer, "kernel_size", None)
    if kernel is not None:
        return out.dim() - len(kernel) - 1
    return 1 if isinstance(layer, nn.modules.batchnorm._BatchNorm) else out.dim() - 1


def _anchor(stand_in: StandIn, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    place, name = stand_in.anchor
    found = args[place] if 0 <= place < len(args) else kwargs.get(name)
    return found if isinstance(found, Tensor) else None


def _first(out: Any) -> Tensor | None:
    first = out[0] if isinstance(out, tuple) and out else out
    return first if isinstance(first, Tensor) else None


def _cut(value: Any, *, size: int, axis: int, ndim: int, beside: bool) -> Any:
    """Leave out the last place along the axes of an argument that are one with an axis of the anchor.

    Args:
        value: the argument.
        size: of the anchor along that axis.
        axis: its number; of tensors of as many axes the same one is cut, of others all of that size, examples apart.
        ndim: of the anchor.
        beside: all axes of that size are cut.
    """
    if not isinstance(value, Tensor):
        return value
    same = value.dim() == ndim
    for other, own in enumerate(value.shape):
        if own == size and (beside or (other == axis if same else (other == 0) == (axis == 0))):
            value = value.narrow(other, 0, size - 1)
    return value.contiguous()


def _alike(out: Tensor, anchor: Tensor, channels: int) -> bool:
    pairs = zip(out.shape, anchor.shape, strict=False)
    return out.dim() == anchor.dim() and all(a == b for i, (a, b) in enumerate(pairs) if i != channels)
