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


class Picked(nn.Module):
    """Every example multiplies with the matrices (and biases) of its own expert, picked from the stack."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.router = nn.Linear(6, 9), nn.Linear(6, 3)
        self.w1, self.b1 = nn.Parameter(torch.randn(3, 12, 9) / 3.0), nn.Parameter(torch.zeros(3, 12))
        self.w2 = nn.Parameter(torch.randn(3, 9, 12) / 3.5)
        self.out = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        share, best = self.router(x).softmax(-1).max(-1)
        h = self.enter(x)
        inner = F.gelu(torch.bmm(self.w1[best], h[..., None])[..., 0] + self.b1[best])
        return self.out(h + torch.bmm(inner[:, None], self.w2[best].mT)[:, 0] * share[:, None])


class Projected(nn.Module):
    """Heads as an axis of the projections' weights, in each of the two orders; joined again by a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Parameter(torch.randn(7, 2, 6) / 2.5) for _ in range(2))
        self.v = nn.Parameter(torch.randn(2, 7, 8) / 2.5)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (torch.einsum("bnd,dhe->bhne", x, w) for w in (self.q, self.k))
        v = torch.einsum("bnd,hde->bhne", x, self.v)
        weights = (torch.einsum("bhne,bhme->bhnm", q, k) * 0.4).softmax(-1)
        return self.out(torch.einsum("bhnm,bhme->bnhe", weights, v).flatten(2))


FAMILIES = (
    Family(
        name="experts picked for every example",
        build=Picked,
        example=lambda rows: torch.randn(rows, 6),
        groups={"enter": 3, "w1": 4},
        rows=256,
    ),
    Family(name="heads as an axis of weights", build=Projected, example=sequences((6, 7)), groups={"q": 1, "v": 2}),
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
