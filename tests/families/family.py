"""What a family is: how to build a small random model of it, how to call it, and what must be removable in it.

How to add a family: write a function that builds a small random model (a few channels per layer, a fraction of a second
per forward pass, runs in float32 and float64) and put a `Family` into the `FAMILIES` tuple of a module that
`registry.MODULES` lists. `python -m families.show NAME` (with src and tests on the path) prints the model's groups,
their widths and pins. List every group that has to be removable, with the number of channels to plant. The list may
only grow: a group that is listed is never taken out again, whatever a change of the library makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from torch import Tensor, nn

from apoptosis.records import NormWidths


def first_tensor(output: Any) -> Tensor:
    """The first floating point tensor of an output: itself, in a tuple or list, by key, by field."""
    found = _find(output)
    if found is None:
        raise TypeError(f"no floating point tensor in a {type(output).__name__}: give the family a `read`.")
    return found


def _find(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, Mapping):
        output = list(output.values())
    elif is_dataclass(output):
        output = list(vars(output).values())
    if isinstance(output, list | tuple):
        return next((found for item in output if (found := _find(item)) is not None), None)
    return None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of networks.

    name: unique. build: returns a small random model; the caller has seeded torch. example: rows -> the inputs as
    `shrink_` takes them (a tensor, a tuple of arguments or a dict of keyword arguments), drawn from torch's generator;
    floating tensors are cast to the model's dtype by the oracle.
    groups: name -> channels to plant in it, all rows together (a multiple of Group.rows, fewer than all). None of these
    groups may ever be pinned. missing: listed groups that are not removable yet -> why; each is an expected failure.
    read: the output that is compared and trained on. rows, batches: how much the oracle shows the model.
    norm_widths: as `shrink_` takes it.
    tolerance32: relative error allowed in float32. lr: of the 20 training steps.
    """

    name: str
    build: Callable[[], nn.Module]
    example: Callable[[int], Any]
    groups: Mapping[str, int]
    missing: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[Any], Tensor] = first_tensor
    rows: int = 64
    batches: int = 2
    norm_widths: NormWidths = "pinned"
    tolerance32: float = 1e-5
    lr: float = 3e-3
