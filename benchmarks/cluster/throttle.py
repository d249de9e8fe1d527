"""A communication hook that takes as long as links of a given rate would, where the machine has none to bound.

Holds: the real sum, and the sleep after it. Elsewhere: links that are bounded (links.py).
"""

# No `from __future__ import annotations`: DistributedDataParallel compares the hook's annotations with classes.
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from apoptosis.distributed.ranks import Ranks
from apoptosis.tools.launch.mpi import MpiRanks


def ring_seconds(tensor: Tensor, size: int, rate: float) -> float:
    """Seconds in which a ring all-reduce of `size` ranks sends its bytes at `rate` bits per second.

    >>> ring_seconds(torch.zeros(1_000_000), 4, 1e8)
    0.48
    """
    return 2 * (size - 1) / size * tensor.numel() * tensor.element_size() * 8 / rate


def throttled(state: tuple[float, Ranks], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average the gradients, and take as long as a ring over links of this rate would at least."""
    rate, ranks = state
    buffer = bucket.buffer()

    def late(done: torch.futures.Future[Any]) -> Tensor:
        done.value()  # raises where the sum failed
        time.sleep(ring_seconds(buffer, ranks.size, rate))
        return buffer

    if isinstance(ranks, MpiRanks):
        return ranks.average(buffer).then(late)
    return dist.all_reduce(buffer.div_(ranks.size), async_op=True).get_future().then(late)
