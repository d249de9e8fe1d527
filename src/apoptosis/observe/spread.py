"""Over how many directions the inputs of layers spread: a look at one training step.

Holds: the hooks of the look, the participation ratio, its growth between two looks. Elsewhere: when a look is taken
(engine.looks), what is decided by it (decide.policy), windows that see enough to remove something (window.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apoptosis.model.passes import is_internal_forward
from apoptosis.numerics.linalg import true_float32
from apoptosis.observe.hooks import Hook, is_wrapped, take_off

ROWS = 256  # of one input that a look takes at most
FEWEST_ROWS = 16  # fewer say nothing


class Look:
    """Hooks on some modules that take the first training pass they see.

    What is found is named by the module and the number of rows, a power of two, because ratios of different numbers of
    rows cannot be compared.

    Args: names: of modules whose weights read channels; those that are neither linear nor convolutions are left out.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._found: dict[str, tuple[int, Tensor]] = {}
        modules = dict(model.named_modules())
        kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
        self._modules = [(n, modules[n]) for n in dict.fromkeys(names) if isinstance(modules.get(n), kinds)]
        self.open()

    def open(self) -> None:
        """Put the hooks on; again, after `close`, what was found before is kept."""
        for name, module in self._modules:
            take_off(module, self)
            hook = Hook(partial(self._take, name), mark=self)
            module.register_forward_pre_hook(hook, with_kwargs=True)

    def _take(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or is_internal_forward() or name in self._found:
            return
        x = args[0] if args else kwargs.get("input")
        if not module.training or not torch.is_grad_enabled() or not isinstance(x, Tensor) or is_wrapped(x):
            return
        if not x.is_floating_point() or x.is_nested or x.layout != torch.strided or x.is_meta:
            return
        with torch.no_grad():
            x = x.detach()
            if not isinstance(module, nn.Linear):
                spatial = 1 if isinstance(module, nn.Conv1d) else 2 if isinstance(module, nn.Conv2d) else 3
                x = x.movedim(-spatial - 1, -1)
            rows = x.reshape(-1, x.shape[-1])
            if len(rows) >= FEWEST_ROWS:
                number = 1 << (min(len(rows), ROWS).bit_length() - 1)
                self._found[name] = number, participation(rows, number)

    def close(self) -> dict[str, Tensor]:
        """Take the hooks off; return the ratios found, numbers on the modules' devices, by "module|rows"."""
        for _, module in self._modules:
            take_off(module, self)
        return {f"{name}|{number}": ratio for name, (number, ratio) in self._found.items()}


def participation(rows_NC: Tensor, number: int = ROWS) -> Tensor:
    """Return the participation ratio of some rows: over how many directions they spread.

    It is the square of the sum of the covariance's eigenvalues over the sum of their squares, which is the number of
    eigenvalues if all are equal. It is computed from the products of the rows with one another. Of few rows it is too
    small; those of as many rows can be compared.

    Args: rows_NC: (rows, channels). number: of rows that are taken, in equal distances.

    Returns: a number, float32, on the rows' device; 0 where nothing varies or where rows hold NaN or infinity.

    Example:
        >>> round(float(participation(torch.eye(4))), 3)  # three directions: the mean is taken off
        3.0
    """
    places = (
        torch.linspace(0, len(rows_NC) - 1, min(len(rows_NC), number), device=rows_NC.device, dtype=torch.float64)
        .round()
        .long()
    )
    rows = rows_NC[places].float()
    rows = rows - rows.mean(0)
    tiny = torch.finfo(rows.dtype).tiny
    rows = rows / rows.abs().amax().clamp_min(tiny)  # products of large numbers would overflow
    with true_float32(rows.device):
        gram = rows @ rows.T
    ratio = gram.diagonal().sum().square() / gram.square().sum().clamp_min(tiny)
    return torch.nan_to_num(ratio, nan=0.0, posinf=0.0)


def growth(before: Mapping[str, float], after: Mapping[str, float], *, doublings: float) -> float:
    """Return by what factor the ratios grew with every doubling of the steps, the geometric mean over modules.

    Args: before, after: by module; only those in both, finite and above 0, count. doublings: of the steps, between the
    two.

    Example:
        >>> growth({"a": 2.0, "b": 2.0}, {"a": 8.0, "b": 2.0}, doublings=1.0)
        2.0
    """
    both = [(old, after.get(name, 0.0)) for name, old in before.items()]
    pairs = [(old, new) for old, new in both if 0 < old < math.inf and 0 < new < math.inf]
    if not pairs or doublings <= 0:
        return 1.0
    mean = sum(math.log(new / old) for old, new in pairs) / len(pairs)
    return math.exp(mean / doublings)
