"""The one measurement that decisions rest on: what an event costs beside its arithmetic, in multiply-adds.

Lives here: turning seconds of this machine into MACs, once per run, rounded so coarsely that a busy machine gives the
same figure. Does not live here: any later timing; those are reported and never decide.
"""

from __future__ import annotations

import math
import time

import torch

_SIZE = 384  # of the product that is timed
_REPEATS = 5


def macs_per_second() -> float:
    """Time the multiply-adds per second of a float32 product on the default device: the best of a few."""
    a = torch.ones(_SIZE, _SIZE)
    best = math.inf
    for _ in range(_REPEATS):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return _SIZE**3 / best


def overhead_macs(capture_seconds: float) -> float:
    """Estimate the fixed cost of an event, two captures' worth of time, in MACs, rounded to a power of four.

    Args:
        capture_seconds: what capturing the model took, in seconds, the best of several.

    Rounding makes the same figure likely on one machine, not certain; who needs it certain passes the figure of an
    earlier run (`Apoptosis(calibration=...)`), as a resumed run does.
    """
    raw = 2.0 * capture_seconds * macs_per_second()
    return float(4.0 ** round(math.log(max(raw, 1.0), 4)))
