"""The tasks: data sets, networks and schedules that all methods share.

Holds: `TASKS`, one entry per data set and network, and what loss and metric mean there. Elsewhere:
methods. One configuration for all but those of RECIPES: Adam, learning rate 1e-3, batch 128 (gpt: 32), one-cycle
schedule. The others are trained by the usual recipe of their kind, its learning rate chosen for the dense network on
validation examples (docs/results.md says of what). Metrics are "higher is better".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apoptosis.tools.recipes.datasets import Part, load_dataset
from apoptosis.tools.recipes.metrics import METRICS
from apoptosis.tools.recipes.networks import build_network
from benchmarks.paper.networks import GPT, ViT, alexnet, autoencoder, resnet, small_cnn, vgg11
from benchmarks.paper.pretrained import efficientnet, minilm, minilm_tokens, tiny_bert
from benchmarks.paper.sentences import Sentences, digits_as_sentences, read_sst2, read_trec

Score = Callable[[Tensor, Tensor], float]
Parameters = Iterable[nn.Parameter]
LENGTH = 64  # characters per example of the language model


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How networks of a kind are trained. optimizer: (parameters, learning rate) -> optimizer, fused.

    schedule: "one-cycle", or "linear": up to the peak over the first tenth of the steps, then down to 0.
    """

    name: str
    optimizer: Callable[[Parameters, float], torch.optim.Optimizer]
    schedule: str = "one-cycle"


ADAM = Recipe(name="Adam", optimizer=lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, fused=True))
ADAMW = Recipe(
    name="AdamW, linear warm-up and decay",
    optimizer=lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, fused=True),
    schedule="linear",
)
SGD = Recipe(
    name="SGD, Nesterov 0.9, decay 5e-4, crop and flip",
    optimizer=lambda parameters, lr: torch.optim.SGD(
        parameters, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskData:
    """Parts on the device and what is asked of a network.

    loss: (outputs, labels) -> scalar to minimise. score: (all outputs, all labels) of a part -> metric.
    classes: whether outputs are (examples, classes), so that predictions can be compared.
    augment: (inputs of a batch, generator) -> the same shape, where training images are changed at random.
    example: number of rows -> inputs that stand for all in captures and counts; None: the first training inputs.
    """

    train: Part | Sentences
    validation: Part | Sentences
    test: Part | Sentences
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Score
    classes: bool = True
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    example: Callable[[int], Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One data set with one network.

    network: in words. metric: its name. unit: what a difference of it is multiplied by ("points" are hundredths).
    core: whether all baselines run here. build: (data, scale of all hidden widths) -> network.
    kind: of network, for the table of what people train; empty: not in it. pretrained: build takes no scale but 1.
    rows: how many training examples there are, where fewer may be asked for and tables say so; 0: any number.
    fewer: name -> builder of the pretrained network with fewer layers. turn: steps that one method trains before it is
    the next one's turn, None for an epoch. latency: batch sizes. probe: of the validation examples, how many apoptosis
    gets at most.
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
    kind: str = ""
    rows: int = 0
    recipe: Recipe = ADAM
    pretrained: bool = False
    fewer: Mapping[str, Callable[[TaskData], nn.Module]] = field(default_factory=dict)
    turn: int | None = None
    latency: tuple[int, ...] = (1, 256)
    probe: int = 4096


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


def _augmented(num: int | None = None) -> Callable[[Path | None, int | None], TaskData]:
    """CIFAR-10, or its first images alone, cropped and flipped at random in training."""

    def load(data_dir: Path | None, rows: int | None) -> TaskData:
        data = _classes("cifar10")(data_dir, rows or num)
        short = data.validation if rows is None and num is None else data.validation.rows(0, 2000)
        return replace(data, validation=short, augment=crop_and_flip)

    return load


def crop_and_flip(images: Tensor, generator: torch.Generator, margin: int = 4) -> Tensor:
    """Move every image by up to `margin` pixels, what comes in is 0, and mirror every second one."""
    rows, _, height, width = images.shape
    down, right = torch.randint(2 * margin + 1, (2, rows), generator=generator)
    mirrored = torch.rand(rows, generator=generator) < 0.5
    across = torch.arange(width).expand(rows, width)
    across = torch.where(mirrored[:, None], across.flip(1), across) + right[:, None]
    lines = torch.arange(height) + down[:, None]
    large = F.pad(images, (margin,) * 4).movedim(1, -1)
    return large[torch.arange(rows)[:, None, None], lines[:, :, None], across[:, None, :]].movedim(-1, 1).contiguous()


def _slightly(images: Tensor, generator: torch.Generator) -> Tensor:
    return crop_and_flip(images, generator, margin=1)  # mirrored digits are others, but so they are for all methods


def _sentences(read: Callable[[Path | None], tuple[Sentences, ...]], batch: int) -> Any:
    def load(data_dir: Path | None, rows: int | None) -> TaskData:
        train, validation, test = read(data_dir)
        train = train.rows(0, min(rows or len(train), len(train)))
        return TaskData(
            train=train, validation=validation, test=test, loss=F.cross_entropy, score=METRICS["accuracy"],
            example=lambda number: train.example(number, batch),
        )  # fmt: skip

    return load


def _minilm_task(name: str, rows: int, read: Callable[..., tuple[Sentences, ...]]) -> Task:
    def build(layers: int | None) -> Callable[..., nn.Module]:
        return lambda data, scale=1.0: minilm(int(data.train.labels.max()) + 1, layers)

    return Task(
        name=name, rows=rows, network="MiniLM, 6 layers, pretrained", kind="pretrained transformer",
        metric="accuracy", unit=100, epochs=3, batch=32, lr=1e-4, recipe=ADAMW, pretrained=True, turn=24,
        latency=(1, 32), probe=256, build=build(None),
        load=_sentences(lambda folder: read(folder or Path("data"), minilm_tokens(), 0), 32),
        fewer={f"{layers} of 6 layers": build(layers) for layers in (4, 3)},
    )  # fmt: skip


def _efficientnet(blocks: int | None) -> Callable[..., nn.Module]:
    return lambda data, scale=1.0: efficientnet(10, blocks)


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
           kind="transformer from scratch", metric="accuracy", unit=100, epochs=5, seeds=1, load=_first(10_000),
           build=lambda data, scale: ViT(hidden=round(512 * scale))),
    Task(name="gpt", network="GPT, 4 blocks of width 128",
           kind="transformer from scratch", metric="-nats", unit=1, epochs=2, batch=32, seeds=1, load=_characters,
           build=_gpt),
    Task(name="alexnet", network="AlexNet for 64 px, 4096-4096",
           metric="accuracy", unit=100, epochs=12, seeds=1, load=_first(10_000), build=_large),
    Task(name="autoencoder", network="autoencoder 784-1024-512-32 and back",
           metric="explained variance", unit=100, epochs=10, seeds=1, load=_reconstruct,
           build=lambda data, scale: autoencoder(scale)),
    _minilm_task("minilm-sst2", 6920, read_sst2),
    _minilm_task("minilm-trec", 4907, read_trec),
    Task(name="efficientnet-cifar10", network="EfficientNet-Lite0, pretrained, at 64 px",
           kind="pretrained convolutional", rows=10_000, metric="accuracy", unit=100, epochs=5, batch=64,
           lr=1e-3, recipe=ADAMW, pretrained=True, turn=24, latency=(1, 32), probe=256, load=_augmented(10_000),
           build=_efficientnet(None),
           fewer={f"{blocks} of 16 blocks": _efficientnet(blocks) for blocks in (12, 9)}),
    Task(name="vgg11-cifar10", network="VGG-11 of half width",
           kind="convolutional from scratch", rows=45_000, metric="accuracy", unit=100, epochs=15,
           lr=0.1, recipe=SGD, seeds=2, turn=24, latency=(1, 32), probe=256, load=_augmented(),
           build=lambda data, scale: vgg11(scale)),
    Task(name="resnet20-cifar10", network="ResNet-20",
           kind="convolutional from scratch", rows=45_000, metric="accuracy", unit=100, epochs=15,
           lr=0.1, recipe=SGD, seeds=2, turn=24, latency=(1, 32), probe=256, load=_augmented(),
           build=lambda data, scale: resnet(scale)),
)  # fmt: skip
TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}

# For CI: data inside the package, two minutes in all; their figures say nothing about the table.
QUICK = Task(name="digits", network="MLP 64-256-256-10",
           metric="accuracy", unit=100, epochs=4, core=True, seeds=1, load=_classes("digits"),
               build=_mlp(256, 256))  # fmt: skip
_TINY = (
    Task(name="digits-bert", network="BERT, 4 layers, random", kind="transformer, tiny", metric="accuracy", unit=100,
           epochs=3, batch=32, lr=2e-3, recipe=ADAMW, pretrained=True, seeds=1, turn=8, latency=(1, 32), probe=256,
           load=_sentences(lambda folder: digits_as_sentences(), 32),
           build=lambda data, scale: tiny_bert(10), fewer={"2 of 4 layers": lambda data: tiny_bert(10, 2)}),
    Task(name="digits-resnet", network="ResNet-8", kind="convolutional, tiny", metric="accuracy", unit=100, epochs=3,
           batch=32, lr=0.1, recipe=SGD, seeds=1, turn=16, latency=(1, 32), probe=256,
           load=lambda folder, rows: replace(_classes("digits")(folder, rows or 2000), augment=_slightly),
           build=lambda data, scale: resnet(scale, planes=1, blocks=1)),
)  # fmt: skip
QUICK_TASKS: Mapping[str, Task] = {task.name: task for task in (QUICK, *_TINY)}
BY_NAME: Mapping[str, Task] = {**TASKS, **QUICK_TASKS}
