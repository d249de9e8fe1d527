"""The bank of tasks: data, network, recipe, and at which steps of the run something is removed.

Holds: tasks small enough that some hundreds of trials take an hour on one core. Elsewhere: what is removed
(removal.py), the trials (trials.py), pretrained networks (pretrained.py). Batches are functions of the step alone, so
that twins meet the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apoptosis.tools.recipes.datasets import load_dataset
from benchmarks.aftermath import networks
from benchmarks.paper.networks import GPT

Batch = tuple[Any, Tensor]  # what the model is called with (a tensor, or a dict of arguments), labels
POINTS = (0.02, 0.05, 0.1, 0.3, 0.6)
VALIDATION = 500  # images
SIDE = 24  # pixels of the crops that networks from scratch see


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """One network with its data and recipe.

    build: a network. batch: step -> batch. held_out: batches that no step sees. optimizer: of parameters. schedule:
    share of the run -> factor of the learning rate. steps: of the run. points: shares of it at which trials begin.
    k: steps that a trial trains on; 0: to the end of the run. units: groups (with those tied to them) tried by
    themselves at one point; tried: so many of them with training afterwards. branches: modules that end a residual
    branch.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    held_out: Sequence[Batch]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    schedule: Callable[[float], float]
    steps: int
    branches: tuple[str, ...] = ()
    points: tuple[float, ...] = POINTS
    k: int = 40
    units: int = 9
    tried: int = 3
    pretrained: bool = False

    @property
    def example(self) -> Any:
        """Two examples of the first batch."""
        inputs = self.batch(0)[0]
        return {key: value[:2] for key, value in inputs.items()} if isinstance(inputs, dict) else inputs[:2]


def logits(out: Any) -> Tensor:
    """Return the logits of what a model returned."""
    return out.logits if hasattr(out, "logits") else out


def loss_of(out: Any, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over all predictions."""
    found = logits(out)
    return F.cross_entropy(found.reshape(-1, found.shape[-1]), labels.reshape(-1))


def call(model: nn.Module, inputs: Any) -> Any:
    """Run a model on a tensor or on named arguments."""
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


# ---------------------------------------------------------------------- schedules


def cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


def linear(share: float) -> float:
    return min(1.0, share / 0.06) * max(0.0, 1 - share)


def one_cycle(share: float) -> float:
    return share / 0.3 if share < 0.3 else max(0.01, cosine((share - 0.3) / 0.7))


def warm_cosine(share: float) -> float:
    return min(1.0, share / 0.05) * (0.1 + 0.9 * cosine(share))


# ---------------------------------------------------------------------- data


def images(
    name: str, data_dir: Path | None, rows: int, batch: int, *, size: int | None = None, crop: bool = False
) -> tuple[Callable[[int], Batch], list[Batch]]:
    """Return (step -> batch, held-out batches) of a data set.

    size: pixels that images are enlarged to. crop: random crops of SIDE pixels and flips; held-out ones are cropped in
    the middle.
    """
    data = load_dataset(name, data_dir=data_dir, validation=0.25 if name == "digits" else 0.1, train_rows=rows)

    def shaped(x: Tensor, at: tuple[int, int] = (4, 4)) -> Tensor:
        x = x[:, :, at[0] : at[0] + SIDE, at[1] : at[1] + SIDE] if crop else x
        return x if size is None else F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    def draw(step: int) -> Batch:
        generator = torch.Generator().manual_seed(77_000 + step)
        found, labels = data.train.take(torch.randint(len(data.train), (batch,), generator=generator))
        at = (4, 4)
        if crop:
            found = torch.where(torch.rand(batch, 1, 1, 1, generator=generator) < 0.5, found.flip(3), found)
            top, left = torch.randint(0, 9, (2,), generator=generator).tolist()
            at = (top, left)
        return shaped(found, at), labels

    held, own = data.validation.between(0, VALIDATION)
    parts = zip(held.split(batch), own.split(batch), strict=True)
    return draw, [(shaped(x), y) for x, y in parts]


def characters(data_dir: Path | None, rows: int, length: int) -> tuple[Callable[[int], Batch], list[Batch], int]:
    """Return (step -> batch, held-out batches, vocabulary) of Tiny Shakespeare, its last tenth held out."""
    text = ((data_dir or Path("data")) / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([index[c] for c in text])
    split = int(0.9 * len(codes))

    def pick(source: Tensor, seed: int, number: int) -> Batch:
        starts = torch.randint(len(source) - length - 1, (number,), generator=torch.Generator().manual_seed(seed))
        found = torch.stack([source[start : start + length + 1] for start in starts.tolist()])
        return found[:, :-1], found[:, 1:]

    held_out = [pick(codes[split:], 5 + i, 2 * rows) for i in range(4)]
    return lambda step: pick(codes[:split], 88_000 + step, rows), held_out, len(index)


# ---------------------------------------------------------------------- tasks


def mlp(data_dir: Path | None) -> Task:
    draw, held_out = images("fashion-mnist", data_dir, 20_000, 64)
    return Task(name="mlp", build=networks.mlp, batch=draw, held_out=held_out, steps=1500,
                optimizer=lambda p: torch.optim.Adam(p, lr=1e-3), schedule=cosine)  # fmt: skip


def cnn(data_dir: Path | None) -> Task:
    draw, held_out = images("cifar10", data_dir, 10_000, 64, crop=True)
    return Task(name="cnn", build=networks.cnn, batch=draw, held_out=held_out, steps=300,
                points=(0.1, 0.3, 0.6), k=0, tried=2,
                optimizer=lambda p: torch.optim.Adam(p, lr=1e-3), schedule=cosine)  # fmt: skip


def resnet(data_dir: Path | None) -> Task:
    draw, held_out = images("cifar10", data_dir, 10_000, 16, crop=True)

    def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)

    return Task(name="resnet", build=networks.resnet, batch=draw, held_out=held_out, steps=240, points=(0.15, 0.4),
                k=0, optimizer=optimizer, schedule=one_cycle, units=4, tried=2,
                branches=("4.bn2", "6.bn2", "8.bn2"))  # fmt: skip


def gpt(data_dir: Path | None) -> Task:
    length = 32
    draw, held_out, vocabulary = characters(data_dir, 16, length)
    return Task(name="gpt", build=lambda: GPT(vocabulary, length, width=64, heads=4, depth=3, hidden=256),
                batch=draw, held_out=held_out, steps=800, optimizer=lambda p: torch.optim.AdamW(p, lr=2e-3),
                schedule=warm_cosine,
                branches=tuple(f"blocks.{i}.{end}" for i in range(3) for end in ("attention.out", "fc2")))  # fmt: skip


def digits(data_dir: Path | None) -> Task:
    """For CI: data inside a package, a small network, a short run; its figures say nothing."""
    draw, held_out = images("digits", data_dir, 1000, 32)
    return Task(name="digits", build=lambda: networks.mlp(64, (32, 24)), batch=draw, held_out=held_out, steps=60,
                optimizer=lambda p: torch.optim.Adam(p, lr=1e-3), schedule=cosine, points=(0.2, 0.5), k=8)  # fmt: skip
