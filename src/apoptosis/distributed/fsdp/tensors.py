"""What a sharded tensor (DTensor) is in full and back.

Holds: gathering one tensor, spreading it as another one is spread, exchanging its content under its identity.
Elsewhere: which tensors are gathered when (units.py).

Gathering is collective: all ranks call it in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apoptosis.errors import RankError


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor. Known by name: nothing of torch is loaded that the user has not loaded."""
    return type(tensor).__name__ == "DTensor"


def has_shards(model: nn.Module) -> bool:
    """Whether some parameter of the model is a DTensor."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return a DTensor in full on every rank; other tensors as they are.

    Raises: RankError: another rank is gone.
    """
    if not is_sharded(tensor):
        return tensor
    own: Any = tensor
    try:
        with torch.no_grad():
            found: Tensor = own.full_tensor()
            return found
    except RuntimeError as error:
        raise RankError(f"lost another rank while a parameter was gathered: {str(error).splitlines()[0]}") from error


def part(value: Tensor, like: Tensor) -> Tensor:
    """Spread a full tensor as `like` is spread; only the rank's own part stays in memory. Other tensors as they are."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

    own: Any = like
    placements = [Replicate() if isinstance(p, Partial) else p for p in own.placements]
    value = value.detach().contiguous()
    local = distribute_tensor(value, own.device_mesh, placements, src_data_rank=None).to_local().clone()
    found: Tensor = DTensor.from_local(
        local, own.device_mesh, placements, run_check=False, shape=value.shape, stride=value.stride()
    )
    return found


class Whole(Mapping[str, Tensor]):
    """Tensors by name, each gathered when it is asked for and not kept."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return whole(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def swap_local(tensor: Tensor, value: Tensor) -> None:
    """Give a DTensor the shape and content of another one, under its identity."""
    own, new = tensor, value
    own.data = new  # sizes and strides; the two below are attributes of the Python object
    for name in ("_local_tensor", "_spec"):
        setattr(own, name, getattr(new, name))
