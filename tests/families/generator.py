"""Random networks: a list of numbers becomes the source of a module, so that a failure can be read, cut down and kept.

    network = generate([3, 1, 4, 1, 5])
    print(network.source)
    model, example = network.build(torch.float64), network.example(8, torch.float64)

Every decision takes one number from the list; when the list is used up, every decision takes the first, simplest
option. So deleting or lowering numbers makes a network simpler: hypothesis cuts failures down by itself, and so does
`reduce`. Holds: decisions, source, building. Elsewhere: blocks (blocks.py), what is asked (trial.py).
"""

from __future__ import annotations

import linecache
import random
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
VOCABULARY = 11
HEADER = """import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
"""
_numbers = count()


@dataclass(frozen=True)
class Shape:
    """What `h` is at a place of the forward pass.

    kind: "vector" (rows, channels), "image" (rows, channels, size, size), "sequence" (rows, size, channels) or "tokens"
    (rows, size), integers.
    """

    kind: str
    channels: int
    size: int = 1

    @property
    def dim(self) -> int:
        """The axis of the channels."""
        return 1 if self.kind == "image" else -1


class Writer:
    """Takes decisions and writes source; blocks call it."""

    def __init__(self, choices: Sequence[int]) -> None:
        self._choices = list(choices)
        self._at = 0
        self._names = count()
        self.init: list[str] = []
        self.lines: list[str] = []
        self.outputs: list[str] = []
        self.literal = False
        self.depth = 0
        self.features: list[str] = []

    def pick(self, options: Sequence[T]) -> T:
        """Decide for one of the options, the first of which is the simplest."""
        number = self._choices[self._at] if self._at < len(self._choices) else 0
        self._at += 1
        return options[number % len(options)]

    @property
    def used_up(self) -> bool:
        """Whether only simplest decisions are left."""
        return self._at >= len(self._choices)

    def flag(self) -> bool:
        """Decide between no and yes."""
        return self.pick((False, True))

    def name(self, prefix: str = "x") -> str:
        """A fresh local name."""
        return f"{prefix}{next(self._names)}"

    def module(self, expression: str) -> str:
        """Add a module, parameter or plain attribute; returns how forward calls it."""
        name = self.name("m")
        self.init.append(f"self.{name} = {expression}")
        return f"self.{name}"

    def number(self, value: int, names: Sequence[str]) -> str:
        """A number that forward splits channels by: an attribute of a usual name, or written where it is used."""
        free = [name for name in names if not any(line.startswith(f"self.{name} =") for line in self.init)]
        if not free or self.pick((False, False, False, True)):
            self.literal = True
            return str(value)
        self.init.append(f"self.{free[0]} = {value}")
        return f"self.{free[0]}"

    def line(self, text: str) -> None:
        """Add a line to forward; `h` is the running value."""
        self.lines.append(text)

    def apply(self, expression: str) -> None:
        """Add a module and put `h` through it."""
        self.line(f"h = {self.module(expression)}(h)")


@dataclass(frozen=True)
class Network:
    """A network as source. literal: it picks channels by numbers in its forward, which no structure can follow."""

    source: str
    given: Shape
    literal: bool
    features: tuple[str, ...]

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        """The module, freshly initialised."""
        torch.manual_seed(seed)
        return build(self.source).to(dtype)

    def example(self, rows: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        """A batch of inputs."""
        return example(self.given, rows, dtype, seed)


def build(source: str) -> nn.Module:
    """Run the source as a module of its own, whose lines can be looked up, and make its Net."""
    name = f"network_{next(_numbers)}"
    file = f"{name}.py"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = types.ModuleType(name)
    module.__file__ = file
    sys.modules[name] = module
    exec(compile(source, file, "exec"), vars(module))
    net = module.Net()
    assert isinstance(net, nn.Module)
    return net


def example(given: Shape, rows: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A batch of inputs of a shape."""
    generator = torch.Generator().manual_seed(seed)
    if given.kind == "tokens":
        return torch.randint(0, VOCABULARY, (rows, given.size), generator=generator)
    shapes = {
        "vector": (rows, given.channels),
        "image": (rows, given.channels, given.size, given.size),
        "sequence": (rows, given.size, given.channels),
    }
    return torch.randn(shapes[given.kind], generator=generator, dtype=torch.float64).to(dtype)


#: kind of input -> what the first blocks get.
INPUTS = {
    "vector": Shape("vector", 6),
    "image": Shape("image", 3, 6),
    "sequence": Shape("sequence", 6, 5),
    "tokens": Shape("tokens", 0, 5),
}


def generate(choices: Sequence[int], kind: str | None = None, most: int = 4) -> Network:
    """Write the network that a list of numbers stands for, of at most so many blocks in a row."""
    from families import blocks  # it needs the Writer

    writer = Writer(choices)
    given = INPUTS[kind or writer.pick(tuple(INPUTS))]
    shape = blocks.begin(writer, given)
    for _ in range(writer.pick(range(1, most + 1))):
        shape = blocks.block(writer, shape)
    blocks.end(writer, shape)
    body = "".join(f"        {line}\n" for line in writer.init)
    forward = "    def forward(self, h):\n" + "".join(f"        {line}\n" for line in writer.lines)
    source = f"{HEADER}{body}\n{forward}        return {', '.join(('h', *writer.outputs))}\n"
    return Network(source, given, writer.literal, tuple(dict.fromkeys(writer.features)))


def numbers(seed: int, length: int = 80) -> list[int]:
    """A list of numbers to decide by."""
    return random.Random(seed).choices(range(60), k=length)


def reduce(choices: Sequence[int], fails: Callable[[list[int]], bool], budget: int = 400) -> list[int]:
    """Cut a failing list down: drop stretches, then lower numbers, as long as it fails on."""
    best = list(choices)

    def better(found: list[int]) -> bool:
        nonlocal best, budget
        if budget <= 0 or found == best:
            return False
        budget -= 1
        if fails(found):
            best = found
            return True
        return False

    changed = True
    while changed and budget > 0:
        changed = False
        step = max(1, len(best) // 2)
        while step:
            at = 0
            while at < len(best):
                if better(best[:at] + best[at + step :]):
                    changed = True
                else:
                    at += step
            step //= 2
        for at in range(len(best)):
            for value in (0, best[at] // 2, best[at] - 1):
                if at < len(best) and 0 <= value < best[at] and better([*best[:at], value, *best[at + 1 :]]):
                    changed = True
                    break
    return best


def moved(shape: Shape, **changes: Any) -> Shape:
    """The shape with some fields changed."""
    return replace(shape, **changes)
