"""Products of activations beside softmax attention: vectors multiplied with one another, sums over positions first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
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


def masked(mask: Callable[[Tensor], Tensor]) -> Structure:
    """Attention of four heads to whose scores a mask is added, which has a place for every head."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.q, self.k, self.v, self.o = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
            scores = q @ k.mT
            weights = (scores + mask(torch.zeros(1, 4, 5, 5, dtype=x.dtype))).softmax(-1)
            return self.o((weights @ v).transpose(1, 2).flatten(2))

    return analyse(Masked(), (X,), {})


PADDING = torch.where(torch.arange(5) < 4, 0.0, -1.0)
ALIKE: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros and a mask": lambda zeros: zeros + PADDING,
    "a mask laid out for every head": lambda zeros: (1.0 - PADDING.expand(1, 4, 5, 5)) * 2.0,
    "in place": lambda zeros: zeros.add_(PADDING).mul_(2.0),
    "a triangle": lambda zeros: (zeros + 1.0).tril() + PADDING,
}
APART: dict[str, Callable[[Tensor], Tensor]] = {
    "numbers of heads": lambda zeros: zeros + PADDING + torch.arange(4.0)[:, None, None],
    "running sums over heads": lambda zeros: (zeros + PADDING).cumsum(1),
    "one head's own": lambda zeros: torch.cat([zeros[:, :3] + PADDING, zeros[:, 3:] + PADDING.flip(0)], 1),
    "written into one head": lambda zeros: _written(zeros + PADDING),
    "heads as positions": lambda zeros: (zeros[0, :, :, :4] + PADDING[:4]).transpose(0, 2)[..., :1].expand(4, 5, 5),
}


def _written(mask: Tensor) -> Tensor:
    mask[:, 1] += torch.arange(5.0)
    return mask


@pytest.mark.parametrize("name", ALIKE)
def test_a_mask_that_is_the_same_for_all_heads_lets_them_go(name: str) -> None:
    assert named(masked(ALIKE[name]), ":heads").num_channels == 4


@pytest.mark.parametrize("name", APART)
def test_a_mask_that_tells_heads_apart_keeps_them(name: str) -> None:
    assert not any(group.name == ":heads" for group in masked(APART[name]).groups)


class Zeros(nn.Module):
    """Two layers of attention with four heads; one tensor of zeros is added to the scores of both, or one to each."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.shared, self.num_heads = shared, 4
        self.q, self.k = (nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(2))
        self.v, self.o = (nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        zeros = None
        for layer in zip(self.q, self.k, self.v, self.o, strict=True):
            q, k, v = (part(x).unflatten(-1, (-1, 2)).transpose(1, 2) for part in layer[:3])
            if zeros is None or not self.shared:
                zeros = x.new_zeros(1, q.shape[1], 5, 5) + PADDING.to(x)
            x = layer[3]((((q @ k.mT) + zeros).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x


@pytest.mark.parametrize("shared", [True, False])
def test_what_is_as_wide_as_the_heads_of_two_layers_keeps_them_equally_many(shared: bool) -> None:
    structure = analyse(Zeros(shared=shared), (X,), {})
    heads = {group.name: group.tied_groups for group in structure.groups if group.name.startswith(":heads")}
    assert heads == {":heads": (":heads#2",) if shared else (), ":heads#2": (":heads",) if shared else ()}


def test_one_filled_tensor_added_to_two_layers_keeps_them_equally_wide(removal) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            ones = torch.ones_like(x[0, 0, :1]).expand(self.a.out_features).contiguous()
            return self.c(torch.relu(self.b(torch.relu(self.a(x) + ones)) + ones))

    structure = removal(Shifted(), (X,), {"a": 6, "b": 6})
    assert named(structure, "a").tied_groups == ("b",)
