"""Networks of depthwise convolutions and gates: MobileNet, EfficientNet, ShuffleNet, ConvNeXt."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from families.classic import images
from families.family import Family

Activation = Callable[[], nn.Module]


def conv_norm(
    inputs: int, outputs: int, kernel: int, activation: Activation | None, *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([] if activation is None else [activation()]))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int, activation: Activation, gate: Activation) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.activation, self.gate = activation(), gate()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.gate(self.fc2(self.activation(self.fc1(F.adaptive_avg_pool2d(x, 1)))))
        return scale * x


class StochasticDepth(nn.Module):
    """Drops whole examples of a branch."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.path = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.path == 0.0:
            return x
        kept = torch.empty((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device).bernoulli_(1 - self.path)
        return x * kept.div_(1 - self.path)


class InvertedResidual(nn.Module):
    """Expand, filter per channel, gate, project."""

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        activation: Activation,
        *,
        stride: int = 1,
        excite: tuple[int, Activation, Activation] | None = None,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.expand = conv_norm(inputs, hidden, 1, activation)
        self.depthwise = conv_norm(hidden, hidden, 3, activation, stride=stride, groups=hidden)
        self.excite = None if excite is None else SqueezeExcite(hidden, *excite)
        self.project = conv_norm(hidden, outputs, 1, None)
        self.drop = StochasticDepth(drop)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.depthwise(self.expand(x))
        out = self.project(out if self.excite is None else self.excite(out))
        return x + self.drop(out) if self.residual else out


class MobileNet(nn.Module):
    def __init__(
        self, activation: Activation, excite: tuple[int, Activation, Activation] | None = None, drop: float = 0.0
    ) -> None:
        super().__init__()
        more = {"excite": excite, "drop": drop}
        self.features = nn.Sequential(
            conv_norm(3, 8, 3, activation, stride=2),
            InvertedResidual(8, 16, 8, activation, **more),
            InvertedResidual(8, 16, 12, activation, stride=2, **more),
            InvertedResidual(12, 20, 12, activation, **more),
            conv_norm(12, 24, 1, activation),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, 16), activation(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), (1, 1)).reshape(x.shape[0], -1))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    """Half of the channels pass, the other half go through a branch; then they are shuffled."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.stride = stride
        self.branch1 = (
            nn.Sequential(conv_norm(inputs, inputs, 3, None, stride=stride, groups=inputs),
                          conv_norm(inputs, half, 1, nn.ReLU))
            if stride > 1 else nn.Identity()
        )  # fmt: skip
        self.branch2 = nn.Sequential(
            conv_norm(inputs if stride > 1 else half, half, 1, nn.ReLU),
            conv_norm(half, half, 3, None, stride=stride, groups=half),
            conv_norm(half, half, 1, nn.ReLU),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            left, right = x.chunk(2, dim=1)
            out = torch.cat((left, self.branch2(right)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv_norm(3, 8, 3, nn.ReLU, stride=2)
        self.stage2 = nn.Sequential(ShuffleUnit(8, 16, 2), ShuffleUnit(16, 16, 1), ShuffleUnit(16, 16, 1))
        self.conv5 = conv_norm(16, 20, 1, nn.ReLU)
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv5(self.stage2(self.conv1(x))).mean([2, 3]))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        self.gamma = nn.Parameter(1e-6 * torch.ones(dim))
        self.drop = StochasticDepth(0.1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        out = self.gamma * self.pwconv2(self.act(self.pwconv1(out)))
        return x + self.drop(out.permute(0, 3, 1, 2))


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), LayerNorm2d(8, eps=1e-6))
        self.stage1 = nn.Sequential(ConvNeXtBlock(8), ConvNeXtBlock(8))
        self.down = nn.Sequential(LayerNorm2d(8, eps=1e-6), nn.Conv2d(8, 12, 2, stride=2))
        self.stage2 = ConvNeXtBlock(12)
        self.norm, self.head = nn.LayerNorm(12, eps=1e-6), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.down(self.stage1(self.stem(x))))
        return self.head(self.norm(x.mean([-2, -1])))


BLOCKS = ("features.1", "features.2", "features.3")
MOBILE = {
    "features.0.0": 2, "features.2.project.0": 3, "features.4.0": 6, "classifier.1": 4,
    **{f"{block}.expand.0": 4 for block in BLOCKS},
}  # fmt: skip
GATED = {**MOBILE, **{f"{block}.excite.fc1": 1 for block in BLOCKS}}

FAMILIES = (
    Family(name="MobileNetV2", build=lambda: MobileNet(nn.ReLU6), example=images(3, 8), groups=MOBILE, batches=4),
    Family(
        name="MobileNetV3",
        build=lambda: MobileNet(nn.Hardswish, (4, nn.ReLU, nn.Hardsigmoid)),
        example=images(3, 8),
        groups=GATED,
    ),
    Family(
        name="EfficientNet",
        build=lambda: MobileNet(nn.SiLU, (4, nn.SiLU, nn.Sigmoid), drop=0.2),
        example=images(3, 8),
        groups=GATED,
    ),
    Family(
        name="ShuffleNetV2",
        build=ShuffleNet,
        example=images(3, 8),
        groups={
            "conv1.0": 2,
            "conv5.0": 5,
            **{f"stage2.{unit}.branch2.0.0": 2 for unit in range(3)},
        },
    ),
    Family(
        name="ConvNeXt",
        build=ConvNeXt,
        example=images(3, 8),
        groups={"stage1.0.pwconv1": 4, "stage1.1.pwconv1": 4, "stage2.pwconv1": 6},
    ),
)
