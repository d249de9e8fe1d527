"""Multilayer perceptrons, LeNet, AlexNet: networks whose every hidden layer is plainly removable."""

from __future__ import annotations

import torch
from torch import nn

from families.family import Family


def images(channels: int, size: int):
    return lambda rows: torch.randn(rows, channels, size, size)


def mlp(activation: type[nn.Module] = nn.ReLU, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, width in enumerate((12, 10)):
        layers += [nn.Linear(6 if i == 0 else 12, width), *([nn.BatchNorm1d(width)] if norm else []), activation()]
        layers.append(nn.Dropout(0.2))
    return nn.Sequential(*layers, nn.Linear(10, 4))


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(6, 10, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(10 * 4, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 10),
    )  # fmt: skip


FAMILIES = (
    Family(name="mlp", build=mlp, example=lambda rows: torch.randn(rows, 6), groups={"0": 4, "3": 4}),
    Family(
        name="mlp, tanh and batch normalisation",
        build=lambda: mlp(nn.Tanh, norm=True),
        example=lambda rows: torch.randn(rows, 6),
        groups={"0": 4, "4": 4},
    ),
    Family(name="lenet", build=lenet, example=images(1, 16), groups={"0": 2, "3": 3, "7": 4, "9": 3}),
)
