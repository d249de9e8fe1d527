"""What the tests of capture traps share: plant, shrink at tolerance 0, compare, and say what came out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apoptosis import Event, shrink_
from apoptosis.graph import analyse
from apoptosis.model.evaluate import as_call
from families.plant import plant


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def flat(output: Any) -> list[Tensor]:
    """Every tensor of an output."""
    if isinstance(output, Tensor):
        return [output]
    if output is None:
        return []
    parts = output.values() if isinstance(output, Mapping) else output
    parts = parts if isinstance(output, Mapping | list | tuple) else vars(output).values()
    return [tensor for part in parts for tensor in flat(part)]


@dataclass(frozen=True)
class Result:
    """What a surgery at tolerance 0 made of a network in which channels were planted. pins: before the surgery."""

    before: nn.Module
    after: nn.Module
    event: Event
    pins: Mapping[str, str]

    @property
    def notes(self) -> str:
        return "; ".join(self.event.notes)


def outputs(net: nn.Module, example: Any, *, training: bool) -> list[Tensor]:
    args, kwargs = copy.deepcopy(as_call(example))
    with torch.no_grad():
        return flat(copy.deepcopy(net).train(training)(*args, **kwargs))


def shrink(net: nn.Module, example: Any, planted: Mapping[str, int], *, rtol: float = 1e-10) -> Result:
    """Plant, shrink, and compare the outputs in both modes: they are the same whatever came out."""
    args, kwargs = as_call(example)
    structure = analyse(net, args, kwargs)
    for name, num in planted.items():
        plant(net, structure, name, num)
    with torch.no_grad():
        net.eval()(*args, **kwargs)  # a weight that a hook computes has no graph now, and can be copied
    before = copy.deepcopy(net)
    pins = {group.name: str(group.pin) for group in structure.groups if group.pin is not None}
    event = shrink_(net, example, [example], tolerance=0)
    for training in (True, False):
        old, new = (outputs(m, example, training=training) for m in (before, net))
        for a, b in zip(new, old, strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * 10)
    return Result(before, net, event, pins)


class Net(nn.Module):
    """Two linear layers `a` and `b` (in float64), and what happens between them."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], width: int = 8, out: int = 8, **parts: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, width), nn.Linear(out, 3)
        for name, part in parts.items():
            setattr(self, name, part)
        self.between = between
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self, self.a(x)))


X = draw(256, 6)
FOUND = {"a": (8, 5)}
