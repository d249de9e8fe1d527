"""Sharded tensors, of whatever kind: gathered, spread again, exchanged under their identity.

Holds: what the other packages ask of all kinds of wrappers about tensors of which every rank holds a part.
Elsewhere: the kinds (fsdp.py), wrappers around modules (wrappers.py).

Gathering is collective: all ranks call it in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apoptosis.distributed.protocol import kind_of_tensor, kinds, kinds_in_place
from apoptosis.errors import RankError
from apoptosis.interrupts import restoring


def is_sharded(tensor: object) -> bool:
    """Whether every rank holds a part of a tensor."""
    return any(kind.is_sharded(tensor) for kind in kinds())


def has_shards(model: nn.Module) -> bool:
    """Whether some parameter of the model is sharded."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor in full on every rank; other tensors as they are.

    Raises: RankError: another rank is gone.
    """
    try:
        with torch.no_grad():
            return kind_of_tensor(tensor).full_tensor(tensor)
    except RuntimeError as error:
        raise RankError(f"lost another rank while a parameter was gathered: {str(error).splitlines()[0]}") from error


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Spread a full tensor as `like` is spread; only the rank's own part stays in memory. Other tensors as they are."""
    return kind_of_tensor(like).shard_like(value, like)


class FullTensors(Mapping[str, Tensor]):
    """Tensors by name, each gathered when it is asked for and not kept."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return full_tensor(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def reshard(model: nn.Module) -> None:
    """Let parameters that a pass has left gathered be sharded again: one without a backward pass may leave some."""
    for kind in kinds_in_place():
        kind.reshard(model)


@contextmanager
def unsharded_forward(model: nn.Module) -> Iterator[None]:
    """Let the library's own passes find full, plain parameters. Models without sharded parameters are left alone."""
    with ExitStack() as stack:
        for kind in kinds_in_place():
            stack.enter_context(kind.unsharded_forward(model))
        yield


@contextmanager
def summon_full_params(model: nn.Module, names: Iterable[str], *, keep: bool = True) -> Iterator[None]:
    """Put full, plain parameters of these names in the place of sharded ones.

    Args: keep: False on ranks that only take part in the gathering, and hold nothing of it.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    wanted = [name for name in dict.fromkeys(names) if name in tensors and is_sharded(tensors[name])]
    places: list[tuple[nn.Module, str, Any]] = []

    def undo() -> None:
        for module, leaf, parameter in places:
            module._parameters[leaf] = parameter

    with restoring(undo):
        for name in wanted:
            path, _, leaf = name.rpartition(".")
            full = full_tensor(tensors[name])
            if keep:
                module = model.get_submodule(path)
                places.append((module, leaf, module._parameters[leaf]))
                module._parameters[leaf] = nn.Parameter(full, requires_grad=False)
            del full
        yield
