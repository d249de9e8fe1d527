"""Optimizers and learning rates of the recipes.

Holds: the choice by name. Elsewhere: loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, OneCycleLR

from apoptosis.tools.recipes.config import RunConfig

ONE_CYCLE_RISE = 0.3


OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
}


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer, fused where the device supports it: with and without apoptosis it is of the same kind."""
    make = partial(OPTIMIZERS[config.optimizer], lr=config.lr, weight_decay=config.weight_decay)
    try:
        return make(model.parameters(), fused=True)
    except RuntimeError:  # no fused kernel for this device
        return make(model.parameters())


def learning_rates(schedule: str, peak: float, total_steps: int) -> tuple[float, ...]:
    """Return the learning rate of every step of a run, by torch's schedulers.

    All at once, so that a resumed run needs no state of a scheduler.

    Args:
        schedule: "constant"; "cosine": half a cosine from the peak to 0; "one-cycle": half a cosine up from peak / 25
            over the first 30 % of the steps, then half a cosine down to 0 (momentum stays as it is).
        peak: largest rate.
        total_steps: of the whole run; 0 would come after the last.

    Example:
        >>> rates = learning_rates("one-cycle", 1.0, 100)
        >>> [round(rates[step], 2) for step in (0, 30, 65, 99)]
        [0.04, 1.0, 0.5, 0.0]

    References: Smith, Topin, arXiv 1708.07120; Loshchilov, Hutter, arXiv 1608.03983.
    """
    optimizer = torch.optim.SGD([torch.zeros((), device="cpu", dtype=torch.float32)], lr=peak)
    scheduler: LRScheduler
    if schedule == "one-cycle":  # OneCycleLR counts from 1 where the rise ends, and has its 0 at the last step
        rise = (ONE_CYCLE_RISE * total_steps + 1) / (total_steps + 1)
        scheduler = OneCycleLR(
            optimizer, peak, total_steps + 1, pct_start=rise, cycle_momentum=False, final_div_factor=math.inf
        )
    elif schedule == "cosine":
        scheduler = CosineAnnealingLR(optimizer, total_steps)
    else:
        scheduler = ConstantLR(optimizer, factor=1.0)
    optimizer.step()  # a scheduler warns where its optimizer has taken no step
    rates = []
    for _ in range(total_steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        scheduler.step()
    return tuple(rates)
