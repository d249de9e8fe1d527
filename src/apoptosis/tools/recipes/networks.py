"""Reference networks, scaled for small images: mlp, cnn, vgg, resnet, alexnet.

Holds: plain torch.nn modules without a word about apoptosis; a function with `@network(...)` is all it takes to add
one. Elsewhere: their training.
References: Simonyan, Zisserman, arXiv 1409.1556 (VGG); He, Zhang, Ren, Sun, arXiv 1512.03385 (ResNet);
Krizhevsky, Sutskever, Hinton, NIPS 2012 (AlexNet).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from apoptosis.errors import ArgumentError
from apoptosis.model.passes import internal_passes

ACTIVATIONS: Mapping[str, type[nn.Module]] = MappingProxyType(
    {
        "relu": nn.ReLU,
        "leaky-relu": nn.LeakyReLU,
        "elu": nn.ELU,
        "gelu": nn.GELU,
        "silu": nn.SiLU,
        "tanh": nn.Tanh,
        "sigmoid": nn.Sigmoid,
        "softplus": nn.Softplus,
        "hardswish": nn.Hardswish,
        "prelu": nn.PReLU,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """What a builder needs. shape: of one example; widths: of the hidden layers or stages."""

    shape: tuple[int, ...]
    num_classes: int
    widths: tuple[int, ...]
    activation: str
    dropout: float

    def act(self) -> nn.Module:
        """Return a new module of the chosen activation."""
        return ACTIVATIONS[self.activation]()


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A builder and what it takes: default widths, the least number of them, and whether it reads images."""

    build: Callable[[Design], nn.Sequential]
    widths: tuple[int, ...]
    least: int
    images: bool


NETWORKS: dict[str, Network] = {}
Builder = Callable[[Design], nn.Sequential]


def network(*widths: int, least: int = 1, images: bool = True) -> Callable[[Builder], Builder]:
    """Add a builder to NETWORKS under its own name, with its default widths and the least number of them."""

    def add(build: Builder) -> Builder:
        if build.__name__ in NETWORKS:
            raise ArgumentError(f"network '{build.__name__}' is there already; there are {', '.join(NETWORKS)}.")
        NETWORKS[build.__name__] = Network(build=build, widths=widths, least=least, images=images)
        return build

    return add


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut: identity, or 1x1 convolution where the shape changes."""

    def __init__(self, num_in: int, num_out: int, stride: int, design: Design) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(num_out),
            design.act(),
            nn.Conv2d(num_out, num_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_out),
        )
        same = num_in == num_out and stride == 1
        self.shortcut: nn.Module = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))
        )
        self.act = design.act()

    def forward(self, x: Tensor) -> Tensor:
        """Return act(body(x) + shortcut(x))."""
        out: Tensor = self.act(self.body(x) + self.shortcut(x))
        return out


@network(1024, 1024, 1024, images=False)
def mlp(design: Design) -> nn.Sequential:
    """Flatten, then Linear and activation per width, then the classifier."""
    layers: list[nn.Module] = [nn.Flatten()] if len(design.shape) > 1 else []
    num_in = math.prod(design.shape)
    for width in design.widths:
        layers += [nn.Linear(num_in, width), design.act(), *_dropout(design)]
        num_in = width
    return nn.Sequential(*layers, nn.Linear(num_in, design.num_classes))


@network(64, 128, 256, 256, least=2)
def cnn(design: Design) -> nn.Sequential:
    """Per width but the last: 3x3 convolution, BatchNorm, activation, 2x2 max-pooling; then one hidden Linear."""
    layers, size = _stages(design, 1)
    return nn.Sequential(*layers, nn.Flatten(), *_head(design.widths[-2] * size, design.widths[-1:], design))


@network(64, 128, 256, 512, least=2)
def vgg(design: Design) -> nn.Sequential:
    """Two 3x3 convolutions with BatchNorm per width but the last, max-pooled; then one hidden Linear."""
    layers, _ = _stages(design, 2)
    head = _head(design.widths[-2], design.widths[-1:], design)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


@network(32, 64, 128)
def resnet(design: Design) -> nn.Sequential:
    """Stem, two residual blocks per width (each stage but the first halves the image), average pooling, classifier."""
    stem = design.widths[0]
    layers: list[nn.Module] = list(_conv(design.shape[0], stem, design))
    num_in = stem
    for index, channels in enumerate(design.widths):
        layers += [
            Residual(num_in, channels, 1 if index == 0 else 2, design),
            Residual(channels, channels, 1, design),
        ]
        num_in = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *_head(num_in, (), design))


@network(64, 192, 256, 256, 192, 512, 512, least=3)
def alexnet(design: Design) -> nn.Sequential:
    """Five convolutions without normalisation, three poolings, two hidden Linear with dropout."""
    planes, height, width = design.shape
    layers: list[nn.Module] = []
    for index, channels in enumerate(design.widths[:-2]):
        layers += [nn.Conv2d(planes, channels, 5 if index == 0 else 3, padding=2 if index == 0 else 1), design.act()]
        if index in (0, 1, len(design.widths) - 3) and min(height, width) >= 2:
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        planes = channels
    return nn.Sequential(*layers, nn.Flatten(), *_head(planes * height * width, design.widths[-2:], design))


def build_network(
    name: str,
    shape: tuple[int, ...],
    num_classes: int,
    *,
    widths: tuple[int, ...] | None = None,
    activation: str = "relu",
    dropout: float = 0.0,
) -> nn.Module:
    """Build a reference network with torch's own initialisation, drawn from the global generator.

    Args:
        name: a key of NETWORKS.
        shape: of one example, (features,) or (planes, height, width).
        num_classes: outputs.
        widths: channels per hidden layer or stage, each at least 1; None for the network's own.
        activation: a key of ACTIVATIONS.
        dropout: probability after every hidden Linear, 0..1 (1 excluded).

    Raises: ArgumentError: an unknown name, a width below 1, too few widths, or images asked of a table.

    Example:
        >>> net = build_network("mlp", (28,), 2, widths=(300, 300))
        >>> [tuple(p.shape) for p in net.parameters() if p.ndim == 2]
        [(300, 28), (300, 300), (2, 300)]
    """
    if name not in NETWORKS:
        raise ArgumentError(f"unknown network '{name}'; there are {', '.join(NETWORKS)}.")
    entry = NETWORKS[name]
    widths = entry.widths if widths is None else widths
    if len(widths) < entry.least or min(widths) < 1:
        what = f"at least {entry.least} widths, each at least 1"
        raise ArgumentError(f"network {name} takes {what}; given: {','.join(map(str, widths)) or 'none'}.")
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"unknown activation '{activation}'; there are {', '.join(ACTIVATIONS)}.")
    if entry.images and len(shape) != 3:
        raise ArgumentError(f"network {name} reads images; these data have {math.prod(shape)} features: use mlp.")
    design = Design(shape=shape, num_classes=num_classes, widths=widths, activation=activation, dropout=dropout)
    return entry.build(design)


def num_parameters(model: nn.Module) -> int:
    """Count the entries of all parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def num_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Count the multiply-adds of one forward pass of one example (one multiply-add is one), in evaluation mode.

    Args:
        model: any module with parameters; its mode and buffers are as before afterwards.
        shape: of one example.

    Example:
        >>> num_macs(nn.Linear(4, 3), (4,))
        12
    """
    first = next(model.parameters())
    return call_macs(model, lambda: model(torch.zeros((1, *shape), dtype=first.dtype, device=first.device)))


def call_macs(model: nn.Module, call: Callable[[], object]) -> int:
    """Count the multiply-adds of a call of `model`, in evaluation mode; the model is as before afterwards."""
    from torch.utils.flop_counter import FlopCounterMode

    with internal_passes(model), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops()) // 2


def _stages(design: Design, num_convolutions: int) -> tuple[list[nn.Module], int]:
    """Return stages of convolutions and max-pooling for all widths but the last, and the pixels that are left."""
    planes, height, width = design.shape
    layers: list[nn.Module] = []
    for channels in design.widths[:-1]:
        for num_in in (planes, *[channels] * (num_convolutions - 1)):
            layers += _conv(num_in, channels, design)
        if min(height, width) >= 2:
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        planes = channels
    return layers, height * width


def _conv(num_in: int, num_out: int, design: Design) -> list[nn.Module]:
    return [nn.Conv2d(num_in, num_out, 3, padding=1), nn.BatchNorm2d(num_out), design.act()]


def _head(num_in: int, widths: tuple[int, ...], design: Design) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(num_in, width), design.act(), *_dropout(design)]
        num_in = width
    return [*layers, nn.Linear(num_in, design.num_classes)]


def _dropout(design: Design) -> list[nn.Module]:
    return [nn.Dropout(design.dropout)] if design.dropout > 0 else []
