"""Attention, gates and experts by torch alone: its own transformer layers, and the ways people write them by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from families.family import Family

VOCABULARY = 20


def sequences(*shapes: tuple[int, int]) -> Callable[[int], tuple[Tensor, ...]]:
    """Inputs of the given (length, width)."""
    return lambda rows: tuple(torch.randn(rows, *shape) for shape in shapes)


def words(rows: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, 6))


def layer(kind: type[nn.Module], num_heads: int = 2, **more: Any) -> nn.Module:
    return kind(12, num_heads, 20, dropout=0.1, batch_first=True, **more)


class CausalSelfAttention(nn.Module):
    """As in nanoGPT, but for the head size, which is kept apart from the width of the model.

    form: "flash" for torch's own operator, else by hand, with a scale that is a number or (own scale) follows the size.
    """

    def __init__(self, width: int, num_heads: int, length: int, form: str) -> None:
        super().__init__()
        self.n_head, self.head_dim, self.form = num_heads, width // num_heads, form
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.1), nn.Dropout(0.1)
        self.register_buffer("bias", torch.tril(torch.ones(length, length)).view(1, 1, length, length))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.size()
        q, k, v = self.c_attn(x).chunk(3, dim=2)
        q, k, v = (y.view(rows, length, self.n_head, self.head_dim).transpose(1, 2) for y in (q, k, v))
        if self.form == "flash":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scale = 1.0 / math.sqrt(k.size(-1)) if self.form == "own scale" else 0.4
            att = (q @ k.transpose(-2, -1)) * scale
            att = att.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(rows, length, -1)))


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int, length: int, form: str) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, num_heads, length, form)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 2 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(2 * width, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](self.mlp["gelu"](self.mlp["c_fc"](self.ln_2(x))))


class GPT(nn.Module):
    """Input and output embeddings are one tensor; the mask is a buffer."""

    def __init__(self, form: str, width: int = 12, num_heads: int = 2, length: int = 8) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.h = nn.ModuleList(Block(width, num_heads, length, form) for _ in range(2))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, numbers: Tensor) -> Tensor:
        x = self.wte(numbers) + self.wpe(torch.arange(numbers.size(1), device=numbers.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class GatedMLP(nn.Module):
    """down(up(x) * φ(gate(x))); fused: up and gate are the halves of one layer."""

    def __init__(self, activation: Callable[[Tensor], Tensor], *, fused: bool, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(8, 10, bias=bias)
        self.activation, self.fused = activation, fused
        self.up = nn.Linear(10, 32 if fused else 16, bias=bias)
        self.gate = None if fused else nn.Linear(10, 16, bias=bias)
        self.down = nn.Linear(16, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        up, gate = self.up(x).chunk(2, -1) if self.gate is None else (self.up(x), self.gate(x))
        return self.down(up * self.activation(gate))


class Expert(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.gelu(self.w1(x)))


class Experts(nn.Module):
    """Mixture of experts; sparse: every expert sees its own examples, else all of them, weighted."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.sparse = sparse
        self.inner, self.outer = nn.Linear(6, 9), nn.Linear(9, 4)
        self.router = nn.Linear(9, 3)
        self.experts = nn.ModuleList(Expert(9, 12) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        shares = self.router(x).softmax(-1)
        if not self.sparse:
            return self.outer(x + sum(shares[:, i, None] * expert(x) for i, expert in enumerate(self.experts)))
        best, chosen = shares.topk(2, -1)
        mixed = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            row, place = torch.where(chosen == i)
            mixed.index_add_(0, row, expert(x[row]) * best[row, place, None])
        return self.outer(x + mixed)


class StackedExperts(nn.Module):
    """The experts' weights are slices of two tensors."""

    def __init__(self, *, loop: bool) -> None:
        super().__init__()
        self.loop = loop
        self.router = nn.Linear(6, 3)
        self.w1 = nn.Parameter(torch.randn(3, 6, 12) / 2.5)
        self.w2 = nn.Parameter(torch.randn(3, 12, 6) / 3.5)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        if self.loop:
            return sum(shares[:, i, None] * ((x @ self.w1[i]).relu() @ self.w2[i]) for i in range(3))
        hidden = torch.einsum("bd,edh->beh", x, self.w1).relu()
        return (torch.einsum("beh,ehd->bed", hidden, self.w2) * shares[..., None]).sum(1)


class CrossAttention(nn.Module):
    """Queries from one sequence, keys and values from another of another width."""

    def __init__(self, form: str, num_heads: int = 2) -> None:
        super().__init__()
        self.form, self.heads = form, num_heads
        self.enter = nn.Linear(8, 9)
        self.q, self.k, self.v = nn.Linear(9, 12), nn.Linear(7, 12), nn.Linear(7, 16)
        self.out = nn.Linear(16, 9)
        self.read = nn.Linear(9, 3)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.enter(x)
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), self.k(context), self.v(context))
        )
        if self.form == "einsum":
            weights = (torch.einsum("bhqd,bhkd->bhqk", q, k) / 6.0**0.5).softmax(-1)
            mixed = torch.einsum("bhqk,bhkd->bhqd", weights, v)
        elif self.form == "sdpa":
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = ((q @ k.mT) / 6.0**0.5).softmax(-1) @ v
        return self.read(x + self.out(mixed.transpose(1, 2).flatten(2)))


class MultiQuery(nn.Module):
    """All heads of the queries share one key and one value."""

    def __init__(self, *, sdpa: bool) -> None:
        super().__init__()
        self.heads, self.sdpa = 3, sdpa
        self.enter, self.q, self.kv = nn.Linear(7, 8), nn.Linear(8, 15), nn.Linear(8, 10)
        self.out = nn.Linear(15, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).tanh()
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (y.unsqueeze(1) for y in self.kv(x).chunk(2, -1))
        if self.sdpa:
            k, v = (y.expand(-1, self.heads, -1, -1) for y in (k, v))
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-1, -2) * 5.0**-0.5).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class Rotary(nn.Module):
    """Queries and keys turned by their position, in halves or in neighbours; tables are buffers."""

    def __init__(self, *, neighbours: bool, num_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.neighbours = num_heads, neighbours
        self.q, self.k = (nn.Linear(7, 8 * num_heads, bias=False) for _ in range(2))
        self.v, self.o = nn.Linear(7, 6 * num_heads, bias=False), nn.Linear(6 * num_heads, 4, bias=False)
        angles = torch.outer(torch.arange(8.0), 100.0 ** (-torch.arange(0, 8, 2) / 8))
        angles = angles.repeat_interleave(2, -1) if neighbours else torch.cat((angles, angles), -1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def turn(self, x: Tensor) -> Tensor:
        if self.neighbours:
            turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        else:
            first, second = x.chunk(2, -1)
            turned = torch.cat((-second, first), -1)
        length = x.shape[-2]
        return x * self.cos[:length] + turned * self.sin[:length]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        mixed = (self.turn(q) @ self.turn(k).transpose(-1, -2) * 8.0**-0.5).softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).flatten(2))


def encoder(**more: Any) -> nn.Module:
    stack = nn.TransformerEncoder(layer(nn.TransformerEncoderLayer, **more), 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(5, 12), stack, nn.Linear(12, 3))


def _each(stem: str, groups: dict[str, int], num: int = 2) -> dict[str, int]:
    return {f"{stem.format(i)}{name}": planted for i in range(num) for name, planted in groups.items()}


ENCODER = _each("1.layers.{}", {".linear1": 6, ".self_attn": 4, ".self_attn#2": 4})
DECODER = _each(
    "layers.{}", {".linear1": 6, ".self_attn": 4, ".self_attn#2": 4, ".multihead_attn": 4, ".multihead_attn#2": 4}
)
TRANSFORMERS = (
    Family(
        name="nn.TransformerEncoder",
        build=encoder,
        example=sequences((6, 5)),
        groups=ENCODER,
    ),
    Family(
        name="nn.TransformerEncoder, norm first",
        build=lambda: encoder(norm_first=True, activation="gelu"),
        example=sequences((6, 5)),
        groups=ENCODER,
    ),
    Family(
        name="nn.TransformerEncoder, whole heads",
        build=lambda: encoder(num_heads=4),
        example=sequences((6, 5)),
        groups=_each("1.layers.{}", {".self_attn:heads": 1}),
    ),
    Family(
        name="nn.TransformerDecoder",
        build=lambda: nn.TransformerDecoder(layer(nn.TransformerDecoderLayer), 2),
        example=sequences((6, 12), (7, 12)),
        groups=DECODER,
    ),
)
BY_HAND = (
    *(
        Family(
            name=f"nanoGPT, {form}",
            build=lambda form=form: GPT(form),
            example=words,
            groups=_each("h.{}.", {"attn.c_attn": 4, "mlp.c_fc": 6}),
        )
        for form in ("by hand", "own scale", "flash")
    ),
    *(
        Family(
            name=f"cross-attention, {form}",
            build=lambda form=form: CrossAttention(form),
            example=sequences((6, 8), (5, 7)),
            groups={"enter": 3, "q": 4, "v": 6},
        )
        for form in ("matmul", "einsum", "sdpa")
    ),
    *(
        Family(
            name=f"multi-query, {form}",
            build=lambda form=form: MultiQuery(sdpa=form == "sdpa"),
            example=sequences((6, 7)),
            groups={"enter": 3, "q": 2},
        )
        for form in ("matmul", "sdpa")
    ),
    *(
        Family(
            name=f"rotary, {form}",
            build=lambda form=form: Rotary(neighbours=form == "neighbours"),
            example=sequences((6, 7)),
            groups={"q": 1, "v": 4},
        )
        for form in ("halves", "neighbours")
    ),
)
WHOLE_HEADS = (
    Family(
        name="nanoGPT, whole heads",
        build=lambda: GPT("flash", width=16, num_heads=4),
        example=words,
        groups=_each("h.{}.", {"attn:heads": 1}),
    ),
    *(
        Family(
            name=f"cross-attention, whole heads, {form}",
            build=lambda form=form: CrossAttention(form, num_heads=4),
            example=sequences((6, 8), (5, 7)),
            groups={":heads": 1},
        )
        for form in ("matmul", "sdpa")
    ),
    Family(
        name="rotary, whole heads",
        build=lambda: Rotary(neighbours=False, num_heads=4),
        example=sequences((6, 7)),
        groups={":heads": 1},
    ),
)
FEED_FORWARD = (
    Family(
        name="GLU",
        build=lambda: nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 32), nn.GLU(), nn.Linear(16, 4)),
        example=lambda rows: torch.randn(rows, 8),
        groups={"0": 3, "2": 5},
    ),
    *(
        Family(
            name=name,
            build=lambda act=act, fused=fused, bias=bias: GatedMLP(act, fused=fused, bias=bias),
            example=lambda rows: torch.randn(rows, 8),
            groups={"first": 3, "up": 5},
        )
        for name, act, fused, bias in (
            ("SwiGLU", F.silu, False, False),
            ("SwiGLU, fused", F.silu, True, False),
            ("GEGLU", F.gelu, False, True),
            ("ReGLU, fused", F.relu, True, True),
        )
    ),
    *(
        Family(
            name=f"experts, {form}",
            build=lambda form=form: Experts(sparse=form == "sparse"),
            example=lambda rows: torch.randn(rows, 6),
            groups={"inner": 3, **_each("experts.{}.", {"w1": 4}, 3)},
            rows=256,
        )
        for form in ("sparse", "dense")
    ),
    *(
        Family(
            name=f"stacked experts, {form}",
            build=lambda form=form: StackedExperts(loop=form == "loop"),
            example=lambda rows: torch.randn(rows, 6),
            groups={"w1": 4},
            rows=128,
        )
        for form in ("loop", "einsum")
    ),
)
FAMILIES = (*TRANSFORMERS, *BY_HAND, *WHOLE_HEADS, *FEED_FORWARD)
