"""ZeroRedundancyOptimizer: every rank holds the state of its own share of the parameters, in an optimizer inside.

Holds: where the state is, what is refused, setting up buckets for new shapes. Elsewhere: how state
follows an edit (optimizers.py), which is the same as for the optimizer inside.

Which rank holds which parameter stays as it was for the full widths: no state travels at an event.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from apoptosis.errors import CheckpointError, UnsupportedOptimizerError


def is_redundant(optimizer: object) -> bool:
    """Whether it is a ZeroRedundancyOptimizer. Known by name: nothing of torch is loaded that the user has not."""
    return any(
        c.__name__ == "ZeroRedundancyOptimizer" and c.__module__.startswith("torch.distributed")
        for c in type(optimizer).__mro__
    )


def inside(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that holds this rank's state: the one inside a ZeroRedundancyOptimizer, else itself.

    Raises: UnsupportedOptimizerError: overlap_with_ddp, which has none.
    """
    if not is_redundant(optimizer):
        return optimizer
    outer: Any = optimizer
    if outer._overlap_with_ddp:
        raise UnsupportedOptimizerError(
            "ZeroRedundancyOptimizer with overlap_with_ddp=True steps inside of DistributedDataParallel's buckets, by "
            "a functional optimizer without state that could follow. Leave overlap_with_ddp= out."
        )
    found: Optimizer = outer.optim
    return found


def check_together(optimizers: Iterable[Optimizer], size: int) -> None:
    """Refuse a ZeroRedundancyOptimizer of several processes where events are those of other ones.

    Args: size: number of ranks that shrink the network together.

    Raises: UnsupportedOptimizerError: it would spread one rank's parameters to ranks that remove other channels.
    """
    for optimizer in optimizers:
        world = int(getattr(optimizer, "world_size", 1)) if is_redundant(optimizer) else 1
        if world not in (1, size):
            raise UnsupportedOptimizerError(
                f"ZeroRedundancyOptimizer steps over {world} processes, and the model is trained by {size} together. "
                "Wrap the model in DistributedDataParallel over the same processes, and give apoptosis the wrapped one."
            )


def whole_state(optimizer: Optimizer) -> Mapping[Tensor, Mapping[str, Any]]:
    """Return the state of all parameters, of a ZeroRedundancyOptimizer as it was consolidated.

    Raises: CheckpointError: it was not since the widths changed.
    """
    if not is_redundant(optimizer):
        return optimizer.state
    outer: Any = optimizer
    if not outer._all_state_dicts:
        raise CheckpointError(
            "cannot save ZeroRedundancyOptimizer: every rank holds a part of its state. Call "
            "optimizer.consolidate_state_dict() on all ranks before, and save on the rank that it names (0)."
        )
    held = [p for group in outer.param_groups for p in group["params"]]
    return {held[index]: entries for index, entries in outer.state_dict()["state"].items()}


def rebuild_buckets(optimizers: Iterable[Optimizer]) -> None:
    """Let ZeroRedundancyOptimizers set up their buckets for the shapes that the parameters have now."""
    for optimizer in optimizers:
        if is_redundant(optimizer):
            outer: Any = optimizer
            outer._build_param_buckets()  # does nothing without parameters_as_bucket_view
            outer._all_state_dicts = []  # of the old widths
