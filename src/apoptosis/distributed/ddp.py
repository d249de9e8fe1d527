"""Helpers for training loops of several processes.

Holds: setting DistributedDataParallel up again for new shapes, looking inside wrappers. Elsewhere: how
ranks talk (ranks), which wrappers there are (wrappers).

`Apoptosis` and `load` do this by themselves; it is for shapes that were changed by other means.
"""

from __future__ import annotations

from torch import nn

from apoptosis.distributed.wrappers import Unwrapped, rebuild, unwrap
from apoptosis.errors import ArgumentError

__all__ = ["Unwrapped", "rebuild_ddp", "unwrap"]


def rebuild_ddp(model: nn.Module) -> None:
    """Let DistributedDataParallel set up its gradient buffers for the shapes that its module has now, in place.

    The wrapper stays the same object, so that the user's variable, and a Join context or hooks that hold it, stay
    valid; communication hooks are registered again with their state. Call it on every rank of its group, between an
    optimizer step and the next forward pass; nothing is exchanged.

    Args: model: DistributedDataParallel, also under or over torch.compile.

    Raises: ArgumentError: the model has no such wrapper, or one with something that would be lost (built-in
    communication hooks, PowerSGD's state). Nothing has changed then.

    Example:
        >>> import tempfile, torch, torch.distributed as dist
        >>> from torch.nn.parallel import DistributedDataParallel
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = dist.FileStore(f"{folder}/store", 1)
        ...     dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        ...     model = DistributedDataParallel(net)
        ...     net[0], net[2] = nn.Linear(2, 3), nn.Linear(3, 1)
        ...     rebuild_ddp(model)
        ...     model(torch.ones(4, 2)).sum().backward()
        ...     dist.destroy_process_group()
        >>> net[2].weight.grad.shape
        torch.Size([1, 3])
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"rebuild_ddp: model is a {type(model).__name__}, not a torch.nn.Module.")
    wrappers = unwrap(model).parallel
    if not wrappers:
        raise ArgumentError(f"rebuild_ddp: {type(model).__name__} is not in DistributedDataParallel; give the wrapper.")
    for wrapper in wrappers:
        rebuild(wrapper)
