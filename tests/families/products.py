"""Products of activations beyond softmax attention: linear attention, attention over streams of different widths."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from families.family import Family
from families.other import sequences


class LinearAttention(nn.Module):
    """phi(q) (phi(k)ᵀ v) / (phi(q) Σ phi(k)): sums over positions come first; written as products or as einsum."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.heads = form, 2
        self.q, self.k, self.v = nn.Linear(7, 8), nn.Linear(7, 8), nn.Linear(7, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        if self.form == "einsum":
            norm = 1 / torch.einsum("bhnd,bhd->bhn", q, k.sum(2))
            mixed = torch.einsum("bhnd,bhde,bhn->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v), norm)
        else:
            mixed = q @ (k.mT @ v) / (q @ k.sum(2)[..., None])
        return self.out(mixed.transpose(1, 2).flatten(2))


class Streams(nn.Module):
    """nn.MultiheadAttention of one stream over two others, all of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.read = nn.Linear(8, 12), nn.Linear(12, 3)
        self.attend = nn.MultiheadAttention(12, 2, dropout=0.1, kdim=7, vdim=5, batch_first=True)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.read(self.attend(self.enter(x), keys, values, need_weights=False)[0])


FAMILIES = (
    *(
        Family(
            name=f"linear attention, {form}",
            build=lambda form=form: LinearAttention(form),
            example=sequences((6, 7)),
            groups={"v": 4},
        )
        for form in ("matmul", "einsum")
    ),
    Family(
        name="nn.MultiheadAttention, three streams",
        build=Streams,
        example=sequences((6, 8), (5, 7), (5, 5)),
        groups={"enter": 3, "attend": 4, "attend#2": 4, "attend.out_proj": 3},
        missing={"attend": "the biases of queries, keys and values are one tensor, which pairs cannot be folded into"},
    ),
)
