"""Products of activations: attention in its many spellings, its rows and heads, and what such a product still pins."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apoptosis.errors import StructureChangedError
from apoptosis.graph import analyse, replay
from apoptosis.records import Group, Seen, Structure

GEN = torch.Generator().manual_seed(0)
X, OTHER = torch.randn(3, 5, 8, generator=GEN), torch.randn(3, 7, 8, generator=GEN)
CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()

Way = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Queries, keys and values of layers of their own; `way` says how they are put together."""

    def __init__(self, way: Way, heads: int = 2, kv: int | None = None, dim: int = 4, *, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.num_heads, self.num_kv_heads, self.way, self.scaling = heads, kv or heads, way, dim**-0.5
        self.q, self.k = nn.Linear(8, heads * dim, bias), nn.Linear(8, self.num_kv_heads * dim, bias)
        self.v, self.o = nn.Linear(8, self.num_kv_heads * dim, bias), nn.Linear(heads * dim, 8, bias)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
        v = self.v(x).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
        return self.o(self.way(self, q, k, v).transpose(1, 2).flatten(2)).tanh()


class Sized(Attention):
    """The number of channels of a head is written down, and the same for queries, keys and values."""

    def __init__(self, way: Way) -> None:
        super().__init__(way)
        self.head_dim = 4

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(self.way(self, q, k, v).transpose(1, 2).flatten(2)).tanh()


def fused(**options: object) -> Way:
    return lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


def by_hand(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * m.scaling).softmax(-1) @ v


def masked(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * m.scaling).masked_fill(~CAUSAL, -1e9).softmax(-1) @ v


def einsum(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * m.scaling
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


def flat(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads in the batch, as bmm wants it."""
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return torch.bmm((torch.bmm(q, k.mT) * m.scaling).softmax(-1), v).unflatten(0, (-1, m.num_heads))


def repeated(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    times = m.num_heads // m.num_kv_heads
    return by_hand(m, q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1))


def expanded(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, t = k.shape[:3]
    times = m.num_heads // m.num_kv_heads
    k, v = (s[:, :, None].expand(b, h, times, t, s.shape[-1]).reshape(b, h * times, t, s.shape[-1]) for s in (k, v))
    return by_hand(m, q, k, v)


WAYS: dict[str, Way] = {
    "fused": fused(), "fused, with a scale": fused(scale=0.4), "fused, causal": fused(is_causal=True),
    "fused, boolean mask": fused(attn_mask=CAUSAL), "fused, additive mask": fused(attn_mask=torch.rand(5, 5).double()),
    "by hand": by_hand, "by hand, masked": masked, "einsum": einsum, "flat": flat,
}  # fmt: skip
GROUPED: dict[str, Way] = {"fused": fused(enable_gqa=True), "repeated": repeated, "expanded": expanded}


def model_of(attention: nn.Module) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(attention, nn.Linear(8, 2))


def named(structure: Structure, name: str) -> Group:
    return next(g for g in structure.groups if g.name == name)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", WAYS)
def test_pairs_values_and_heads_shrink(removal, name: str, bias: bool) -> None:
    structure = removal(model_of(Attention(WAYS[name], bias=bias)), (X,), {"0.q": 8, "0.v": 8, "0.o": 8, "0:heads": 2})
    pairs, values, heads = (named(structure, n) for n in ("0.q", "0.v", "0:heads"))
    assert (pairs.rows, values.rows, heads.rows) == (2, 2, 1)
    assert pairs.conflicts_with == values.conflicts_with == ("0:heads",)
    assert set(heads.conflicts_with) == {"0.q", "0.v"}
    (site,) = pairs.sites
    assert (site.kind, site.weight, site.dim, site.per_sum, site.functional) == ("product", "0.k.weight", 0, 4, True)
    assert site.bias == ("0.k.bias" if bias else None)
    own = name.startswith("fused") and "scale" not in name
    assert [r[0] for r in site.rescale] == (["0.q.weight", *(["0.q.bias"] if bias else [])] if own else [])
    for m in heads.members:
        assert m.positions.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("name", GROUPED)
def test_heads_that_share_a_key_go_together(removal, name: str) -> None:
    structure = removal(
        model_of(Attention(GROUPED[name], heads=4, kv=2)), (X,), {"0.q": 8, "0.v": 8, "0.o": 8, "0:heads": 2}
    )
    pairs, heads = named(structure, "0.q"), named(structure, "0:heads")
    sizes = {m.tensor: m.positions.shape[1] for m in pairs.members}
    assert sizes == {"0.q.weight": 2, "0.q.bias": 2, "0.k.weight": 1, "0.k.bias": 1}
    (site,) = pairs.sites
    assert (site.columns.shape, site.input_columns.shape, site.per_sum) == ((8, 1), (8, 2), 4)
    assert {m.tensor: m.positions.shape[1] for m in heads.members}["0.q.weight"] == 8


def test_one_head_has_pairs_and_values_alone(removal) -> None:
    structure = removal(model_of(Attention(by_hand, heads=1)), (X,), {"0.q": 4, "0.v": 4, "0.o": 8})
    assert [g.rows for g in structure.groups if g.pin is None] == [1, 1, 1]


def test_one_number_for_all_rows_makes_them_equal(removal) -> None:
    widths = {"0.q": 8, "0.v": 8, "0.o": 8, "0:heads": 2}
    structure = removal(model_of(Sized(by_hand)), (X,), widths)
    assert named(structure, "0.q").tied_groups == ("0.v",)
    assert named(structure, "0.v").tied_groups == ("0.q",)
    open_groups = removal(model_of(Attention(by_hand)), (X,), widths)
    assert named(open_groups, "0.q").tied_groups == named(open_groups, "0.v").tied_groups == ()


def test_values_may_be_wider_than_keys(removal) -> None:
    attention = Attention(by_hand)
    attention.v, attention.o = nn.Linear(8, 12), nn.Linear(12, 8)
    structure = removal(model_of(attention), (X,), {"0.q": 8, "0.v": 12, "0.o": 8, "0:heads": 2})
    assert named(structure, "0.v").rows == 2


class Norms(Attention):
    """Something lies between the keys' layer and the product: nothing may be folded there."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(self.way(self, q.tanh(), k.tanh(), v.tanh()).transpose(1, 2).flatten(2))


def test_behind_an_activation_pairs_are_sliced_only(removal) -> None:
    structure = removal(model_of(Norms(by_hand)), (X,), {"0.q": 8, "0.v": 8, "0.o": 8, "0:heads": 2})
    (site,) = named(structure, "0.q").sites
    assert (site.weight, site.bias, site.columns.size) == ("", None, 0)


def test_behind_an_activation_the_operators_own_scale_pins() -> None:
    pin = named(analyse(model_of(Norms(fused())), (X,), {}), "0.q").pin
    assert pin is not None
    assert "divides by the root of the number of channels by itself" in pin.reason
    assert "scale=" in pin.remedy


def test_the_keys_side_folds_where_it_is_plain() -> None:
    class Half(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
            return self.o(self.way(self, q, k.tanh(), v).transpose(1, 2).flatten(2))

    (site,) = named(analyse(model_of(Half(by_hand)), (X,), {}), "0.q").sites
    assert (site.weight, site.bias) == ("0.q.weight", "0.q.bias")


def test_products_along_an_axis_of_other_channels_pin() -> None:
    def linear_attention(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q @ (k.mT @ v)

    structure = analyse(model_of(Attention(linear_attention)), (X,), {})
    assert named(structure, "0.v").pin is None
    for name in ("0.q", "0.k"):
        pin = named(structure, name).pin
        assert pin is not None
        assert "aten.bmm in '0'" in pin.reason
        assert pin.where.startswith("test_products.py:")
        assert pin.remedy
    assert named(structure, "0.o").pin is None


def test_a_bias_of_every_head_goes_with_the_head(removal) -> None:
    class Biased(Attention):
        def __init__(self) -> None:
            super().__init__(by_hand)
            self.slope = nn.Parameter(torch.rand(2, 1, 1))
            self.way = lambda m, q, k, v: ((q @ k.mT) * m.scaling + m.slope * CAUSAL).softmax(-1) @ v

    structure = removal(model_of(Biased()), (X,), {"0.q": 8, "0.v": 8, "0.o": 8, "0:heads": 2})
    assert "0.slope" in {m.tensor for m in named(structure, "0:heads").members}


class Bilinear(nn.Module):
    """A product of two layers' channels that is no attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x) @ self.b(y).mT


def test_a_product_may_be_the_output(removal) -> None:
    structure = removal(Bilinear(), (X, OTHER), {"a": 6})
    group = structure.groups[0]
    assert {m.tensor for m in group.members} == {"a.weight", "a.bias", "b.weight", "b.bias"}
    (site,) = group.sites
    assert (site.weight, site.num_columns, site.rescale, site.per_sum) == ("b.weight", 6, (), 6)
    assert site.macs == pytest.approx(3 * 5 * 7)


def test_channels_times_themselves_are_sliced_only(removal) -> None:
    class Gram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.a = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return (h := self.a(x)) @ h.mT

    (site,) = removal(Gram(), (X,), {"a": 6}).groups[0].sites
    assert site.weight == ""


def test_a_squared_norm_by_a_product_is_a_sum_of_pairs(removal) -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h) + (h[..., None, :] @ h[..., :, None])[..., 0]

    structure = removal(Squared(), (X,), {"a": 6})
    assert [s.kind for s in structure.groups[0].sites] == ["linear", "product"]


def seen_in(model: nn.Module, x: Tensor) -> dict[str, Seen]:
    found: dict[str, Seen] = {}
    replay(model, (x,), {}, lambda seen: found.update({seen.site: seen}), training=False)
    return found


@pytest.mark.parametrize(("name", "heads", "kv"), [("by hand", 2, 2), ("fused", 2, 2), ("repeated", 4, 2)])
def test_replay_shows_both_operands_row_by_row(name: str, heads: int, kv: int) -> None:
    attention = Attention((WAYS | GROUPED)[name], heads=heads, kv=kv)
    model = model_of(attention).eval()
    (site,) = named(analyse(model, (X,), {}), "0.q").sites
    seen = seen_in(model, X)[site.key]
    assert seen.right is not None
    per_sum = site.per_sum
    rows = seen.x.shape[-1] // per_sum
    with torch.no_grad():
        q = attention.q(X).unflatten(-1, (heads, -1)).transpose(1, 2)
        k = attention.k(X).unflatten(-1, (kv, -1)).transpose(1, 2).repeat_interleave(heads // kv, 1)
    assert seen.x.shape[-1] == seen.right.shape[-1] == heads * 4
    assert seen.x.shape[-2:-1] == seen.right.shape[-2:-1] == (5,)
    left = seen.x.unflatten(-1, (rows, per_sum)).transpose(-2, -3)
    right = seen.right.unflatten(-1, (rows, per_sum)).transpose(-2, -3)
    torch.testing.assert_close(left @ right.mT, q @ k.mT)
    torch.testing.assert_close(left, q)
    assert sorted(site.input_columns.reshape(-1).tolist()) == list(range(heads * 4))


def test_positions_of_a_pair_are_where_its_channel_stands() -> None:
    model = model_of(Attention(by_hand)).eval()
    structure = analyse(model, (X,), {})
    pairs = named(structure, "0.q")
    (site,) = pairs.sites
    with torch.no_grad():
        for tensor in (model[0].q.weight, model[0].q.bias):
            tensor[pairs.members[0].positions[5]] = 0.0
    silent = seen_in(model, X)[site.key].x.abs().amax((0, 1)) == 0
    assert np.flatnonzero(silent.numpy()).tolist() == site.input_columns[5].tolist()


class Literal(nn.Module):
    """The number of heads is written out, so that nothing can follow it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(((q @ k.mT) * 0.5).softmax(-1).matmul(v).transpose(1, 2).flatten(2)).tanh()


def test_heads_that_become_two_halves_of_one_are_refused(removal) -> None:
    """The shapes fit and no channel meets another one, but two heads of half the size is not what was meant."""
    with pytest.raises(StructureChangedError):
        removal(model_of(Literal()), (X,), {"0.q": 8, "0.v": 8, "0.o": 8, "0:heads": 2})
