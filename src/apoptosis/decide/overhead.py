"""What a window and its event cost, in multiply-adds: their arithmetic, and the rest by the one clock that decides.

Holds: the cost of windows and events at given widths, and turning seconds of this machine into MACs, rounded so
coarsely that a busy machine gives the same figure. Elsewhere: any other timing; those are reported and never decide.
`python -m benchmarks.overhead` shows these costs beside what windows and events took (docs/results.md).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import torch

from apoptosis.observe import MIN_EXAMPLES, MIN_ROWS, WHOLE_COLUMNS, rows_per_channel
from apoptosis.records import Group, NormSite, ProductSite, Site

GRAM = 0.7  # multiply-adds of a row's part of a Gram matrix, by channels²: half of it is computed, in narrow strips
MOVED = 160.0  # that a number of a row is worth, which is looked at some ten times before and after its product
PLANNED = 2.0  # of ordering a group's channels, solving for its mix and its error, by channels³: float64, in part
PLANNED_AGAIN = 2.5  # of a further site, by channels³, and of the mix of several sites
PER_PASS = 2.0  # a forward pass beside the products that are counted: norms, activations, memory
TRACED = 3.0  # a pass that is run again and watched, operator by operator
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


def event_macs(groups: Iterable[Group], *, forward_macs: float, batch_rows: float, gradients: bool) -> float:
    """Estimate what a window and its event cost in MACs of plain float32 products, without the fixed part.

    Args:
        groups: open ones, at today's widths.
        forward_macs: of one forward pass, per example.
        batch_rows: examples per step; 0 before any window has counted them, which is taken for one.
        gradients: whether gradients are observed, too.

    Returns: the rows of the window (moved, and multiplied into Gram matrices), passes that are run again, the
        factorisations, and the two passes that outputs are compared by.
    """
    batch, found, again, seen = max(1.0, batch_rows), 0.0, False, set[str]()
    for group in groups:
        num = group.num_channels
        for site in group.sites:
            again = again or (site.functional and not (isinstance(site, ProductSite) and site.outputs))
            width = _observed_width(site, num)
            shared = width != num and not isinstance(site, ProductSite)
            if shared and site.key in seen:
                continue
            seen.add(site.key)
            rows = max(MIN_ROWS, rows_per_channel(site) * min(width, num))
            sides = 2.0 if isinstance(site, ProductSite) else 1.0
            moved = 2.0 if gradients and not isinstance(site, NormSite | ProductSite) else 1.0
            found += sides * rows * width * (GRAM * width + moved * MOVED)
        further = len(group.sites) - 1
        found += (PLANNED + PLANNED_AGAIN * further + (1.0 if further else 0.0)) * float(num) ** 3
    passes = min(16.0, math.ceil(MIN_EXAMPLES / batch)) if again else 0.0
    return found + (2.0 * PER_PASS + TRACED * passes) * forward_macs * batch


def _observed_width(site: Site, num_channels: int) -> int:
    """Return of how many places a Gram matrix is kept for a site of a group."""
    if isinstance(site, ProductSite):
        return int(site.input_columns.size)
    shared = site.columns.size < site.num_columns <= WHOLE_COLUMNS and not site.reads_positions
    return site.num_columns if shared else num_channels
