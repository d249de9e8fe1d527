"""What the training loop does otherwise when several processes train one network.

Lives here: each process's rows, the seeds of its dropout, and the vote on stopping. Does not live here: the steps
(loop), the processes themselves (apoptosis.launch).
"""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor

from apoptosis.errors import ArgumentError
from apoptosis.launch import Group
from apoptosis.recipes.interrupt import Interrupt

# All stop after the same step. They vote whether to about this often, for a vote waits for all of them.
VOTE_SECONDS = 0.2
INTERRUPT_GRACE = 2.0  # seconds; torchrun and mpirun pass on a signal that the terminal has sent to all
MOST_STEPS_BETWEEN_VOTES = 1000
_SEED_STRIDE = 2_000_003  # between the seeds of two ranks; even seeds order rows, so that none of these does


def batch_share(group: Group, batch: int) -> slice:
    """Return which rows of a batch are this rank's.

    Raises: ArgumentError: some rank has fewer than two (BatchNorm needs them).
    """
    if group.size > 1 and batch < 2 * group.size:
        raise ArgumentError(
            f"--batch: {batch} rows per step are too few for {group.size} processes, each of which needs 2."
        )
    return group.share(batch)


def probe_share(group: Group, rows: int) -> tuple[int, int]:
    """Return where this rank's probe rows begin and end: equal shares, of which limits speak; a rest is left out.

    Raises: ArgumentError: fewer rows than ranks.
    """
    own = rows // group.size
    if rows and not own:
        raise ArgumentError(f"--probe-rows: {rows} rows cannot be shared out over {group.size} processes.")
    return group.rank * own, (group.rank + 1) * own


def rank_seed(group: Group, seed: int) -> int:
    """Return a seed of this rank's own, so that ranks drop other units; rank 0 keeps the seed."""
    return seed + 2 * group.rank * _SEED_STRIDE


def own_random_state(group: Group, states: Tensor) -> Tensor | None:
    """Pick this rank's random state from a checkpoint; None where another number of processes wrote it."""
    if states.dim() == 1:
        return states if group.size == 1 else None
    # A copy, for torch.set_rng_state reads from the beginning of the storage.
    return states[group.rank].clone() if len(states) == group.size > 1 else None


def threads_of_one(processes: int) -> int:
    """Return how many threads one of several processes of this machine may use: its share of the cores."""
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    bound = usable < cores  # the launcher has shared them out already
    return max(1, usable if bound else usable // processes)


class StopVote:
    """Whether to stop after this step, because one of the processes was interrupted."""

    def __init__(self, group: Group, interrupt: Interrupt) -> None:
        self._group, self._interrupt = group, interrupt
        self._next, self._last = 0, (0, 0.0)

    def now(self) -> bool:
        """Ask all processes, which all call this."""
        return self._group.ranks.any(self._interrupt.requested)

    def after(self, step: int) -> bool:
        """Ask after a step; of several processes a few times a second, and after the same steps on all."""
        if self._group.size == 1:
            return self._interrupt.requested
        if step < self._next:
            return False
        before, began = self._last
        took = (time.perf_counter() - began) / max(1, step - before)
        told = torch.tensor([float(self._interrupt.requested), took / self._group.size], dtype=torch.float64)
        asked, seconds = self._group.ranks.total(told).tolist()
        pause = min(MOST_STEPS_BETWEEN_VOTES, int(VOTE_SECONDS / max(seconds, 1e-9)))
        self._next, self._last = step + max(1, pause), (step, time.perf_counter())
        return bool(asked)
