"""ZeroRedundancyOptimizer: every rank holds the state of its own share of the parameters, in an optimizer inside.

Holds: where the state is, what is refused, setting up buckets for new shapes. Elsewhere: how state follows an edit
(surgery.optimizers), which is the same as for the optimizer inside.

Which rank holds which parameter stays as it was for the full widths: no state travels at an event.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from apoptosis.distributed.protocol import Layout, Wrapper, is_named, register_wrapper
from apoptosis.errors import CheckpointError, UnsupportedOptimizerError


class _ZeroRedundancy(Wrapper):
    """ZeroRedundancyOptimizer around an optimizer."""

    name = "ZeroRedundancyOptimizer"

    def matches(self, candidate: object) -> bool:
        return is_named(candidate, "ZeroRedundancyOptimizer", "torch.distributed")

    def unwrap(self, wrapped: Any) -> Any:
        if wrapped._overlap_with_ddp:
            raise UnsupportedOptimizerError(
                "ZeroRedundancyOptimizer with overlap_with_ddp=True steps inside of DistributedDataParallel's buckets, "
                "by a functional optimizer without state that could follow. Leave overlap_with_ddp= out."
            )
        return wrapped.optim

    def check_ranks(self, wrapped: Any, size: int) -> None:
        world = int(getattr(wrapped, "world_size", 1))
        if world not in (1, size):  # it would spread parameters to ranks that remove other channels
            raise UnsupportedOptimizerError(
                f"ZeroRedundancyOptimizer steps over {world} processes, and the model is trained by {size} together. "
                "Wrap the model in DistributedDataParallel over the same processes, and give apoptosis the wrapped one."
            )

    def rebuild(self, wrapped: Any, layout: Layout | None = None) -> None:
        wrapped._build_param_buckets()  # does nothing without parameters_as_bucket_view
        wrapped._all_state_dicts = []  # of the old widths

    def full_state(self, wrapped: Any) -> Mapping[Tensor, Mapping[str, Any]]:
        if not wrapped._all_state_dicts:
            raise CheckpointError(
                "cannot save ZeroRedundancyOptimizer: every rank holds a part of its state. Call "
                "optimizer.consolidate_state_dict() on all ranks before, and save on the rank that it names (0)."
            )
        parameters = [p for group in wrapped.param_groups for p in group["params"]]
        return {parameters[index]: entries for index, entries in wrapped.state_dict()["state"].items()}


register_wrapper(_ZeroRedundancy())
