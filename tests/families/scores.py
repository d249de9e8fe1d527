"""Scores that are written by hand, or scaled, pooled and normalised on the way: towers, cosines, masked units."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from families.family import Family
from families.other import sequences


class Towers(nn.Module):
    """Matrix factorisation beside a second tower: the dot product of two embeddings, multiplied and summed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(9, 8), nn.Linear(5, 8)
        self.bias = nn.Embedding(9, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.users(user) * self.items(item)).sum(-1, keepdim=True) / 8**0.5 + self.bias(user)


class Pointer(nn.Module):
    """Heads of one query over all positions: scores by multiplying and summing, divided by the root of a size."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.q, self.k, self.v, self.out = nn.Linear(7, 12), nn.Linear(7, 12), nn.Linear(7, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (self.q(x[:, :1]), self.k(x), self.v(x)))
        scores = (q * k).sum(dim=-1) / k.shape[-1] ** 0.5
        return self.out((scores.softmax(1)[..., None] * v).sum(1).flatten(1))


class Cosine(nn.Module):
    """Queries and keys of one packed layer, each of length one in every head, and a scale per head (Swin V2)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(7, 48), nn.Linear(16, 4)
        self.logit_scale = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(self.logit_scale, max=4.6).exp()
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1))


class MaskUnits(nn.Module):
    """Queries are the largest of several positions; torch's attention divides by the root of the size (Hiera)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim, self.q_stride = 2, 6, 2
        self.qkv, self.proj = nn.Linear(7, 36), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q = q.view(batch, self.heads, self.q_stride, -1, self.head_dim).amax(dim=2)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, -1, self.heads * self.head_dim))


class Latent(nn.Module):
    """Keys and values from one narrow layer; a part of the keys, which is rotated, all heads share (DeepSeek)."""

    def __init__(self) -> None:
        super().__init__()
        self.kv_lora_rank, self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = 8, 7, 4, 10
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.q = nn.Linear(8, 2 * 11)
        self.kv_a, self.kv_b, self.out = nn.Linear(8, 8 + 4), nn.Linear(8, 2 * 17), nn.Linear(20, 4)

    @staticmethod
    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * 0.8 + torch.cat((-second, first), -1) * 0.6

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, -1, self.qk_head_dim).transpose(1, 2)
        q, q_rot = torch.split(q, [self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        k, k_rot = torch.split(self.kv_a(x), [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        k = self.kv_b(k).view(batch, length, -1, self.qk_nope_head_dim + self.v_head_dim).transpose(1, 2)
        k, v = torch.split(k, [self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k_rot = self.turned(k_rot.view(batch, 1, length, self.qk_rope_head_dim)).expand(*k.shape[:-1], -1)
        q, k = torch.cat((q, self.turned(q_rot)), dim=-1), torch.cat((k, k_rot), dim=-1)
        scores = q @ k.transpose(2, 3) * 0.3
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1))


FAMILIES = (
    Family(
        name="two towers, dot product by hand",
        build=Towers,
        example=lambda rows: (torch.arange(rows) % 9, torch.randn(rows, 5)),
        groups={"users": 3},
    ),
    Family(name="heads of one query, by hand", build=Pointer, example=sequences((6, 7)), groups={"q": 4, "v": 2}),
    Family(name="cosine attention, packed", build=Cosine, example=sequences((6, 7)), groups={":heads": 1}),
    Family(name="largest queries", build=MaskUnits, example=sequences((6, 7)), groups={"qkv": 2}),
    Family(name="latent attention", build=Latent, example=sequences((6, 8)), groups={"q": 1, "kv_a": 1, "kv_b": 2}),
)
