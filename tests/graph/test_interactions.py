"""Products of activations beside softmax attention: vectors multiplied with one another, sums over positions first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apoptosis.graph import analyse
from apoptosis.records import Group, Structure

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


def named(structure: Structure, name: str) -> Group:
    return next(g for g in structure.groups if g.name == name)


class Interactions(nn.Module):
    """Every two of several vectors are multiplied: columns of all tables go together, channel by channel."""

    def __init__(self, *, constant: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second, self.out = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(9, 2)
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.first(x), self.second(x)
        vectors = torch.stack([one, two, x[..., :6] if self.constant else two.tanh()], dim=-2)
        return self.out((vectors @ vectors.mT).flatten(-2))


def test_vectors_that_are_multiplied_with_one_another_share_their_channels(removal) -> None:
    structure = removal(Interactions(), (X,), {"first": 6})
    group = named(structure, "first")
    assert {m.tensor for m in group.members if m.role == "producer"} == {"first.weight", "second.weight"}
    (site,) = group.sites
    assert (site.kind, site.weight, site.per_sum) == ("product", "", 6)


def test_vectors_of_the_input_among_them_pin_the_others() -> None:
    pin = named(analyse(Interactions(constant=True), (X,), {}), "first").pin
    assert pin is not None
    assert "none" in pin.reason


def test_one_side_with_several_vectors_folds_into_the_other(removal) -> None:
    class Query(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.tables, self.query = nn.Linear(8, 12), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.tables(x).unflatten(-1, (2, -1)) @ self.query(x)[..., None]

    (site,) = named(removal(Query(), (X,), {"tables": 6}), "tables").sites
    assert site.weight == "query.weight"


def test_a_sum_that_divides_each_heads_values_leaves_their_channels_apart(removal) -> None:
    class Divided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.q, self.k, self.v, self.o = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (self.q(x).exp(), self.k(x).exp(), self.v(x)))
            mixed = q @ (k.mT @ v) / (q @ k.sum(-2)[..., None])
            return self.o(mixed.transpose(1, 2).flatten(2))

    structure = removal(Divided(), (X,), {"v": 8})
    assert named(structure, "v").rows == 2
