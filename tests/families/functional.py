"""Networks that call convolutions as functions: on their own weight, on parameters, on the weight of another module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from families.classic import images
from families.family import Family

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Conv2dSame(nn.Conv2d):
    """Pads as TensorFlow does, with sizes that depend on the input's."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(reversed(x.shape[-2:]), self.kernel_size, self.stride, strict=True):
            missing = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            pads += [missing // 2, missing - missing // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class MBConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, expand: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.expand, self.norm0 = Conv2dSame(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.depthwise = Conv2dSame(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.project, self.norm2 = Conv2dSame(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu6(self.norm0(self.expand(x)))
        out = F.relu6(self.norm1(self.depthwise(out)))
        out = self.norm2(self.project(out))
        return x + out if self.residual else out


class EfficientNetLite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = Conv2dSame(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(MBConv(8, 8, 2, 3, 1), MBConv(8, 12, 3, 5, 2), MBConv(12, 12, 2, 3, 1))
        self.head, self.last = Conv2dSame(12, 24, 3), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu6(self.norm(self.stem(x))))
        return self.last(F.relu(self.head(x)).mean((2, 3)))


class Padded(nn.Module):
    """Every way to fill the border, and every kind of convolution, on plain parameters of one block."""

    def __init__(self, dims: int, mode: str) -> None:
        super().__init__()
        self.dims, self.mode = dims, mode
        kernel = [3] * dims
        self.first, self.bias = nn.Parameter(torch.randn(12, 3, *kernel)), nn.Parameter(torch.zeros(12))
        self.grouped = nn.Parameter(torch.randn(12, 6, *kernel))
        self.single, self.single_bias = nn.Parameter(torch.randn(12, 1, *kernel)), nn.Parameter(torch.zeros(12))
        self.up = nn.Parameter(torch.randn(12, 10, *kernel))
        self.point, self.last = nn.Parameter(torch.randn(9, 10)), nn.Linear(9, 4)

    def pad(self, x: Tensor) -> Tensor:
        sizes = [1, 1] * self.dims
        return F.pad(x, sizes, value=1.0) if self.mode == "one" else F.pad(x, sizes, mode=self.mode)

    def forward(self, x: Tensor) -> Tensor:
        convolve = CONVOLVE[self.dims]
        x = torch.tanh(convolve(self.pad(x), self.first, self.bias))
        x = F.gelu(convolve(self.pad(x), self.grouped, groups=2, dilation=1))
        x = convolve(self.pad(x), self.single, self.single_bias, groups=x.shape[1])
        x = F.relu(TRANSPOSED[self.dims](x, self.up, stride=2, padding=1, output_padding=1))
        x = torch.tanh(convolve(x, self.point[(..., *[None] * self.dims)]))
        return self.last(x.flatten(2).mean(2))


class ShortConvolution(nn.Module):
    """Gated causal convolution of hybrid language models, on the weight of a module that never runs."""

    def __init__(self, width: int, hidden: int, kernel: int = 3) -> None:
        super().__init__()
        self.gates, self.out = nn.Linear(width, 3 * hidden), nn.Linear(hidden, width)
        self.conv = nn.Conv1d(hidden, hidden, kernel, groups=hidden, padding=kernel - 1)

    def forward(self, x: Tensor) -> Tensor:
        before, after, h = self.gates(x).transpose(1, 2).chunk(3, 1)
        h = F.pad(before * h, (self.conv.kernel_size[0] - 1, 0))
        h = F.conv1d(h, self.conv.weight, self.conv.bias, groups=h.shape[1])
        return x + self.out((after * h).transpose(1, 2))


class HybridLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front, self.mixer, self.head = nn.Linear(6, 8), ShortConvolution(8, 12), nn.Linear(8, 4)
        self.second = ShortConvolution(8, 10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.mixer(self.front(x))))


class Blurred(nn.Module):
    """A fixed filter, the same for every channel, laid out anew for as many channels as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("taps", torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16)
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU())
        self.last = nn.Conv2d(12, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.taps[None, None].repeat(x.shape[1], 1, 1, 1),
                     stride=2, groups=x.shape[1])  # fmt: skip
        return self.last(x).mean((2, 3))


class EqualLinear(nn.Module):
    """Weights of unit size, scaled in the forward pass (StyleGAN)."""

    def __init__(self, inputs: int, outputs: int, rate: float = 0.5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs) / rate), nn.Parameter(torch.zeros(outputs))
        self.scale, self.rate = rate / inputs**0.5, rate

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, bias=self.bias * self.rate)


class EqualConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, *, learned: bool = False, up: bool = False) -> None:
        super().__init__()
        shape = (inputs, outputs) if up else (outputs, inputs)
        self.weight, self.bias = nn.Parameter(torch.randn(*shape, kernel, kernel)), nn.Parameter(torch.zeros(outputs))
        self.scale = nn.Parameter(torch.tensor([1.3])) if learned else 1 / (inputs * kernel**2) ** 0.5
        self.convolve = F.conv_transpose2d if up else F.conv2d

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.scale * self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class Equalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mapping = nn.Sequential(EqualLinear(6, 14), nn.LeakyReLU(0.2), EqualLinear(14, 12), nn.LeakyReLU(0.2))
        self.start, self.first = EqualLinear(12, 90), EqualConv(10, 9, 3)
        self.second, self.last = EqualConv(9, 8, 3, up=True, learned=True), EqualConv(8, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.start(self.mapping(z)).unflatten(1, (-1, 3, 3))
        x = F.leaky_relu(self.first(x), 0.2)
        return self.last(F.leaky_relu(self.second(F.interpolate(x, scale_factor=2)), 0.2))


class ScaledStandard(nn.Conv2d):
    """Weights of mean zero and variance one in each row, times a gain that is learned (NF-ResNet, NFNet)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, **more: Any) -> None:
        super().__init__(inputs, outputs, kernel, **more)
        self.gain, self.scale = nn.Parameter(torch.ones(outputs, 1, 1, 1)), self.weight[0].numel() ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        w = F.batch_norm(rows, None, None, (self.gain * self.scale).view(-1), training=True, momentum=0.0, eps=1e-5)
        return F.conv2d(x, w.reshape_as(self.weight), self.bias, self.stride, self.padding, groups=self.groups)


class NormFree(nn.Module):
    def __init__(self, layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.stem, self.first = layer(3, 12, 3, padding=1), layer(12, 10, 3, padding=1)
        self.second, self.grouped = layer(10, 12, 1), layer(12, 12, 3, groups=2, padding=1)
        self.back, self.last = layer(12, 12, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        branch = F.silu(self.second(F.silu(self.first(x))))
        x = x + 0.5 * self.back(F.silu(self.grouped(branch)))
        return self.last(F.silu(x).mean((2, 3)))


class Generator(nn.Module):
    """A linear layer whose outputs are feature maps, normalised channel by channel."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.start, self.shape, self.norm = nn.Linear(6, 12 * 9), nn.Unflatten(1, (12, 3, 3)), norm(12)
        self.up, self.last = nn.ConvTranspose2d(12, 8, 3, 2, 1, 1), nn.ConvTranspose2d(8, 3, 3, 2, 1, 1)
        self.second = nn.BatchNorm2d(8)

    def forward(self, z: Tensor) -> Tensor:
        x = F.relu(self.norm(self.shape(self.start(z))))
        return torch.tanh(self.last(F.relu(self.second(self.up(x)))))


def _maps(dims: int) -> Callable[[int], Any]:
    return lambda rows: torch.randn(rows, 3, *[6 - dims] * dims)


PADDED = tuple(
    Family(
        name=f"convolutions called, {dims}d, {mode}",
        build=lambda dims=dims, mode=mode: Padded(dims, mode),
        example=_maps(dims),
        groups={"first": 2, "up": 3, "point": 2},
    )
    for dims, mode in ((1, "circular"), (2, "constant"), (2, "reflect"), (2, "one"), (3, "replicate"))
)

FAMILIES: tuple[Family, ...] = (
    Family(
        name="EfficientNet-Lite, convolutions called",
        build=EfficientNetLite,
        example=images(3, 9),
        groups={"stem": 2, "blocks.0.expand": 4, "blocks.1.expand": 6, "blocks.1.project": 3, "head": 6},
    ),
    *PADDED,
    Family(
        name="short convolutions of a module that never runs",
        build=HybridLanguageModel,
        example=lambda rows: torch.randn(rows, 7, 6),
        groups={"front": 2, "mixer.gates": 3, "second.gates": 2},
    ),
    Family(
        name="equalised weights",
        build=Equalised,
        example=lambda rows: torch.randn(rows, 6),
        groups={"mapping.0": 4, "mapping.2": 3, "start": 3, "first": 2, "second": 2},
    ),
    Family(
        name="scaled weight standardisation",
        build=lambda: NormFree(ScaledStandard),
        example=images(3, 6),
        groups={"stem": 4, "first": 3, "second": 2, "grouped": 2},
    ),
    Family(
        name="weight norm, columns",
        build=lambda: NormFree(lambda *args, **more: weight_norm(nn.Conv2d(*args, **more))),
        example=images(3, 6),
        groups={"stem": 4, "first": 3, "second": 2, "grouped": 2},
    ),
    *(
        Family(
            name=f"linear layer into feature maps, {kind}",
            build=lambda norm=norm: Generator(norm),
            example=lambda rows: torch.randn(rows, 6),
            groups={"start": 1 if "blocks" in kind else 4, "up": 2},
        )
        for kind, norm in (
            ("BatchNorm", nn.BatchNorm2d),
            ("GroupNorm", lambda width: nn.GroupNorm(width, width)),
            ("GroupNorm, blocks", lambda width: nn.GroupNorm(4, width)),
        )
    ),
    Family(name="fixed blur", build=Blurred, example=images(3, 8), groups={"body.0": 4}),
)
