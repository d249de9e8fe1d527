"""Branches cut from one tensor or summed over an axis of their own: split attention, selective kernels, parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from families.classic import images
from families.family import Family


def unit(inputs: int, outputs: int, kernel: int = 1, **more: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2 * more.get("dilation", 1), bias=False, **more)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class SplitAttention(nn.Module):
    """As in ResNeSt: several convolutions in one, weighed against one another channel by channel."""

    def __init__(self, inputs: int, width: int, radix: int = 2) -> None:
        super().__init__()
        self.radix = radix
        self.conv = unit(inputs, width * radix, 3, groups=radix)
        self.fc1, self.fc2 = nn.Conv2d(width, 6, 1), nn.Conv2d(6, width * radix, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        batch, both, height, width = x.shape
        x = x.reshape(batch, self.radix, both // self.radix, height, width)
        gap = x.sum(dim=1).mean((2, 3), keepdim=True)
        attention = self.fc2(F.relu(self.fc1(gap))).view(batch, 1, self.radix, -1).transpose(1, 2)
        attention = torch.softmax(attention, dim=1).reshape(batch, self.radix, -1, 1, 1)
        return (x * attention).sum(dim=1)


class SelectiveKernel(nn.Module):
    """As in SKNet: kernels of two sizes on halves of the input, weighed against one another channel by channel."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.in_channels, self.num_paths = inputs, 2
        self.paths = nn.ModuleList([unit(inputs // 2, width, 3), unit(inputs // 2, width, 3, dilation=2)])
        self.reduce, self.select = nn.Conv2d(width, 6, 1), nn.Conv2d(6, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x, self.in_channels // self.num_paths, 1)
        x = torch.stack([path(part) for path, part in zip(self.paths, parts, strict=True)], dim=1)
        attention = self.select(F.relu(self.reduce(x.sum(1).mean((2, 3), keepdim=True))))
        batch, both, height, width = attention.shape
        attention = attention.view(batch, self.num_paths, both // self.num_paths, height, width)
        return (x * torch.softmax(attention, dim=1)).sum(dim=1)


class Parts(nn.Module):
    """As in Res2Net: parts of one width, each convolved after the one before it was added."""

    def __init__(self, inputs: int, width: int, scale: int, outputs: int) -> None:
        super().__init__()
        self.width, self.nums = width, scale - 1
        self.conv1, self.conv3 = unit(inputs, width * scale), unit(width * scale, outputs)
        self.convs = nn.ModuleList(unit(width, width, 3) for _ in range(self.nums))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.conv1(x), self.width, 1)
        out, last = [], parts[0]
        for index, conv in enumerate(self.convs):
            last = conv(last if index == 0 else last + parts[index])
            out.append(last)
        return self.conv3(torch.cat([*out, parts[self.nums]], 1))


class CrossStage(nn.Module):
    """As in YOLO's C2f: one half goes on, the other through a bottleneck as well."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.c = outputs // 2
        self.cv1, self.cv2 = unit(inputs, 2 * self.c), unit(3 * self.c, outputs)
        self.m = nn.ModuleList([unit(self.c, self.c, 3)])

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).split((self.c, self.c), 1))
        parts.extend(block(parts[-1]) for block in self.m)
        return self.cv2(torch.cat(parts, 1))


class QueryKeyNorm(nn.Module):
    """Attention that normalises queries and keys over each head, as Qwen3, Gemma 3 and large vision transformers do."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim), nn.LayerNorm(self.head_dim)
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q, self.k, self.v))
        q, k, v = (part.transpose(1, 2) for part in (self.q_norm(q), self.k_norm(k), v))
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2))


class ResponseNorm(nn.Module):
    """As in ConvNeXt V2: every channel by its share of what all channels respond."""

    def __init__(self, width: int, first: bool) -> None:
        super().__init__()
        self.first = first
        shape = (width,) if first else (1, 1, 1, width)
        self.gamma, self.beta = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        size = torch.norm(x, p=2, dim=(2, 3) if self.first else (1, 2), keepdim=True)
        share = size / (size.mean(dim=1 if self.first else -1, keepdim=True) + 1e-6)
        gamma, beta = (p.view(-1, 1, 1) if self.first else p for p in (self.gamma, self.beta))
        return gamma * (x * share) + beta + x


class ResponseBlock(nn.Module):
    """Depthwise, then two layers with a global response norm between them, channels first or last."""

    def __init__(self, width: int, inner: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.dw, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width)
        self.pw1 = nn.Conv2d(width, inner, 1) if first else nn.Linear(width, inner)
        self.pw2 = nn.Conv2d(inner, width, 1) if first else nn.Linear(inner, width)
        self.grn = ResponseNorm(inner, first)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dw(x))
        y = y if self.first else y.permute(0, 2, 3, 1)
        y = self.pw2(self.grn(F.gelu(self.pw1(y))))
        return x + (y if self.first else y.permute(0, 3, 1, 2))


def network(*blocks: nn.Module, width: int) -> nn.Sequential:
    return nn.Sequential(
        unit(3, 8, 3), *blocks, unit(width, 9), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 4)
    )  # fmt: skip


def tokens(rows: int) -> Tensor:
    return torch.randn(rows, 5, 16)


FAMILIES = (
    Family(
        name="split attention",
        build=lambda: network(SplitAttention(8, 6), width=6),
        example=images(3, 6),
        groups={"0.0": 2, "1.conv.0": 2, "1.fc1": 2, "2.0": 3},
    ),
    Family(
        name="selective kernels",
        build=lambda: network(SelectiveKernel(8, 6), width=6),
        example=images(3, 6),
        groups={"0.0": 2, "1.paths.0.0": 2, "1.reduce": 2, "2.0": 3},
    ),
    Family(
        name="Res2Net", build=lambda: network(Parts(8, 5, 3, 7), width=7), example=images(3, 6),
        groups={"1.conv3.0": 2, "2.0": 3},
    ),
    Family(
        name="C2f", build=lambda: network(CrossStage(8, 10), width=10), example=images(3, 6),
        groups={"0.0": 2, "1.cv1.0": 2, "1.m.0.0": 2, "1.cv2.0": 3},
    ),
    Family(
        name="global response norm", build=lambda: network(ResponseBlock(8, 12, False), width=8), example=images(3, 6),
        groups={"1.pw1": 3, "2.0": 3},
    ),
    Family(
        name="global response norm, channels first", build=lambda: network(ResponseBlock(8, 12, True), width=8),
        example=images(3, 6), groups={"1.pw1": 3, "2.0": 3},
    ),
    Family(name="query-key norms, whole heads", build=QueryKeyNorm, example=tokens, groups={":heads": 1}),
)  # fmt: skip
