"""Networks of the comparison that the recipes do not have: small CNN, VGG-11, ResNet-20, ViT, GPT, AlexNet for 64
pixels, autoencoder.

Holds: plain torch.nn modules. Elsewhere: data, training.
References: Dosovitskiy et al., arXiv 2010.11929; Radford et al., 2019; Krizhevsky, Sutskever, Hinton, NIPS 2012;
Hinton, Salakhutdinov, Science 313 (2006); Simonyan, Zisserman, arXiv 1409.1556 (VGG); He, Zhang, Ren, Sun, arXiv
1512.03385 (ResNet-20).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apoptosis.tools.recipes.networks import Design, Residual

POOL = 0  # in a plan of widths: halve the image
VGG_11 = (32, POOL, 64, POOL, 128, 128, POOL, 256, 256, POOL, 256, 256, POOL)


class Attention(nn.Module):
    """Multi-head self-attention with separate projections."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.num_heads, self.head_dim, self.causal = heads, width // heads, causal
        self.scale = self.head_dim**-0.5

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.num_heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=self.scale)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, hidden: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


class ViT(nn.Module):
    """Patches of 4x4, class by the mean of the tokens."""

    def __init__(self, *, width: int = 128, heads: int = 4, depth: int = 4, hidden: int = 512) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits


class GPT(nn.Module):
    """Characters in, logits of the next character out, (batch, length, vocabulary)."""

    def __init__(
        self, vocabulary: int, length: int, *, width: int = 128, heads: int = 4, depth: int = 4, hidden: int = 512
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))
        return logits


def small_cnn(scale: float = 1.0) -> nn.Sequential:
    """AlexNet's plan for 32 pixels: early downsampling, narrow convolutions (32-64-128), two layers of 2048."""
    c1, c2, c3 = (max(8, round(c * scale)) for c in (32, 64, 128))
    hidden = max(8, round(2048 * scale))
    return nn.Sequential(
        nn.Conv2d(3, c1, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(c1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(c1, c2, 3, padding=1, bias=False), nn.BatchNorm2d(c2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(c2, c3, 3, padding=1, bias=False), nn.BatchNorm2d(c3), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * c3, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10),
    )  # fmt: skip


def alexnet(scale: float = 1.0) -> nn.Sequential:
    """AlexNet's layers with strides for 64 pixels: 64-192-384-256-256 and two hidden layers of 4096."""
    c1, c2, c3, c4, c5 = (max(8, round(c * scale)) for c in (64, 192, 384, 256, 256))
    hidden = max(8, round(4096 * scale))
    return nn.Sequential(
        nn.Conv2d(3, c1, 11, stride=4, padding=5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(c1, c2, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(c2, c3, 3, padding=1), nn.ReLU(),
        nn.Conv2d(c3, c4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(c4, c5, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(9 * c5, hidden), nn.ReLU(),
        nn.Dropout(0.5), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10),
    )  # fmt: skip


def autoencoder(scale: float = 1.0, code: int = 32) -> nn.Sequential:
    """784-1024-512-code and back; reconstructs standardised pixels."""
    a, b = (max(8, round(w * scale)) for w in (1024, 512))
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, code),
        nn.Linear(code, b), nn.ReLU(), nn.Linear(b, a), nn.ReLU(), nn.Linear(a, 784),
    )  # fmt: skip


def vgg11(scale: float = 1.0) -> nn.Sequential:
    """VGG-11 with BatchNorm at half its widths, for 32 pixels; two hidden layers of 2048 as in VGG, no dropout."""
    layers: list[nn.Module] = []
    planes, hidden = 3, round(2048 * scale)
    for width in VGG_11:
        if width == POOL:
            layers.append(nn.MaxPool2d(2))
            continue
        channels = round(width * scale)
        layers += [nn.Conv2d(planes, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        planes = channels
    head = (nn.Linear(planes, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    return nn.Sequential(*layers, nn.Flatten(), *head)


def resnet(
    scale: float = 1.0, *, planes: int = 3, widths: tuple[int, ...] = (16, 32, 64), blocks: int = 3
) -> nn.Sequential:
    """ResNet-20 for 32 pixels: three stages of three blocks of two convolutions."""
    channels = [max(4, round(width * scale)) for width in widths]
    design = Design(shape=(planes, 32, 32), num_classes=10, widths=tuple(channels), activation="relu", dropout=0.0)
    layers: list[nn.Module] = [nn.Conv2d(planes, channels[0], 3, padding=1, bias=False)]
    layers += [nn.BatchNorm2d(channels[0]), nn.ReLU()]
    last = channels[0]
    for stage, width in enumerate(channels):
        for block in range(blocks):
            layers.append(Residual(last, width, 2 if stage and not block else 1, design))
            last = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10))
