"""What trainers have in common when they go on with a run: they load the weights before a run can be made.

Holds: making a run at full width though the model is narrow already. Elsewhere: the trainers (one module each).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.optim import Optimizer

from apoptosis.distributed.wrappers import unwrapped
from apoptosis.interrupts import restoring
from apoptosis.surgery.undo_log import UndoLog
from apoptosis.surgery.widening import may_widen, widen


@contextmanager
def at_full_width(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Give a model the widths that it was built with inside the block, and everything back after it, bitwise.

    An `Apoptosis` is made at full width, from where its goal counts, and takes over the state of a narrower model then.

    Args: model: with or without its wrappers. optimizers: of it.
    """
    inner, log = unwrapped(model), UndoLog()
    with restoring(log.undo):
        if may_widen(inner):
            widen(log, inner, optimizers)
        try:
            yield
        finally:
            log.undo()
