"""Everything that holds on to parameters is set up anew after their tensors were exchanged.

Holds: the one call for wrappers, sharded parameters and sharded optimizers together. Elsewhere: each of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from apoptosis.distributed.fsdp import reset_fsdp_state
from apoptosis.distributed.wrappers import rebuild
from apoptosis.distributed.zero import rebuild_buckets


def rebuild_wrappers(wrappers: Iterable[nn.Module], model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Let wrappers and sharded optimizers take the tensors as they are now.

    A tensor that got another storage has lost DistributedDataParallel's listener, whatever its shape: also where a
    rollback gave it back its own.

    Args: wrappers: the DistributedDataParallel modules around the model.
    """
    for wrapper in wrappers:
        rebuild(wrapper)
    reset_fsdp_state(model)
    rebuild_buckets(optimizers)
