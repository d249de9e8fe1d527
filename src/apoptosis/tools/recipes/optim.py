"""Optimizers and learning rates of the recipes.

Holds: the choice by name, and each step's learning rate as a pure function of the step. Elsewhere: loops.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from apoptosis.tools.recipes.config import RunConfig

ONE_CYCLE_RISE = 0.3
ONE_CYCLE_START = 1 / 25
SGD_MOMENTUM = 0.9


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer, fused where the device supports it; every contestant gets the same kind."""
    params = list(model.parameters())
    try:
        return _make(config, params, fused=True)
    except RuntimeError:  # no fused kernel for this device
        return _make(config, params, fused=None)


def _make(config: RunConfig, params: list[nn.Parameter], fused: bool | None) -> torch.optim.Optimizer:
    lr, decay = config.lr, config.weight_decay
    if config.optimizer == "adam":
        return torch.optim.Adam(params, lr=lr, weight_decay=decay, fused=fused)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(params, lr=lr, weight_decay=decay, fused=fused)
    return torch.optim.SGD(params, lr=lr, weight_decay=decay, momentum=SGD_MOMENTUM, nesterov=True, fused=fused)


def learning_rate(schedule: str, peak: float, step: int, total_steps: int) -> float:
    """Learning rate of a step.

    "constant"; "cosine": half a cosine from the peak to 0; "one-cycle": half a cosine up from peak / 25 over the first
    30 % of the steps, then half a cosine down to 0 (momentum stays as it is).

    Args:
        schedule: one of the three.
        peak: largest rate.
        step: 0..total_steps - 1.
        total_steps: of the whole run.

    Example:
        >>> [round(learning_rate("one-cycle", 1.0, s, 100), 2) for s in (0, 30, 65, 99)]
        [0.04, 1.0, 0.5, 0.0]

    References: Smith, Topin, arXiv 1708.07120; Loshchilov, Hutter, arXiv 1608.03983.
    """
    if schedule == "constant":
        return peak
    rise = ONE_CYCLE_RISE * total_steps if schedule == "one-cycle" else 0.0
    if step < rise:
        share = 0.5 - 0.5 * math.cos(math.pi * step / rise)
        return peak * (ONE_CYCLE_START + (1 - ONE_CYCLE_START) * share)
    return peak * (0.5 + 0.5 * math.cos(math.pi * (step - rise) / (total_steps - rise)))
