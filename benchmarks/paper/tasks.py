"""The tasks: data sets, networks and schedules that all methods share.

Holds: `TASKS`, one entry per data set and network, and what loss and metric mean there. Elsewhere:
methods. One configuration for all: Adam, learning rate 1e-3, batch 128 (gpt: 32), one-cycle schedule; nothing is
tuned per set. Metrics are "higher is better".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apoptosis.tools.recipes.datasets import Part, load_dataset
from apoptosis.tools.recipes.metrics import METRICS
from apoptosis.tools.recipes.networks import build_network
from benchmarks.paper.networks import GPT, ViT, alexnet, autoencoder, small_cnn

Score = Callable[[Tensor, Tensor], float]
LENGTH = 64  # characters per example of the language model


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskData:
    """Parts on the device and what is asked of a network.

    loss: (outputs, labels) -> scalar to minimise. score: (all outputs, all labels) of a part -> metric.
    classes: whether outputs are (examples, classes), so that predictions can be compared.
    """

    train: Part
    validation: Part
    test: Part
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Score
    classes: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One data set with one network.

    network: in words. metric: its name. unit: what a difference of it is multiplied by ("points" are hundredths).
    core: whether all baselines run here. build: (data, scale of all hidden widths) -> network.
    """

    name: str
    network: str
    metric: str
    unit: float
    epochs: int
    load: Callable[[Path | None, int | None], TaskData]
    build: Callable[[TaskData, float], nn.Module]
    core: bool = False
    seeds: int = 3
    batch: int = 128
    lr: float = 1e-3


def _classes(name: str) -> Callable[[Path | None, int | None], TaskData]:
    def load(data_dir: Path | None, rows: int | None) -> TaskData:
        data = load_dataset(name, data_dir=data_dir, validation=0.25 if name == "digits" else 0.1, train_rows=rows)
        device = torch.device("cpu")
        parts = {part: getattr(data, part).resident(device, 2**30) for part in ("train", "validation", "test")}
        return TaskData(**parts, loss=F.cross_entropy, score=METRICS[data.metric])

    return load


def _mlp(*widths: int) -> Callable[[TaskData, float], nn.Module]:
    def build(data: TaskData, scale: float) -> nn.Module:
        hidden = tuple(max(8, round(w * scale)) for w in widths)
        shape = tuple(data.train.inputs.shape[1:])
        return build_network("mlp", shape, int(data.train.labels.max()) + 1, widths=hidden)

    return build


def _cnn(data: TaskData, scale: float) -> nn.Module:
    widths = tuple(max(8, round(w * scale)) for w in (64, 128, 256, 256))
    return build_network("cnn", tuple(data.train.inputs.shape[1:]), 10, widths=widths)


def _first(num: int) -> Callable[[Path | None, int | None], TaskData]:
    """The first images of CIFAR-10 alone, for networks that cost much."""

    def load(data_dir: Path | None, rows: int | None) -> TaskData:
        data = _classes("cifar10")(data_dir, rows or num)
        return replace(data, validation=data.validation.rows(0, 2000))

    return load


def _large(data: TaskData, scale: float) -> nn.Module:
    """AlexNet on images enlarged to 64 pixels, batch by batch, in its first layer."""
    return nn.Sequential(nn.Upsample(scale_factor=2.0, mode="bilinear"), *alexnet(scale))


def _reconstruct(data_dir: Path | None, rows: int | None) -> TaskData:
    data = _classes("mnist")(data_dir, rows)
    parts = {n: replace(p, labels=p.inputs.flatten(1)) for n, p in
             (("train", data.train), ("validation", data.validation), ("test", data.test))}  # fmt: skip
    return TaskData(**parts, loss=F.mse_loss, score=_explained, classes=False)


def _explained(outputs: Tensor, labels: Tensor) -> float:
    """Share of the pixels' variance that the reconstruction explains."""
    return 1.0 - float(F.mse_loss(outputs, labels) / (labels - labels.mean(0)).square().mean())


def _characters(data_dir: Path | None, rows: int | None) -> TaskData:
    """Tiny Shakespeare in windows of LENGTH characters: 80 % train, 10 % validation, 10 % test, in the text's order."""
    text = ((data_dir or Path("data")) / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([index[c] for c in text])
    windows = (len(codes) - 1) // LENGTH
    inputs = codes[: windows * LENGTH].view(windows, LENGTH)
    labels = codes[1 : windows * LENGTH + 1].view(windows, LENGTH)
    first, second = int(0.8 * windows), int(0.9 * windows)
    whole = Part(inputs=inputs, labels=labels)
    return TaskData(
        train=whole.rows(0, min(rows or first, first)),
        validation=whole.rows(first, second),
        test=whole.rows(second, windows),
        loss=_next_character,
        score=lambda outputs, labels: -float(_next_character(outputs, labels)),
        classes=False,
    )


def _next_character(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), labels.flatten())


def _gpt(data: TaskData, scale: float) -> nn.Module:
    vocabulary = 1 + max(int(part.inputs.max()) for part in (data.train, data.validation, data.test))
    return GPT(vocabulary, LENGTH, hidden=round(512 * scale))


_ALL = (
    Task(name="mnist", network="MLP 784-1024-1024-1024-10",
           metric="accuracy", unit=100, epochs=10, core=True, seeds=5, load=_classes("mnist"),
           build=_mlp(1024, 1024, 1024)),
    Task(name="fashion-mnist", network="MLP 784-1024-1024-1024-10",
           metric="accuracy", unit=100, epochs=10, core=True, seeds=5,
           load=_classes("fashion-mnist"), build=_mlp(1024, 1024, 1024)),
    Task(name="higgs", network="MLP 28-300x5-2",
           metric="AUC", unit=1, epochs=12, core=True, seeds=5, load=_classes("higgs"),
           build=_mlp(300, 300, 300, 300, 300)),
    Task(name="cifar10", network="small CNN 32-64-128, 2048-2048",
           metric="accuracy", unit=100, epochs=5, core=True, load=_classes("cifar10"),
           build=lambda data, scale: small_cnn(scale)),
    Task(name="cifar10-long", network="small CNN 32-64-128, 2048-2048, 12 epochs",
           metric="accuracy", unit=100, epochs=12, seeds=2, load=_classes("cifar10"),
           build=lambda data, scale: small_cnn(scale)),
    Task(name="cifar10-conv", network="CNN 64-128-256, 256",
           metric="accuracy", unit=100, epochs=5, seeds=1, load=_first(10_000), build=_cnn),
    Task(name="vit", network="ViT, 4 blocks of width 128",
           metric="accuracy", unit=100, epochs=5, seeds=1, load=_first(10_000),
           build=lambda data, scale: ViT(hidden=round(512 * scale))),
    Task(name="gpt", network="GPT, 4 blocks of width 128",
           metric="-nats", unit=1, epochs=2, batch=32, seeds=1, load=_characters, build=_gpt),
    Task(name="alexnet", network="AlexNet for 64 px, 4096-4096",
           metric="accuracy", unit=100, epochs=12, seeds=1, load=_first(10_000), build=_large),
    Task(name="autoencoder", network="autoencoder 784-1024-512-32 and back",
           metric="explained variance", unit=100, epochs=10, seeds=1, load=_reconstruct,
           build=lambda data, scale: autoencoder(scale)),
)  # fmt: skip
TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}

# For CI: data inside the package, two minutes in all; its figures say nothing about the table.
QUICK = Task(name="digits", network="MLP 64-256-256-10",
           metric="accuracy", unit=100, epochs=4, core=True, seeds=1, load=_classes("digits"),
               build=_mlp(256, 256))  # fmt: skip
