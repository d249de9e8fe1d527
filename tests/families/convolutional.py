"""Convolutional networks with residuals, dense connections and branches: ResNet and its kin, DenseNet, Inception."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from families.classic import images
from families.family import Family


def conv3x3(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, groups=groups, bias=False)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 2

    def __init__(self, inputs: int, width: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width, stride, groups), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return F.relu(out + identity)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """A stem, two stages of two blocks, a classifier."""

    def __init__(self, block: type[nn.Module], widths: tuple[int, int], **arguments: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(3, 8), nn.BatchNorm2d(8)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs, stages = 8, []
        for stage, width in enumerate(widths):
            blocks = []
            for index in range(2):
                stride = 2 if stage and not index else 1
                blocks.append(block(inputs, width, stride, **arguments))
                inputs = width * getattr(block, "expansion", 1)
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2 = stages
        self.fc = nn.Linear(inputs, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.maxpool(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class WideBlock(nn.Module):
    """Pre-activation, dropout between the convolutions."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, width)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv3x3(width, width, stride)
        self.dropout = nn.Dropout(0.3)
        self.shortcut = nn.Conv2d(inputs, width, 1, stride=stride, bias=False) if inputs != width else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(self.dropout(F.relu(self.bn2(self.conv1(out))))) + skip


class WideResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 8)
        self.block1 = nn.Sequential(WideBlock(8, 12, 1), WideBlock(12, 12, 1))
        self.block2 = nn.Sequential(WideBlock(12, 16, 2), WideBlock(16, 16, 1))
        self.bn1 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.block2(self.block1(self.conv1(x)))))
        return self.fc(F.avg_pool2d(out, 4).view(out.shape[0], -1))


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), conv3x3(2 * growth, growth)

    def forward(self, features: list[Tensor]) -> Tensor:
        out = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(out)))


class DenseBlock(nn.ModuleDict):
    def __init__(self, num: int, inputs: int, growth: int) -> None:
        super().__init__({f"layer{i}": DenseLayer(inputs + i * growth, growth) for i in range(num)})

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv0 = conv3x3(3, 8)
        self.block1 = DenseBlock(3, 8, 4)
        self.transition = nn.Sequential(
            nn.BatchNorm2d(20), nn.ReLU(inplace=True), nn.Conv2d(20, 10, 1, bias=False), nn.AvgPool2d(2, 2)
        )
        self.block2 = DenseBlock(2, 10, 4)
        self.norm = nn.BatchNorm2d(18)
        self.classifier = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm(self.block2(self.transition(self.block1(self.conv0(x))))), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))


class Fire(nn.Module):
    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1, self.expand3x3 = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """Its classifier is a convolution whose channels are the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(8, 6, 6), Fire(12, 6, 8),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Conv2d(16, 5, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self.features(x)), 1)


class ConvNorm(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], padding: int | tuple[int, int] = 0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class InceptionBlock(nn.Module):
    """Four branches, one with a factorised kernel, one behind a pooling, concatenated."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch1 = ConvNorm(inputs, 6, 1)
        self.branch3 = nn.Sequential(
            ConvNorm(inputs, 6, 1), ConvNorm(6, 8, (1, 3), (0, 1)), ConvNorm(8, 8, (3, 1), (1, 0))
        )
        self.branch5 = nn.Sequential(ConvNorm(inputs, 6, 1), ConvNorm(6, 6, 5, 2))
        self.pool = ConvNorm(inputs, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        return torch.cat([self.branch1(x), self.branch3(x), self.branch5(x), pooled], 1)


class Inception(nn.Module):
    """With an auxiliary classifier that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8, 3, 1)
        self.block1, self.block2 = InceptionBlock(8), InceptionBlock(26)
        self.aux = nn.Sequential(nn.AdaptiveAvgPool2d(2), ConvNorm(26, 8, 1), nn.Flatten(), nn.Linear(32, 5))
        self.fc = nn.Linear(26, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 3, 2)
        x = self.block1(x)
        aux = self.aux(x) if self.training else None
        out = self.fc(self.block2(x).mean((2, 3)))
        return out if aux is None else out + 0.3 * aux


def per_block(layers: tuple[str, ...], numbers: dict[str, int]) -> dict[str, int]:
    return {f"{layer}.{name}": num for layer in layers for name, num in numbers.items()}


BLOCKS = ("layer1.0", "layer1.1", "layer2.0", "layer2.1")

FAMILIES = (
    Family(
        name="ResNet, basic blocks",
        build=lambda: ResNet(BasicBlock, (8, 12)),
        example=images(3, 8),
        groups={"conv1": 2, "layer2.0.downsample.0": 3, **per_block(BLOCKS, {"conv1": 3})},
    ),
    Family(
        name="ResNet, bottlenecks",
        build=lambda: ResNet(Bottleneck, (8, 8)),
        example=images(3, 8),
        groups={
            "conv1": 2,
            "layer1.0.downsample.0": 4,
            "layer2.0.downsample.0": 4,
            **per_block(BLOCKS, {"conv1": 2, "conv2": 2}),
        },
    ),
    Family(
        name="ResNeXt",
        build=lambda: ResNet(Bottleneck, (12, 12), groups=3),
        example=images(3, 8),
        groups={
            "conv1": 2,
            "layer1.0.downsample.0": 4,
            "layer2.0.downsample.0": 4,
            **per_block(BLOCKS, {"conv1": 1, "conv2": 1}),
        },
    ),
    Family(
        name="Wide-ResNet",
        build=WideResNet,
        example=images(3, 8),
        groups={
            "conv1": 2,
            "block1.0.conv1": 3,
            "block1.0.shortcut": 3,
            "block1.1.conv1": 3,
            "block2.0.conv1": 4,
            "block2.0.shortcut": 4,
            "block2.1.conv1": 4,
        },
    ),
    Family(
        name="DenseNet",
        build=DenseNet,
        example=images(3, 8),
        groups={
            "conv0": 2,
            "transition.2": 2,
            **per_block(("block1.layer0", "block1.layer1", "block1.layer2"), {"conv1": 2, "conv2": 1}),
            **per_block(("block2.layer0", "block2.layer1"), {"conv1": 2, "conv2": 1}),
        },
    ),
    Family(
        name="SqueezeNet",
        build=SqueezeNet,
        example=images(3, 17),
        groups={
            "features.0": 2,
            **per_block(("features.3", "features.4"), {"squeeze": 2, "expand1x1": 2, "expand3x3": 2}),
        },
    ),
    Family(
        name="Inception",
        build=Inception,
        example=images(3, 9),
        groups={
            "stem.conv": 2,
            "aux.1.conv": 2,
            **per_block(
                ("block1", "block2"),
                {
                    "branch1.conv": 2,
                    "branch3.0.conv": 2,
                    "branch3.1.conv": 2,
                    "branch3.2.conv": 2,
                    "branch5.0.conv": 2,
                    "branch5.1.conv": 2,
                    "pool.conv": 2,
                },
            ),
        },
    ),
)
