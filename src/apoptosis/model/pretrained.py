"""Whether a network was trained before: read off its norms, whose weights and statistics start as ones and zeros.

Holds: that one question. Elsewhere: what follows from it (decide.policy).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_FROM = 0.5  # share of the norms that were trained, from which on the network was
_AWAY = 1e-3  # from its start, at which a number was trained


def looks_pretrained(model: nn.Module) -> bool:
    """Whether most norms of a network hold other numbers than they start with; False without norms.

    A norm is a module that has running statistics, or whose weight has one axis and starts as ones (LayerNorm, RMSNorm,
    BatchNorm, GroupNorm and those of other libraries, by their class names). Models without data are not pretrained.
    """
    norms = [module for module in model.modules() if _is_norm(module)]
    trained = sum(_was_trained(module) for module in norms)
    return bool(norms) and trained >= _FROM * len(norms)


def _is_norm(module: nn.Module) -> bool:
    named = "norm" in type(module).__name__.lower()
    return named and any(isinstance(getattr(module, name, None), Tensor) for name in ("weight", "running_mean"))


def _was_trained(norm: Any) -> bool:
    starts = (("running_mean", (0.0,)), ("bias", (0.0,)), ("weight", (0.0, 1.0)))  # some weights start as zeros
    return any(_is_away(getattr(norm, name, None), values) for name, values in starts)


def _is_away(tensor: object, values: tuple[float, ...]) -> bool:
    if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.dim() != 1 or not tensor.numel():
        return False
    with torch.no_grad():
        return all(float((tensor.float() - value).abs().mean()) > _AWAY for value in values)
