"""Small networks of the kinds that have residual branches, with an input each."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IDS = torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(3, 3, 9, 10, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in "qkv")
        self.proj, self.drop = nn.Linear(width, width), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.drop(self.proj(y.transpose(1, 2).flatten(2)))


class PackedAttention(nn.Module):
    """Its code has written sizes out, so that it can lose no part of its channels."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(x).split(width, dim=2)
        q, k, v = (y.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for y in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Pre-norm; the feed-forward branch is no module of its own."""

    def __init__(self, width: int = 16, *, packed: bool = False) -> None:
        super().__init__()
        self.n0, self.n1 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = PackedAttention(width, 4) if packed else Attention(width, 4)
        self.fc1, self.fc2 = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n0(x))
        return x + self.fc2(F.gelu(self.fc1(self.n1(x))))


class TorchBlock(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.n, self.a = nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True)
        self.n1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(x)
        x = x + self.a(h, h, h)[0]
        return x + self.mlp(self.n1(x))


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.dw, self.n = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.LayerNorm(width)
        self.p1, self.p2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(self.dw(x).permute(0, 2, 3, 1))
        h = self.scale * self.p2(F.gelu(self.p1(h)))
        return x + h.permute(0, 3, 1, 2)


class Tokens(nn.Module):
    def __init__(self, *blocks: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.e, self.b = nn.Embedding(20, width), nn.Sequential(*blocks)
        self.n, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.n(self.b(self.e(x))))


class Basic(nn.Module):
    """As torchvision's BasicBlock, addition in place included."""

    def __init__(self, wide_in: int, wide: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(wide_in, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide)
        self.conv2, self.bn2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False), nn.BatchNorm2d(wide)
        self.relu, self.down = nn.ReLU(inplace=True), _down(wide_in, wide, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.down is None else self.down(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """As torchvision's Bottleneck."""

    def __init__(self, wide_in: int, inner: int, wide: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(wide_in, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.relu, self.down = nn.ReLU(inplace=True), _down(wide_in, wide, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        out += x if self.down is None else self.down(x)
        return self.relu(out)


def _down(wide_in: int, wide: int, stride: int) -> nn.Module | None:
    if stride == 1 and wide_in == wide:
        return None
    return nn.Sequential(nn.Conv2d(wide_in, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))


def _images(*blocks: nn.Module, width: int) -> nn.Module:
    stem = (nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def _layer(**kwargs: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **kwargs)


def _bert() -> nn.Module:
    import transformers as hf

    config = hf.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    return hf.BertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    import transformers as hf

    config = hf.GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=4, n_positions=32, use_cache=False)
    return hf.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    import transformers as hf

    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=30, num_hidden_layers=2, use_cache=False, **sizes))


Call = tuple[tuple[Any, ...], dict[str, Any]]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Call, tuple[str, ...]]] = {
    "own": (lambda: Tokens(Block(), Block()), ((IDS,), {}), ("b.0.attn", "b.0.fc2", "b.1.attn", "b.1.fc2")),
    "packed": (lambda: Tokens(Block(packed=True)), ((IDS,), {}), ("b.0.attn", "b.0.fc2")),
    "torch": (lambda: Tokens(TorchBlock(), TorchBlock()), ((IDS,), {}), ("b.0.a", "b.0.mlp", "b.1.a", "b.1.mlp")),
    "encoder": (
        lambda: Tokens(_layer(), _layer(norm_first=True)),
        ((IDS,), {}),
        ("b.0.self_attn", "b.0.linear2", "b.1.self_attn", "b.1.linear2"),
    ),
    "convnext": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), ConvNeXtBlock(), ConvNeXtBlock(), *_images(width=8)[3:]),
        ((IMAGES,), {}),
        ("1.p2", "2.p2"),
    ),
    "basic": (
        lambda: _images(Basic(8, 8), Basic(8, 12, 2), Basic(12, 12), width=12),
        ((IMAGES,), {}),
        ("3.bn2", "4.bn2", "5.bn2"),
    ),
    "bottleneck": (
        lambda: _images(Bottleneck(8, 6, 16), Bottleneck(16, 6, 20, 2), Bottleneck(20, 6, 20), width=20),
        ((IMAGES,), {}),
        ("3.bn3", "4.bn3", "5.bn3"),
    ),
    "bert": (
        _bert,
        ((), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}),
        tuple(f"bert.encoder.layer.{i}.{part}output.dense" for i in (0, 1) for part in ("attention.", "")),
    ),
    "gpt2": (
        _gpt2,
        ((), {"input_ids": IDS}),
        tuple(f"transformer.h.{i}.{part}" for i in (0, 1) for part in ("attn", "mlp")),
    ),
    "llama": (
        _llama,
        ((), {"input_ids": IDS}),
        tuple(f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "mlp")),
    ),
}
"""By name: how it is built, what it is called with, and the names of its branches."""


def logits(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits
