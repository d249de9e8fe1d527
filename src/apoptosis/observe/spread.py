"""Over how many directions the inputs of layers spread: a look at one training step.

Holds: the hooks of the look, the participation ratio, its growth between two looks. Elsewhere: when a look is taken
(engine), what is decided by it (decide.policy), windows that see enough to remove something (window.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from apoptosis.numerics.linalg import true_float32

ROWS = 256  # of one input that a look takes


class Look:
    """Hooks on some modules that take the first training pass they see.

    Args: names: of modules whose weights read channels; those that are neither linear nor convolutions are left out.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.found: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        modules = dict(model.named_modules())
        for name in dict.fromkeys(names):
            module = modules.get(name)
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                self._handles.append(module.register_forward_pre_hook(self._hook(name)))

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen = name in self.found or not module.training or not torch.is_grad_enabled()
            if seen or not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
                return
            x = args[0].detach()
            if not isinstance(module, nn.Linear):
                spatial = 1 if isinstance(module, nn.Conv1d) else 2 if isinstance(module, nn.Conv2d) else 3
                x = x.movedim(-spatial - 1, -1)
            with torch.no_grad():
                self.found[name] = participation(x.reshape(-1, x.shape[-1]))

        return hook

    def close(self) -> dict[str, Tensor]:
        """Take the hooks off; return the ratios found, numbers on the modules' devices, by name."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self.found


def participation(rows_NC: Tensor) -> Tensor:
    """Return the participation ratio of some rows: over how many directions they spread.

    It is the square of the sum of the covariance's eigenvalues over the sum of their squares, which is the number of
    eigenvalues if all are equal. It is computed from the products of the rows with one another, of at most ROWS of
    them, in equal distances. Of few rows it is too small; two looks at as many rows can be compared.

    Args: rows_NC: (rows, channels). Returns: a number, float32, on the rows' device; 0 where nothing varies.

    Example:
        >>> round(float(participation(torch.eye(4))), 3)  # three directions: the mean is taken off
        3.0
    """
    rows = rows_NC[:: max(1, -(-len(rows_NC) // ROWS))].float()
    rows = rows - rows.mean(0)
    with true_float32(rows.device):
        gram = rows @ rows.T
    return gram.diagonal().sum().square() / gram.square().sum().clamp_min(torch.finfo(gram.dtype).tiny)


def growth(before: Mapping[str, float], after: Mapping[str, float], *, doublings: float) -> float:
    """Return by what factor the ratios grew with every doubling of the steps, the geometric mean over modules.

    Args: before, after: by module; only those in both, above 0, count. doublings: of the steps, between the two.

    Example:
        >>> growth({"a": 2.0, "b": 2.0}, {"a": 8.0, "b": 2.0}, doublings=1.0)
        2.0
    """
    pairs = [(old, after[name]) for name, old in before.items() if old > 0 and after.get(name, 0.0) > 0]
    if not pairs or doublings <= 0:
        return 1.0
    mean = sum(math.log(new / old) for old, new in pairs) / len(pairs)
    return math.exp(mean / doublings)
