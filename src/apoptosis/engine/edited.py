"""Running a network that was just edited: what an edit can be at fault for, and what it is not.

Holds: the forward pass on a probe after an edit, and the errors that say the edit is wrong for the model. Elsewhere:
the edit (surgery), what follows from a fault (step.py, sensitivity.py).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from apoptosis.errors import CaptureError, OutOfMemoryError, RankError, ShapeError, StructureChangedError, one_line
from apoptosis.graph.trace.failures import after_edit
from apoptosis.model.evaluate import Probe, outputs

BROKEN = (CaptureError, StructureChangedError, ShapeError)  # the edit is wrong for the model


def outputs_of_edited(model: nn.Module, probe: Probe, *, passes: int = 0) -> list[Any]:
    """Return what an edited network returns in evaluation mode on examples that the network before took.

    Raises: CaptureError: it fails on them. OutOfMemoryError: memory runs out. RankError: another rank is gone.
    """
    try:
        return outputs(model, probe, passes=passes)
    except (OutOfMemoryError, RankError):
        raise
    except Exception as error:  # the user's forward may raise anything
        text = f"the forward pass fails on the probe: {one_line(error)}"
        raise CaptureError(text, remedy=after_edit(error)) from error
