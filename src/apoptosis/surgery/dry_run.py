"""Dry runs: what an optimizer of another library does is tried on a copy before anything depends on it.

Holds: the check of optimizers before anything changes, and dry runs: a copy with a few small synthetic parameters
makes some steps, loses channels, and makes some more. Elsewhere: the rules (optimizers.py).

Classes of torch.optim have their table and are not tried. The user's optimizer, its state, its parameters and all
random generators are untouched.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from apoptosis.distributed.wrappers import inner_optimizer
from apoptosis.errors import ArgumentError, UnsupportedOptimizerError
from apoptosis.interrupts import restoring
from apoptosis.model.module_state import random_states
from apoptosis.model.passes import marked_internal
from apoptosis.records import TensorEdit
from apoptosis.surgery.nested_optimizers import check_kept, layers, parameters_of
from apoptosis.surgery.optimizers import (
    LEARNT,
    Layout,
    Learnt,
    check_class,
    layouts,
    rule_of,
    state_changes,
)

_STEPS = 12  # before channels go, and after: some wrappers act at every fifth or tenth step
_WIDE = 160  # positions of the largest synthetic parameter along a dim: some states are factored from 128 on
_SIZES = ((11, 7, 3, 2, 2), (13, 5, 3, 2, 2))  # along the dims of the others; no two alike that channels lie along
_FAR = 100.0  # synthetic weights lie far from zero, so that a copy of them is no sum of gradients
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size,
          FunctionType, BuiltinFunctionType)  # fmt: skip


def check_optimizers(optimizers: Iterable[Optimizer], model: nn.Module) -> None:
    """Refuse optimizers whose state for the model's parameters has no rule. Parameters of other models are left alone.

    Args:
        optimizers: the optimizers that hold the model's parameters.
        model: the model.

    Raises:
        ArgumentError: something that is no torch.optim.Optimizer.
        UnsupportedOptimizerError: LBFGS and its like, tensors outside of the state, or a state entry (there, or made by
            a dry run) with neither the parameter's shape nor a rule of its own.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> check_optimizers([torch.optim.Adam(net.parameters())], net)
    """
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise ArgumentError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer.")
        members = parameters_of(optimizer)
        held = [p for p in members if id(p) in names]
        if not held:
            continue
        for layer in layers(optimizer):
            check_class(layer)
        check_class(optimizer)
        check_kept(optimizer, names)
        _try(optimizer, names)
        for layer in layers(optimizer):
            for p in held:
                for key, value in layer.state.get(p, {}).items():
                    rule_of(layer, names[id(p)], p, key, value)


def _try(optimizer: Optimizer, names: Mapping[int, str]) -> None:
    """Learn by a dry run how the state of an optimizer without a table follows, once.

    Raises: UnsupportedOptimizerError: state without a rule, or a step that fails after channels went.
    """
    outer = inner_optimizer(optimizer)
    found = tuple(dict.fromkeys((*layers(optimizer), outer)))
    if all(_known(layer) or layer in LEARNT for layer in found):
        return
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return  # a step may exchange what others do not wait for
    shapes = _sampled(outer, names)
    with _without_trace(shapes):
        try:
            trial = _Trial(outer, shapes)
            trial.steps()
        except Exception:  # noqa: BLE001  # it may need what is not there (a model, a device): then nothing is learnt
            LEARNT.update({layer: {} for layer in found})
            return
        for layer, copied in zip(layers(optimizer), layers(trial.optimizer), strict=True):
            learnt = _learnt(copied, trial)
            LEARNT[layer] = LEARNT[copied] = learnt
        LEARNT.setdefault(outer, {})
        try:
            trial.check_rules(names)
            trial.cut()
            trial.steps()
        except UnsupportedOptimizerError:
            _forget(found)
            raise
        except Exception as error:
            _forget(found)
            if not _runs_uncut(outer, shapes):
                LEARNT.update({layer: {} for layer in found})
                return
            line = (str(error).strip().splitlines() or [""])[0]
            raise UnsupportedOptimizerError(
                f"{type(optimizer).__name__} cannot follow a shrinking network: in a dry run on a copy, a step after "
                f"parameters lost channels ends in {type(error).__name__}: {line}. It keeps something of the old shape "
                "outside of its state. Use an optimizer that keeps its tensors in `state[parameter]`."
            ) from error


def _known(optimizer: Optimizer) -> bool:
    """Whether a class has its table, or passes everything on to an optimizer inside."""
    return type(optimizer).__module__.startswith(("torch.optim", "torch.distributed", "accelerate."))


def _forget(optimizers: Iterable[Optimizer]) -> None:
    for optimizer in optimizers:
        LEARNT.pop(optimizer, None)


def _sampled(optimizer: Optimizer, names: Mapping[int, str]) -> dict[int, tuple[Tensor, tuple[int, ...]]]:
    """Choose parameters that stand for all, at most three per group and number of dims: id -> (parameter, shape)."""
    found: dict[int, tuple[Tensor, tuple[int, ...]]] = {}
    largest: dict[int, Tensor] = {}
    for group in optimizer.param_groups:
        count: dict[int, int] = defaultdict(int)
        for p in group["params"]:
            if id(p) not in names or p.is_sparse or not p.is_floating_point():
                continue
            if p.ndim not in largest or p.numel() > largest[p.ndim].numel():
                largest[p.ndim] = p
            if count[p.ndim] < 2 and p.ndim <= len(_SIZES[0]):
                found[id(p)] = (p, _SIZES[count[p.ndim]][: p.ndim])
                count[p.ndim] += 1
    for p in largest.values():
        sizes: list[int] = []
        for dim, size in enumerate(p.shape):
            size = min(size, _WIDE) if dim < 2 else min(size, 7)
            while size in sizes and size > 1:
                size -= 1
            sizes.append(size)
        if id(p) not in found or max(sizes, default=0) > 32:
            found[id(p)] = (p, tuple(sizes))
    return found


@contextmanager
def _without_trace(shapes: Mapping[int, tuple[Tensor, tuple[int, ...]]]) -> Iterator[None]:
    """Leave random generators and the user's hooks on all optimizers' steps alone, and print nothing."""
    states = random_states(p.device for p, _ in shapes.values())
    hooks = [table for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
             if isinstance(table := getattr(torch_optimizer, name, None), dict)]  # fmt: skip
    kept = [dict(table) for table in hooks]

    def undo() -> None:
        for table, entries in zip(hooks, kept, strict=True):
            table.update(entries)
        for state in states:
            state.restore()

    with restoring(undo), marked_internal(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for table in hooks:
            table.clear()
        yield


class _Trial:
    """A copy of an optimizer over synthetic parameters."""

    def __init__(self, optimizer: Optimizer, shapes: Mapping[int, tuple[Tensor, tuple[int, ...]]]) -> None:
        self._random = torch.Generator("cpu").manual_seed(0)
        self.parameters = {number: self._synthetic(p, shape) for number, (p, shape) in shapes.items()}
        self.first = {number: p.detach().clone() for number, p in self.parameters.items()}
        self.originals = {number: p for number, (p, _) in shapes.items()}
        filled = any(layer.state for layer in layers(optimizer))  # as it was made (slow weights, masks), or trained
        for number, empty in enumerate(tries := [False, True] if filled else [True]):
            try:
                self.optimizer = _Copier(self.parameters, self.originals, empty=empty).optimizer(optimizer)
                self._call = self._runs()
            except Exception:  # the user's optimizer may raise anything
                if number + 1 == len(tries):
                    raise
            else:
                break

    def _synthetic(self, like: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
        far = torch.rand(shape, generator=self._random, dtype=torch.float32, device="cpu") * _FAR + _FAR
        return nn.Parameter(far.to(like.device, like.dtype), requires_grad=like.requires_grad)

    def _gradients(self) -> None:
        for p in self.parameters.values():
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=self._random, dtype=torch.float32, device="cpu").to(p)

    def _closure(self) -> Tensor:
        self._gradients()
        return torch.ones((), dtype=torch.float32, device="cpu")

    def _runs(self) -> Callable[[], object]:
        """Return the way of calling step() that works, having made one step."""
        optimizer: Any = self.optimizer
        step = type(optimizer).step
        ways: list[Callable[[], object]] = [lambda: step(optimizer), lambda: step(optimizer, self._closure)]
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()
        for number, way in enumerate(ways):
            self._gradients()
            try:
                way()
            except Exception:  # the user's optimizer may raise anything
                if number + 1 == len(ways):
                    raise
            else:
                return way
        raise AssertionError("there is always a way")

    def steps(self) -> None:
        for _ in range(_STEPS):
            self._gradients()
            self._call()

    def check_rules(self, names: Mapping[int, str]) -> None:
        """Raise for state that has no rule, and for tensors outside of it."""
        check_kept(self.optimizer, {id(p): names[number] for number, p in self.parameters.items()})
        for copied in layers(self.optimizer):
            for number, p in self.parameters.items():
                for key, value in copied.state.get(p, {}).items():
                    rule_of(copied, names[number], p, key, value, " (a small copy, in a dry run)")

    def cut(self) -> None:
        """Let every parameter lose a channel along its first two dims, and the state follow."""
        named = {str(number): p for number, p in self.parameters.items()}
        edits = {}
        for name, p in named.items():
            keep = {dim: torch.arange(1, size, device="cpu") for dim, size in enumerate(p.shape[:2]) if size > 1}
            if keep:
                edits[name] = TensorEdit(tensor=name, keep=keep)
        changes = state_changes(self.optimizer, named, edits)
        with torch.no_grad():
            for name, edit in edits.items():
                p, value = named[name], named[name].detach()
                for dim, kept in edit.keep.items():
                    value = value.index_select(dim, kept.to(p.device))
                p.grad = None
                p.set_(value)  # type: ignore[call-overload]  # torch's stub knows storages alone
        for change in changes:
            change.state[change.key] = change.value


def _runs_uncut(optimizer: Optimizer, shapes: Mapping[int, tuple[Tensor, tuple[int, ...]]]) -> bool:
    """Whether the same steps go well where nothing is cut: else the optimizer fails for another reason."""
    try:
        trial = _Trial(optimizer, shapes)
        trial.steps()
        trial.steps()
    except Exception:  # noqa: BLE001  # as above
        return False
    return True


def _learnt(optimizer: Optimizer, trial: _Trial) -> Learnt:
    """Say how the state of a copy follows its synthetic parameters, whose dims all differ in size."""
    seen: dict[tuple[str, int], list[tuple[tuple[int, ...], tuple[int, ...]]]] = defaultdict(list)
    copies: dict[tuple[str, int], bool] = {}
    for number, p in trial.parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            if not isinstance(value, Tensor) or not isinstance(key, str):
                continue
            entry = (key, p.ndim)
            if tuple(value.shape) in (tuple(p.shape), (p.numel(),)) and value.numel() > 1:
                value = value.reshape(p.shape)
                copies[entry] = copies.get(entry, True) and _is_copy(value, p, trial.first[number])
            elif value.numel() > 1 or value.ndim > 1:
                seen[entry].append((tuple(value.shape), tuple(p.shape)))
    found: Learnt = {entry: "value" for entry, all_copies in copies.items() if all_copies}
    for entry, pairs in seen.items():
        ways: set[Layout] = set(layouts(*pairs[0]))
        for pair in pairs[1:]:
            ways &= set(layouts(*pair))
        if len(ways) == 1:
            found[entry] = ways.pop()
        elif len({state for state, _ in pairs}) == 1 and len({shape for _, shape in pairs}) > 1:
            found[entry] = "fixed"
    return found


def _is_copy(value: Tensor, *of: Tensor) -> bool:
    if not value.is_floating_point():
        return False
    return any(bool(((value - p.detach()).abs() <= 0.1 * p.detach().abs()).all()) for p in of)


class _Copier:
    """Copies an optimizer with everything it holds, its parameters exchanged for synthetic ones."""

    def __init__(self, parameters: Mapping[int, Tensor], originals: Mapping[int, Tensor], *, empty: bool) -> None:
        self._parameters, self._originals, self._empty = parameters, originals, empty
        self._done: dict[int, Any] = {}
        self._alive: list[Any] = []  # whose ids are taken

    def copied(self, value: Any) -> Any:
        if isinstance(value, _PLAIN):
            return value
        if id(value) in self._parameters:
            return self._parameters[id(value)]
        if id(value) in self._done:
            return self._done[id(value)]
        self._alive.append(value)
        if isinstance(value, Optimizer):
            return self.optimizer(value)
        if isinstance(value, MethodType) and isinstance(value.__self__, Optimizer):
            return MethodType(value.__func__, self.copied(value.__self__))
        if isinstance(value, Tensor):
            found: Any = value.detach().clone()
        elif isinstance(value, nn.Module) and next(value.parameters(), None) is not None:
            raise TypeError("it holds a network")
        elif isinstance(value, dict):
            return self._dictionary(value)
        elif isinstance(value, list | tuple | set) and type(value) in (list, tuple, set):
            found = type(value)(self.copied(item) for item in self._members(value))
        else:
            found = copy.deepcopy(value)
        self._done[id(value)] = found
        return found

    def _members(self, items: Any) -> Iterator[Any]:
        """Leave out the model's parameters that have no counterpart."""
        return (item for item in items if not isinstance(item, nn.Parameter) or id(item) in self._parameters)

    def _dictionary(self, value: dict[Any, Any]) -> dict[Any, Any]:
        found: dict[Any, Any] = copy.copy(value)
        self._done[id(value)] = found
        found.clear()
        params = value.get("params")
        for key, item in value.items():
            if isinstance(key, nn.Parameter):
                if id(key) in self._parameters and not self._empty:
                    found[self._parameters[id(key)]] = self._state(item, key)
                continue
            if isinstance(item, list) and isinstance(params, list) and len(item) == len(params) and key != "params":
                item = [own for own, p in zip(item, params, strict=True) if id(p) in self._parameters]
            found[key] = self.copied(item)
        return found

    def _state(self, entries: Any, p: Tensor) -> Any:
        """Return the state of a parameter for its counterpart: copies of it are copies, other tensors begin at zero."""
        if not isinstance(entries, dict):
            raise TypeError("its state is no dictionary")
        synthetic = self._parameters[id(p)].detach()
        found: dict[Any, Any] = {}
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.numel() > 1:
                found[key] = synthetic.clone() if _is_copy(value, p) else torch.zeros_like(synthetic, dtype=value.dtype)
            elif isinstance(value, Tensor) and value.numel() > 1:
                raise TypeError("its state has another shape than the parameter")  # which cannot be made anew
            else:
                found[key] = self.copied(value)
        return found

    def optimizer(self, value: Optimizer) -> Optimizer:
        found: Any = object.__new__(type(value))
        self._done[id(value)] = found
        for name, item in vars(value).items():
            if name == "step":
                continue  # a scheduler's wrapper around the user's own
            if name.startswith("_optimizer_") and name.endswith("_hooks"):
                vars(found)[name] = OrderedDict()
            else:
                vars(found)[name] = self.copied(item)
        copied: Optimizer = found
        return copied
