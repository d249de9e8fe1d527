"""Networks that put out images: U-Net, autoencoder, GAN generator, super-resolution, diffusion U-Net."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from families.classic import images, vectors
from families.family import Family


class DoubleConv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
        )  # fmt: skip


class UNet(nn.Module):
    """Skips are concatenated, upsampled by interpolation or by a transposed convolution, padded to size."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.enter, self.down1, self.down2 = DoubleConv(3, 6), DoubleConv(6, 8), DoubleConv(8, 10)
        self.up2: nn.Module = nn.ConvTranspose2d(10, 8, 2, stride=2) if transposed else nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), nn.Conv2d(10, 8, 1)
        )  # fmt: skip
        self.up1: nn.Module = nn.ConvTranspose2d(8, 6, 2, stride=2) if transposed else nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(8, 6, 1)
        )  # fmt: skip
        self.merge2, self.merge1 = DoubleConv(16, 8), DoubleConv(12, 6)
        self.out = nn.Conv2d(6, 2, 1)

    @staticmethod
    def join(x: Tensor, skip: Tensor) -> Tensor:
        height, width = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        x = F.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2])
        return torch.cat([skip, x], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.enter(x)
        second = self.down1(F.max_pool2d(first, 2))
        x = self.down2(F.max_pool2d(second, 2))
        x = self.merge2(self.join(self.up2(x), second))
        return self.out(self.merge1(self.join(self.up1(x), first)))


def autoencoder() -> nn.Sequential:
    encoder = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(12 * 4, 10),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Linear(10, 12 * 4), nn.ReLU(), nn.Unflatten(1, (12, 2, 2)),
        nn.ConvTranspose2d(12, 8, 3, stride=2, padding=1, output_padding=1), nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 2, stride=2), nn.Sigmoid(),
    )  # fmt: skip
    return nn.Sequential(encoder, decoder)


class Generator(nn.Module):
    """A deep convolutional generator."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(6, 12, 3, 1, 0, bias=False), nn.BatchNorm2d(12), nn.ReLU(True),
            nn.ConvTranspose2d(12, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True),
            nn.ConvTranspose2d(8, 3, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z[:, :, None, None])


class SuperResolution(nn.Module):
    """Sub-pixel convolutions, with a residual body."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, 8, 5, padding=2)
        self.body1, self.body2 = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.up, self.shuffle, self.tail = (
            nn.Conv2d(8, 6 * 4, 3, padding=1),
            nn.PixelShuffle(2),
            nn.Conv2d(6, 1, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.head(x))
        x = x + self.body2(F.leaky_relu(self.body1(x), 0.2))
        return self.tail(torch.tanh(self.shuffle(self.up(x))))


class TimeBlock(nn.Module):
    """GroupNorm, SiLU, convolution; the embedded time is added in between."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(2, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        out = self.conv1(F.silu(self.norm1(x)))
        out = out + self.time(F.silu(time))[:, :, None, None]
        return self.conv2(F.silu(self.norm2(out))) + self.skip(x)


class SpatialAttention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(2, channels)
        self.qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, -1, height * width).transpose(-1, -2).unbind(1)
        out = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(batch, -1, height, width)
        return x + self.proj(out)


class DiffusionUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 12))
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.down = TimeBlock(8, 8, 12)
        self.pool = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.middle1, self.attention, self.middle2 = (
            TimeBlock(8, 12, 12),
            SpatialAttention(12, 2),
            TimeBlock(12, 12, 12),
        )
        self.up = TimeBlock(20, 8, 12)
        self.norm, self.out = nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 3, padding=1)

    @staticmethod
    def timestep(t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(100.0) * torch.arange(4, device=t.device, dtype=t.dtype) / 4)
        angles = t[:, None] * frequencies[None]
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.embed(self.timestep(t))
        x = self.enter(x)
        skip = self.down(x, time)
        x = self.middle2(self.attention(self.middle1(self.pool(skip), time)), time)
        x = torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skip], dim=1)
        return self.out(F.silu(self.norm(self.up(x, time))))


DOUBLE = ("enter", "down1", "down2", "merge2", "merge1")
#: Half of what a GroupNorm of two groups normalises; what its blocks share with a skip goes along and cannot go.
BLOCKS = {"down.conv1": 1, "middle1.conv1": 1, "middle2.conv1": 1, "up.conv1": 1}
UNET = {f"{name}.{index}": 2 for name in DOUBLE for index in (0, 3)}

FAMILIES = (
    Family(
        name="U-Net, interpolated",
        build=lambda: UNet(transposed=False),
        example=images(3, 10),
        groups={**UNET, "up2.1": 2, "up1.1": 2},
        rows=32,
    ),
    Family(
        name="U-Net, transposed",
        build=lambda: UNet(transposed=True),
        example=images(3, 10),
        groups={**UNET, "up2": 2, "up1": 2},
        rows=32,
    ),
    Family(
        name="autoencoder",
        build=autoencoder,
        example=images(1, 8),
        groups={"0.0": 3, "0.2": 4, "0.5": 3, "1.0": 4, "1.3": 3},
    ),
    Family(name="GAN generator", build=Generator, example=vectors(6), groups={"main.0": 4, "main.3": 3}),
    Family(
        name="super-resolution",
        build=SuperResolution,
        example=images(1, 6),
        groups={"head": 3, "body1": 4, "up": 2},
    ),
    Family(
        name="diffusion U-Net",
        build=DiffusionUNet,
        example=lambda rows: (torch.randn(rows, 3, 8, 8), torch.rand(rows) * 50),
        groups={"embed.0": 4, "embed.2": 4, "attention.qkv": 2, **BLOCKS},
        rows=32,
    ),
)
