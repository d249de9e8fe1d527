"""The one input of decisions that a clock measures: what an event costs beside its arithmetic, in multiply-adds.

Holds: turning seconds of this machine into MACs, rounded so coarsely that a busy machine gives the same figure.
Elsewhere: any other timing; those are reported and never decide.
"""

from __future__ import annotations

import math
import time

import torch
from torch import nn

_SIZE = 384  # of the product that is timed
_REPEATS = 5


def macs_per_second(device: torch.device | str = "cpu") -> float:
    """Time the multiply-adds per second of a float32 product on a device: the best of a few."""
    a = torch.ones(_SIZE, _SIZE, device=device, dtype=torch.float32)
    cuda = a.device.type == "cuda"
    best = math.inf
    for _ in range(_REPEATS):
        start = time.perf_counter()
        torch.mm(a, a)
        if cuda:  # the call returns before the product is computed
            torch.cuda.synchronize(a.device)
        best = min(best, time.perf_counter() - start)
    return _SIZE**3 / best


def device_of(model: nn.Module) -> torch.device:
    """Return where a model computes: the device of its first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def overhead_macs(capture_seconds: float, *, compile_seconds: float = 0.0, device: torch.device | str = "cpu") -> float:
    """Estimate the fixed cost of an event in MACs: two captures' worth of time, and compiling for the new widths.

    Args:
        capture_seconds: what capturing the model took, in seconds, the best of several.
        compile_seconds: what torch.compile took for the widths before, in seconds.
        device: where the model lies.

    Returns: a power of four. Rounding makes the same figure likely on one machine, not certain: pass the
        figure of an earlier run (`Apoptosis(calibration=...)`) for that, as a resumed run does.
    """
    raw = (2.0 * capture_seconds + compile_seconds) * macs_per_second(device)
    return float(4.0 ** round(math.log(max(raw, 1.0), 4)))
