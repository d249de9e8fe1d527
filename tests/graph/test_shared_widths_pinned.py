"""Groups that have one width with a group that is pinned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apoptosis.graph import analyse

X = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))


class Normed(nn.Module):
    """Queries and keys under a norm of each head, which pins them; values split by the same number, or by torch."""

    def __init__(self, *, number: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.heads, self.number = 2, number
        if number:
            self.head_dim = 6
        self.q, self.k, self.v = (nn.Linear(7, 12) for _ in range(3))
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = (-1, self.head_dim) if self.number else (self.heads, -1)
        q, k, v = (m(x).unflatten(-1, rows) for m in (self.q, self.k, self.v))
        q, k = (self.norm(part).transpose(1, 2) for part in (q, k))
        return self.out((torch.softmax(q @ k.mT, -1) @ v.transpose(1, 2)).transpose(1, 2).flatten(2))


def test_values_split_by_the_number_of_pinned_queries_are_pinned() -> None:
    pins = {g.name: g.pin for g in analyse(Normed(number=True), (X,)).groups}
    pin = pins["v"]
    assert pin is not None
    assert pin.reason.startswith("they share the width of 'q' in rows of the model, which is pinned: ")
    assert pin.reason.endswith("normalises over channels")
    assert pin.where.startswith("test_shared_widths_pinned.py:")


class Stacked(nn.Module):
    """Two layers stacked, one of which is an output as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(7, 10), nn.Linear(7, 10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.a(x), self.b(x)
        first, second = torch.stack([a, b], 0).unbind(0)
        return self.o(second), first


def test_a_layer_stacked_with_an_output_keeps_its_width() -> None:
    pins = {g.name: g.pin for g in analyse(Stacked(), (X,)).groups}
    assert pins["b"] is not None
    shared = "they share the width of 'a' in one tensor, which is pinned: they are the network's output '[1]'"
    assert pins["b"].reason == shared


def test_values_whose_width_is_left_to_torch_are_free(removal) -> None:
    removal(Normed(number=False), (X,), {"v": 12, ":heads": 2})
