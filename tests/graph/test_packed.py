"""Sequences of several lengths, packed for a recurrence."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from apoptosis import shrink_
from apoptosis.graph import analyse


class Packed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed, self.rnn, self.out = nn.Linear(5, 6), kind(6, 7, batch_first=True), nn.Linear(7, 3)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(torch.tanh(self.embed(x)), lengths, batch_first=True, enforce_sorted=False)
        last = self.rnn(packed)[1]
        return self.out((last[0] if isinstance(self.rnn, nn.LSTM) else last)[-1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_what_is_packed_loses_doubles_exactly(kind):
    torch.manual_seed(0)
    net = Packed(kind).double()
    with torch.no_grad():
        net.embed.weight[1:3], net.embed.bias[1:3] = net.embed.weight[:1], net.embed.bias[:1]
    x, lengths = torch.randn(40, 4, 5, dtype=torch.float64), torch.tensor([2, 4, 3, 4] * 10)
    assert {g.name for g in analyse(net, (x[:4], lengths[:4])).groups if g.pin is None} >= {"embed", "rnn"}
    expected = net(x, lengths).detach()
    event = shrink_(net, (x[:4], lengths[:4]), [(x, lengths)], tolerance=0)
    assert event.groups["embed"] == (6, 4)
    torch.testing.assert_close(net(x, lengths), expected, rtol=1e-9, atol=1e-10)
