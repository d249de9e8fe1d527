"""A state that is kept between passes is each process's own, and every one cuts its own."""

import copy

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apoptosis import Apoptosis
from distributed.processes import together


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.back, self.last = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.hidden = None

    def forward(self, x):
        before = x.new_zeros(len(x), self.back.in_features) if self.hidden is None else self.hidden
        h = torch.tanh(self.first(x) + self.back(before))
        self.hidden = h.detach()
        return self.last(h)


def train(rank, size):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    net = Recurrent()
    with torch.no_grad():
        for layer in (net.first, net.back):
            layer.weight[8:], layer.bias[8:] = layer.weight[:8].clone(), layer.bias[:8].clone()
    dense, model = copy.deepcopy(net), DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    apo = Apoptosis(model, optimizer, torch.randn(4, 5), tolerance=0.0, total_steps=80, align=1, calibration=1.0)
    draws, rows = torch.Generator().manual_seed(rank), 24 + 8 * rank  # of this process
    groups, apart = {}, []
    for _ in range(80):
        x = torch.randn(rows, 5, generator=draws)
        out = model(x)
        with torch.no_grad():
            apart.append(float((out - dense(x)).abs().max()))
        optimizer.zero_grad()
        out.square().mean().backward()
        optimizer.step()
        if event := apo.step():
            groups = event.groups
            assert net.hidden.shape == (rows, 8)
    return groups, max(apart)


def test_every_process_cuts_its_own_state():
    results, faults = together(train)
    assert faults == [None, None]
    for groups, apart in results:
        assert groups == {"first": (16, 8)}
        assert apart < 1e-12
