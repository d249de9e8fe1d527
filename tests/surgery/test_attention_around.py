"""Multi-head attention inside torch's own encoder, and where a user has written a forward pass of another kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from apoptosis.graph import analyse, verify
from apoptosis.modules.attention import ShrunkMultiheadAttention, shrunk_attributes
from apoptosis.records import TensorEdit
from apoptosis.surgery import Transaction, build_edits

WIDTH, HEADS = 12, 3


class OwnForward(nn.MultiheadAttention):
    def forward(self, x):
        return F.linear(x, self.in_proj_weight, self.in_proj_bias)


def test_a_forward_pass_of_the_users_own_is_left_alone():
    module = OwnForward(WIDTH, HEADS)
    keep = {0: torch.arange(5)}
    with Transaction(module) as transaction:
        transaction.apply([TensorEdit(tensor=n, keep=keep) for n in ("in_proj_weight", "in_proj_bias")])
    assert type(module) is OwnForward
    assert module(torch.randn(2, WIDTH)).shape == (2, 5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_with_padding_is_the_same_in_torchs_fast_path(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        before, plain = net(x, src_key_padding_mask=padding), net(x)
        for part in net.layers:
            part.self_attn.__class__ = ShrunkMultiheadAttention
            stock = nn.MultiheadAttention(8, 2)
            vars(part.self_attn).update({k: v for k, v in shrunk_attributes(stock).items() if k != "__class__"})
        after = net(x, src_key_padding_mask=padding)
        assert torch.allclose(after, before, atol=1e-5)
        assert torch.allclose(net(x), plain, atol=1e-5)
    assert (before[1, 3:] == 0).all() == (not norm_first)


class Cross(nn.Module):
    """Queries, keys and values of three origins; torch's attention between linear layers."""

    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.att = nn.Linear(5, 8), nn.Linear(5, 8), nn.MultiheadAttention(8, 2, **settings)
        self.out = nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        key = self.b(x)
        return self.out(self.att(self.a(x), key, torch.relu(key))[0])


@pytest.mark.parametrize("settings", [{}, {"kdim": 8, "vdim": 8, "batch_first": True}, {"bias": False}], ids=str)
def test_what_capture_finds_is_what_can_be_cut(settings, nets):
    net, x = Cross(**settings), torch.randn(4, 3, 5, dtype=torch.float64)
    structure = analyse(net, (x,), {})
    inside = [g for g in structure.groups if g.pin is None and any(m.tensor.startswith("att.") for m in g.members)]
    inside = [g for g in inside if g.rows == 2]
    assert len(inside) == 2  # queries with keys, and values
    for group in inside:
        structure = analyse(net, (x,), {})
        group = next(g for g in structure.groups if g.name == group.name)
        with torch.no_grad():  # the keys or values that go are silent
            for member in group.members:
                net.get_parameter(member.tensor).movedim(member.dim, 0)[member.positions[[1, 6]].reshape(-1)] = 0.0
        before = net(x).detach()
        edits = build_edits(structure, [nets.reduction(group, [0, 2, 3, 4, 5, 7])])
        with Transaction(net) as transaction:
            transaction.apply(edits, structure)
            verify(structure, analyse(net, (x,), {}), {e.tensor: e.keep for e in edits})
        assert (net(x) - before).abs().max() < 1e-12
    assert (net.att.query_width, net.att.value_width, net.att.num_heads) == (6, 6, 2)
