"""Outputs of modules that show what a site reads.

Holds: the record. Elsewhere: how it is found (graph), hooks on these modules (observe).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModuleOutput:
    """What is read off a module's output: `columns` along its last axis, which has `width` places."""

    module: str
    width: int
    columns: npt.NDArray[np.int64]
