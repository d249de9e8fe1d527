"""Multi-head attention inside torch's own encoder, and where a user has written a forward pass of another kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from apoptosis.records import TensorEdit
from apoptosis.surgery import Transaction
from apoptosis.surgery.attention import ShrunkMultiheadAttention, shrunk_attributes

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
