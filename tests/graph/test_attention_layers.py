"""torch's own attention: packed and separate projections, self- and cross-attention, whole transformer layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from apoptosis.errors import ShapeError
from apoptosis.graph import analyse
from apoptosis.records import Structure

GEN = torch.Generator().manual_seed(0)
X, OTHER = torch.randn(3, 5, 8, generator=GEN), torch.randn(3, 7, 8, generator=GEN)


class Self(nn.Module):
    def __init__(self, *, weights: bool, **options: object) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.mid = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.b, self.weights = nn.Linear(8, 2), weights
        for bias in (self.mid.in_proj_bias, self.mid.out_proj.bias):
            if bias is not None:
                nn.init.normal_(bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(self.mid(h, h, h, need_weights=self.weights)[0].tanh())


class Cross(nn.Module):
    """Queries of one stream, keys and values of another, of other widths or the same."""

    def __init__(self, *, kdim: int, weights: bool, one: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.c, self.d = nn.Linear(8, 8), nn.Linear(8, kdim), nn.Linear(8, kdim)
        self.mid = nn.MultiheadAttention(8, 2, batch_first=True, kdim=kdim, vdim=kdim)
        self.b, self.weights, self.one = nn.Linear(8, 2), weights, one
        if one:
            del self.d

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        q, k = self.a(x), self.c(other)
        v = k if self.one else self.d(other)
        return self.b(self.mid(q, k, v, need_weights=self.weights)[0].tanh())


def open_groups(structure: Structure) -> dict[str, int]:
    return {g.name: g.num_channels for g in structure.groups if g.pin is None}


INSIDE = {"mid": 8, "mid#2": 8, "mid.out_proj": 8}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_self_attention_shrinks(removal, bias: bool, weights: bool) -> None:
    heads = {} if weights else {"mid:heads": 2}
    structure = removal(Self(weights=weights, bias=bias), (X,), {"a": 8, **INSIDE, **heads})
    a, pairs, values = structure.groups[:3]
    assert [(s.weight, s.dim, s.columns.shape) for s in a.sites] == [("mid.in_proj_weight", 1, (8, 1))]
    assert [m.positions[0].tolist() for m in pairs.members] == [[0, 8]] * (2 if bias else 1)
    assert [m.positions[0].tolist() for m in values.members] == [[16]] * (2 if bias else 1)
    assert (pairs.rows, values.rows) == (2, 2)
    assert [s.weight for s in values.sites] == ["mid.out_proj.weight"]


@pytest.mark.parametrize("one", [True, False], ids=["key is value", "three streams"])
@pytest.mark.parametrize("weights", [True, False])
def test_cross_attention_with_separate_projections_shrinks(removal, weights: bool, one: bool) -> None:
    streams = {"a": 8, "c": 6} if one else {"a": 8, "c": 6, "d": 6}
    heads = {} if weights else {"mid:heads": 2}
    structure = removal(Cross(kdim=6, weights=weights, one=one), (X, OTHER), {**streams, **INSIDE, **heads})
    c = next(g for g in structure.groups if g.name == "c")
    read = ["mid.k_proj_weight", "mid.v_proj_weight"] if one else ["mid.k_proj_weight"]
    assert [(s.module, s.weight, s.functional) for s in c.sites] == [("mid", weight, True) for weight in read]


@pytest.mark.parametrize("one", [True, False], ids=["key is value", "three streams"])
@pytest.mark.parametrize("weights", [True, False])
def test_cross_attention_with_one_packed_projection_shrinks_inside(removal, weights: bool, one: bool) -> None:
    """Several streams meet the same columns, each in rows of its own: the streams stay as wide as they are."""
    heads = {} if weights else {"mid:heads": 2}
    structure = removal(Cross(kdim=8, weights=weights, one=one), (X, OTHER), {**INSIDE, **heads})
    pin = structure.groups[0].pin
    assert pin is not None
    assert "in 'mid' reads part of the rows of 'mid.in_proj_weight'" in pin.reason
    assert pin.where.startswith("test_attention_layers.py:")
    assert pin.remedy


def test_a_row_of_zeros_among_the_keys_is_refused_by_the_surgery(removal) -> None:
    with pytest.raises(ShapeError, match="with add_bias_kv or add_zero_attn cannot be narrowed"):
        removal(Self(weights=False, add_zero_attn=True), (X,), {"a": 8, **INSIDE, "mid:heads": 2})


def test_a_learned_row_among_the_keys_pins_by_name() -> None:
    structure = analyse(Self(weights=False, add_bias_kv=True), (X,), {})
    assert open_groups(structure) == {"a": 8, "mid.out_proj": 8}
    pin = structure.groups[1].pin
    assert pin is not None
    assert "in 'mid'" in pin.reason


LAYERS = {
    "post": {},
    "pre": {"norm_first": True},
    "gelu, no bias": {"activation": "gelu", "bias": False},
    "sequence first": {"batch_first": False},
}


@pytest.mark.parametrize("name", LAYERS)
def test_transformer_encoder_layer(removal, name: str) -> None:
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(8, 2, 16, **{"batch_first": True, "dropout": 0.0, **LAYERS[name]})
    structure = removal(layer, (X,), {"self_attn": 8, "self_attn#2": 8, "linear1": 16, "self_attn:heads": 2})
    assert next(g for g in structure.groups if g.name == "self_attn.out_proj").pin is not None


def test_feed_forward_of_a_layer_with_dropout() -> None:
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.2)
    groups = {g.name: g for g in analyse(net, (X,), {}).groups}
    assert groups["linear1"].pin is None
    assert groups["linear1"].neuron is not None
    assert groups["linear1"].sites[0].dropout == 0.2
    assert groups["self_attn"].pin is None
    assert groups["self_attn.out_proj"].pin is not None


def test_a_product_with_dropout_is_one_site() -> None:
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.2)
    pairs = next(g for g in analyse(net, (X,), {}).groups if g.name == "self_attn")
    assert len({s.key for s in pairs.sites}) == len(pairs.sites)
    assert [s.weight for s in pairs.sites] == ["self_attn.in_proj_weight"]


def test_transformer_decoder_layer(removal) -> None:
    torch.manual_seed(3)
    layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    inside = {
        f"{m}{part}": n for m in ("self_attn", "multihead_attn") for part, n in (("", 8), ("#2", 8), (":heads", 2))
    }
    removal(layer, (X, OTHER), {**inside, "linear1": 16})


def test_several_layers_share_a_stream(removal) -> None:
    torch.manual_seed(4)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    net = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 2))
    names = [f"1.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn", "self_attn#2")]
    widths = {**dict.fromkeys(names, 8), **{f"1.layers.{i}.linear1": 16 for i in (0, 1)}}
    widths |= {f"1.layers.{i}.self_attn:heads": 2 for i in (0, 1)}
    structure = removal(net, (X,), widths)
    assert structure.groups[0].pin is not None  # the norms of the stream
    assert "normalises over channels" in structure.groups[0].pin.reason
