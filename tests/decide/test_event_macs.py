"""What a window and its event are taken to cost, in multiply-adds."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from apoptosis.decide.overhead import GRAM, MOVED, PER_PASS, PLANNED, TRACED, event_macs
from apoptosis.graph import analyse
from apoptosis.observe import MIN_EXAMPLES


class Attention(nn.Module):
    def __init__(self, width=16, heads=2):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2))


def groups(net, example):
    return analyse(net, (example,)).open_groups


def cost(found, *, forward_macs=0.0, batch_rows=64.0, gradients=True):
    return event_macs(found, forward_macs=forward_macs, batch_rows=batch_rows, gradients=gradients)


def test_one_layer_by_hand():
    (group,) = groups(nn.Sequential(nn.Linear(4, 512), nn.ReLU(), nn.Linear(512, 3)), torch.randn(2, 4))
    rows = 3 * 512
    expected = rows * 512 * (GRAM * 512 + MOVED) + PLANNED * 512**3 + 2 * PER_PASS * 64 * 1e6
    assert cost([group], forward_macs=1e6, gradients=False) == pytest.approx(expected)
    assert cost([group], forward_macs=1e6) == pytest.approx(expected + rows * 512 * MOVED)
    assert cost([]) == 0.0
    assert cost([group], batch_rows=0.0, forward_macs=1e6) == cost([group], batch_rows=1.0, forward_macs=1e6)


def test_it_grows_with_widths_and_with_sites():
    narrow, wide = (groups(nn.Sequential(nn.Linear(4, n), nn.Linear(n, 3)), torch.randn(2, 4)) for n in (1024, 2048))
    assert 7.0 < cost(wide) / cost(narrow) < 8.0
    (group,) = narrow
    again = replace(group.sites[0], module="other", weight="other.weight")
    twice = replace(group, sites=(group.sites[0], again))
    assert cost([twice]) > 2 * cost([group])


def test_what_several_groups_share_is_collected_once():
    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 64), nn.Linear(4, 64), nn.Linear(128, 3)

        def forward(self, x):
            return self.c(torch.cat([torch.relu(self.a(x)), torch.tanh(self.b(x))], -1))

    one, other = groups(Side(), torch.randn(2, 4))
    assert one.sites[0].key == other.sites[0].key
    alone = PLANNED * 64**3
    assert cost([one, other]) == pytest.approx(cost([one]) + alone)


def test_passes_that_are_run_again_count():
    x = torch.randn(2, 5, 16)
    found = groups(Attention(), x)
    assert any(site.functional for group in found for site in group.sites)  # seen by hooks all the same
    once = cost(found, forward_macs=1e6) - cost(found)
    assert once == pytest.approx(2 * PER_PASS * 64 * 1e6)
    hidden = [replace(g, sites=tuple(replace(s, outputs=()) if s.functional else s for s in g.sites)) for g in found]
    passes = MIN_EXAMPLES // 64
    assert cost(hidden, forward_macs=1e6) - cost(hidden) == pytest.approx(once + TRACED * passes * 64 * 1e6)
