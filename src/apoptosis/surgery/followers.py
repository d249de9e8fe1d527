"""Averages of a model that are kept as bare tensors: a dict by name, a list in the order of the parameters.

Lives here: reading them off what a user hands over, and showing them as modules, which surgery edits. Does not live
here: the edits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from apoptosis.errors import ArgumentError
from apoptosis.unwrap import bare

_KINDS = "an AveragedModel or a copy of the model, a dict of its tensors by name, or a list of them in order"
_INSIDE = ("ema_model", "module", "averaged_model", "ema", "average_model", "_average_model")  # of several libraries
_LISTS = ("shadow_params", "shadow")  # torch-ema's and diffusers', and what many write themselves


class Tensors(nn.Module):
    """An average that is a dict or a list. It is read anew whenever it is asked for, since updates may replace entries.

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
                f"a follower is a list of {len(found)} tensors, and the model has {len(self._orders[0])} parameters."
            )
        return dict(zip(order, found, strict=True))

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


def as_follower(averaged: Any, model: nn.Module) -> nn.Module:
    """Return what follows a model as a module: the copy itself, one that it holds, or its tensors.

    Raises: ArgumentError: nothing in it can follow.
    """
    if isinstance(averaged, nn.Module):
        names = {name for name, _ in model.named_parameters()}
        inner = [getattr(averaged, name, None) for name in ("", *_INSIDE) if name]
        for copy in (averaged, *inner):
            if isinstance(copy, nn.Module):
                whole = bare(copy)
                held = whole.module if isinstance(whole, AveragedModel) else whole
                if names <= {name for name, _ in held.named_parameters()}:
                    return whole
        return bare(averaged)
    for name in _INSIDE:
        if isinstance(copy := getattr(averaged, name, None), nn.Module):
            return as_follower(copy, model)
    read = _reader(averaged)
    if read is None:
        raise ArgumentError(f"a follower is {_KINDS}, not a {type(averaged).__name__}.")
    follower = Tensors(read, model)
    if not follower.named():
        raise ArgumentError(
            f"a follower is {_KINDS}; this {type(averaged).__name__} holds none of the model's tensors."
        )
    return follower


def _reader(averaged: Any) -> Callable[[], Any] | None:
    if _holds_tensors(averaged):
        return lambda: averaged
    name = next((name for name in _LISTS if _holds_tensors(getattr(averaged, name, None))), None)
    return None if name is None else lambda: getattr(averaged, name)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(isinstance(x, Tensor) for x in value.values())
    return isinstance(value, Sequence) and bool(value) and all(isinstance(x, Tensor) for x in value)
