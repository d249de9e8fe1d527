"""Multilayer perceptrons, LeNet, AlexNet, VGG: networks whose every hidden layer is plainly removable."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from families.family import Family


def images(channels: int, size: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, channels, size, size)


def vectors(width: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, width)


def mlp(activation: Callable[[], nn.Module] = nn.ReLU, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, width in ((6, 12), (12, 10)):
        layers += [nn.Linear(inputs, width), *([nn.BatchNorm1d(width)] if norm else []), activation(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(10, 4))


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(6, 10, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(10 * 4, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 10),
    )  # fmt: skip


class AlexNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
            nn.Conv2d(8, 12, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
            nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(12, 8, 3, padding=1), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(8 * 4, 16), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(16, 12),
            nn.ReLU(inplace=True), nn.Linear(12, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width in (8, "M", 12, 12, "M"):
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            inputs = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(12 * 4, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


FAMILIES = (
    Family(name="MLP", build=mlp, example=vectors(6), groups={"0": 4, "3": 4}),
    Family(
        name="MLP, tanh, batch norm",
        build=lambda: mlp(nn.Tanh, norm=True),
        example=vectors(6),
        groups={"0": 4, "4": 4},
    ),
    Family(name="LeNet", build=lenet, example=images(1, 16), groups={"0": 2, "3": 3, "7": 4, "9": 3}),
    Family(
        name="AlexNet",
        build=AlexNet,
        example=images(3, 31),
        groups={
            "features.0": 3,
            "features.3": 3,
            "features.6": 3,
            "features.8": 2,
            "classifier.1": 4,
            "classifier.4": 4,
        },
    ),
    Family(
        name="VGG, batch norm",
        build=VGG,
        example=images(3, 8),
        groups={"features.0": 3, "features.4": 4, "features.7": 4, "classifier.0": 5},
    ),
)
