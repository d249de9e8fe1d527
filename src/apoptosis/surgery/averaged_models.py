"""Averaged copies of a model: modules, and bare tensors in a dict by name or a list in the order of the parameters.

Holds: finding the copy in what `apo.follow` was given, checking it, showing bare tensors as modules, which surgery
edits, and the warning about an AveragedModel that `apo.follow` was not given. Elsewhere: the edits.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from apoptosis.distributed.wrappers import unwrapped
from apoptosis.errors import ArgumentError
from apoptosis.numerics.alike import alike

_KINDS = "an AveragedModel or a copy of the model, a dict of its tensors by name, or a list of them in order"
_INSIDE = ("ema_model", "module", "averaged_model", "ema", "average_model", "_average_model")  # of several libraries
_COPY = "Its shapes, or the model's, were changed outside of apoptosis; give a copy of the model as it is now."
_LISTS = ("shadow_params", "shadow")  # torch-ema's and diffusers', and what many write themselves


class Tensors(nn.Module):
    """An average that is a dict or a list. It is read every time, since updates may replace entries.

    Args:
        read: returns the dict or the list.
        model: whose names its entries have: of all its parameters, or of those that require a gradient.
    """

    def __init__(self, read: Callable[[], Any], model: nn.Module) -> None:
        super().__init__()
        self._read = read
        parameters = dict(model.named_parameters())
        self._orders = [list(parameters), [name for name, p in parameters.items() if p.requires_grad]]
        self._known = {*parameters, *(name for name, _ in model.named_buffers())}

    def named(self) -> dict[str, Tensor]:
        """Return its tensors by name.

        Raises: ArgumentError: a list of another length than that of the parameters.
        """
        found = self._read()
        if isinstance(found, Mapping):
            return {name: x for name, x in found.items() if name in self._known and isinstance(x, Tensor)}
        order = next((names for names in self._orders if len(names) == len(found)), None)
        if order is None:
            raise ArgumentError(
                f"an averaged copy is a list of {len(found)} tensors, but the model has {len(self._orders[0])} "
                "parameters."
            )
        return dict(zip(order, found, strict=True))

    def keep_(self, put: Callable[[Any, Any], None], gone: frozenset[str], new: Mapping[str, Tensor]) -> None:
        """Drop the entries of some names and add others, in place.

        Args:
            put: called with the dict or list, and what it is to hold.
            gone: names that go.
            new: by name, what is added; of a list in the place of the parameter in front of it.

        Raises: ArgumentError: it is a sequence that cannot be changed.
        """
        found, named = self._read(), self.named()
        if isinstance(found, MutableMapping):
            put(found, {name: x for name, x in found.items() if name not in gone} | dict(new))
            return
        if not isinstance(found, list):
            raise ArgumentError(f"an averaged copy is a {type(found).__name__}, from which no entry can be removed.")
        order = [name for name in named if name not in gone]
        for name in new:
            home = name.rpartition(".")[0]
            before = [place for place, other in enumerate(list(named)) if other.rpartition(".")[0] == home]
            kept = [other for other in list(named)[: before[-1] + 1] if other in order] if before else order
            order.insert(len(kept), name)
        put(found, [new[name] if name in new else named[name] for name in order])
        self._orders.append(order)
        self._known |= set(new)

    def as_module(self) -> nn.Module:
        """Return a module that holds the same tensors under the model's names."""
        root = nn.Module()
        for name, tensor in self.named().items():
            *path, leaf = name.split(".")
            home = root
            for step in path:
                if step not in home._modules:
                    home._modules[step] = nn.Module()
                inner = home._modules[step]
                home = home if inner is None else inner
            home._buffers[leaf] = tensor
        return root


def as_averaged_model(averaged: Any, model: nn.Module) -> nn.Module:
    """Return an averaged copy of a model as a module: the copy itself, one that it holds, or its tensors.

    Raises: ArgumentError: there is none in it.
    """
    if isinstance(averaged, nn.Module):
        names = {name for name, _ in model.named_parameters()}
        inner = [getattr(averaged, name, None) for name in ("", *_INSIDE) if name]
        for copy in (averaged, *inner):
            if isinstance(copy, nn.Module):
                whole = unwrapped(copy)
                held = whole.module if isinstance(whole, AveragedModel) else whole
                if names <= {name for name, _ in held.named_parameters()}:
                    return whole
        return unwrapped(averaged)
    for name in _INSIDE:
        if isinstance(copy := getattr(averaged, name, None), nn.Module):
            return as_averaged_model(copy, model)
    read = _reader(averaged)
    if read is None:
        raise ArgumentError(f"an averaged copy is {_KINDS}, not a {type(averaged).__name__}.")
    tensors = Tensors(read, model)
    if not tensors.named():
        raise ArgumentError(
            f"an averaged copy is {_KINDS}; this {type(averaged).__name__} holds none of the model's tensors."
        )
    return tensors


def _reader(averaged: Any) -> Callable[[], Any] | None:
    if _holds_tensors(averaged):
        return lambda: averaged
    name = next((name for name in _LISTS if _holds_tensors(getattr(averaged, name, None))), None)
    return None if name is None else lambda: getattr(averaged, name)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(isinstance(x, Tensor) for x in value.values())
    return isinstance(value, Sequence) and bool(value) and all(isinstance(x, Tensor) for x in value)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """List every parameter and buffer by qualified name: tied ones under each name, non-persistent ones too."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def check_averaged_models(averaged_models: Iterable[nn.Module], model: nn.Module, remedy: str = _COPY) -> None:
    """Refuse averaged copies that are none: each needs the model's tensor names and shapes.

    remedy: what to do where shapes differ.

    Raises: ArgumentError: with the first name that differs.
    """
    mine = named_tensors(model)
    for averaged in averaged_models:
        if not isinstance(averaged, nn.Module):
            raise ArgumentError(f"an averaged copy is an AveragedModel or a copy of the model, not a {type(averaged)}.")
        _check_copy(averaged, mine, remedy)


def _check_copy(averaged: nn.Module, mine: Mapping[str, Tensor], remedy: str) -> None:
    theirs = named_tensors(copy_of(averaged))
    tensors_only = isinstance(averaged, Tensors)
    who = f"averaged copy: the {'list or dict' if tensors_only else type(averaged).__name__} given"
    for name, tensor in mine.items():
        if name not in theirs and tensors_only:  # which may hold the trained parameters alone
            continue
        if name not in theirs:
            raise ArgumentError(f"{who} is no copy of the model: it has no '{name}'.")
        if theirs[name].shape != tensor.shape:
            raise ArgumentError(
                f"{who} is no copy of the model: '{name}' has shape {tuple(theirs[name].shape)} "
                f"instead of {tuple(tensor.shape)}. {remedy}"
            )


def copy_of(averaged: nn.Module) -> nn.Module:
    """Return the module that holds the tensors of an averaged copy."""
    if isinstance(averaged, Tensors):
        return averaged.as_module()
    return averaged.module if isinstance(averaged, AveragedModel) else averaged


def warn_of_averages(model: nn.Module, averaged_models: Iterable[nn.Module]) -> None:
    """Warn where an AveragedModel of the process averages this model, and `apo.follow` was not given it."""
    known = {id(module) for whole in (model, *averaged_models) for module in whole.modules()}
    if not _averages_of(model, known):
        return
    gc.collect()  # one that is garbage already is no average
    if _averages_of(model, known):
        warnings.warn(
            "apoptosis: an AveragedModel averages this model and does not shrink with it, so that its first update "
            "after an event will fail. Call apo.follow(averaged) (for a callback of Lightning: apo.follow of its "
            "_average_model), or delete the AveragedModel.",
            RuntimeWarning,
            stacklevel=4,
        )


def _averages_of(model: nn.Module, known: set[int]) -> bool:
    mine = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    objects = gc.get_referrers(AveragedModel)  # instances among them: faster than looking through all objects
    found = [x for x in objects if type(x) is AveragedModel and id(x) not in known]
    for average in found:
        held = unwrapped(average)
        held = held.module if isinstance(held, AveragedModel) else held
        theirs = dict(held.named_parameters())
        like = (name in theirs and theirs[name].shape == p.shape and alike(theirs[name], p) for name, p in mine.items())
        if id(held) not in known and mine and all(like):
            return True
    return False
