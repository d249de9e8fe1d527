"""What the training loop does differently when several processes train one network.

Holds: each process's rows, the random state of its dropout, the buckets of its gradients, and the vote on
stopping. Elsewhere: the steps (loop), the processes themselves (apoptosis.tools.launch).
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apoptosis.distributed.wrappers import layouts_of, read_layouts, rebuild_wrappers, unwrapped, wrappers_of
from apoptosis.errors import ArgumentError
from apoptosis.tools.launch import Group
from apoptosis.tools.recipes.interrupt import Interrupt

# All stop after the same step. They vote whether to about this often, for a vote waits for all of them.
VOTE_SECONDS = 0.2
INTERRUPT_GRACE = 2.0  # seconds; torchrun and mpirun pass on a signal that the terminal has sent to all
MOST_STEPS_BETWEEN_VOTES = 1000
WINDOW_PATIENCE = 15.0  # seconds that an interrupt waits for a window's end; torchrun and Slurm kill after 30
# mpirun and srun kill their processes at the second interrupt
_LOST = "a second interrupt would lose what came after the last checkpoint"
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
    """Return where this rank's probe rows begin and end: equal shares, which limits assume; a rest is left out.

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


def random_state(device: torch.device) -> Tensor:
    """Return the state that dropout draws from; a copy."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return state.clone()


def begin_dropout(group: Group, device: torch.device, seed: int, first: int, state: Tensor | None) -> None:
    """Set the random state of an epoch at its step `first`.

    Args: state: of that step, None where the checkpoint is of another number of processes.
    """
    if not first or state is None:
        torch.manual_seed(rank_seed(group, seed) + 2 * first)
    elif device.type == "cuda":
        torch.cuda.set_rng_state(state.cpu(), device)
    else:
        torch.set_rng_state(state.cpu())


def threads_of_one(processes: int) -> int:
    """Return how many threads one of several processes of this machine may use: its share of the cores."""
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    bound = usable < cores  # the launcher has shared them out already
    return max(1, usable if bound else usable // processes)


def bucket_layouts(parallel: nn.Module) -> list[dict[str, Any] | None]:
    """Say in which buckets the gradients of a run without apoptosis are summed, for `take_layouts`."""
    return layouts_of(wrappers_of(parallel))


def take_layouts(parallel: nn.Module, layouts: Sequence[dict[str, Any] | None]) -> None:
    """Sum gradients in the buckets that a checkpoint holds, the same on all processes."""
    wrappers = wrappers_of(parallel)
    rebuild_wrappers(wrappers, unwrapped(parallel), layouts=read_layouts(wrappers, layouts))


class StopVote:
    """Whether to stop after this step, because one of the processes was interrupted.

    `watching`, the same on all processes, says that a checkpoint would lose the open window: stopping waits for its end
    then, WINDOW_PATIENCE at most, or until one of them is interrupted again.
    """

    def __init__(self, group: Group, interrupt: Interrupt) -> None:
        self._group, self._interrupt = group, interrupt
        self._next, self._last = 0, (0, 0.0)
        self._asked = False
        self._waits_since: float | None = None

    def now(self, *, watching: bool) -> bool:
        """Ask all processes, which all call this."""
        self._asked = self._asked or self._group.ranks.any(self._interrupt.requested)
        return self._asked and self._whole(watching)

    def after(self, step: int, *, watching: bool) -> bool:
        """Ask after a step; of several processes a few times a second, and after the same steps on all."""
        if self._group.size == 1:
            return self._interrupt.requested
        if self._asked:
            return self._whole(watching)
        if step < self._next:
            return False
        before, began = self._last
        took = (time.perf_counter() - began) / max(1, step - before)
        reported = torch.tensor(
            [float(self._interrupt.requested), took / self._group.size], dtype=torch.float64, device="cpu"
        )
        asked, seconds = self._group.ranks.total(reported).tolist()
        pause = min(MOST_STEPS_BETWEEN_VOTES, int(VOTE_SECONDS / max(seconds, 1e-9)))
        self._next, self._last = step + max(1, pause), (step, time.perf_counter())
        self._asked = bool(asked)
        return self._asked and self._whole(watching)

    def _whole(self, watching: bool) -> bool:
        """Whether a checkpoint holds all there is, or waiting for that has an end."""
        if not watching:
            return True
        if self._waits_since is None:
            self._waits_since = time.monotonic()
            again = "interrupt again to end it now" if self._group.launcher == "torchrun" else _LOST
            warnings.warn(
                "interrupted while a window is open, which a checkpoint of several processes does not hold: the run "
                f"ends with the window, or in {WINDOW_PATIENCE:.0f} s; {again}.",
                RuntimeWarning,
                stacklevel=2,
            )
        over = time.monotonic() - self._waits_since > WINDOW_PATIENCE
        return self._group.ranks.any(self._interrupt.insisted or over)
