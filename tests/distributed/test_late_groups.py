"""Groups that see few rows a step are left out, and waited for, on all ranks alike."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apoptosis import Apoptosis
from distributed.processes import together

POSITIONS, WIDTH, POOLED = 256, 48, 320


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 6)
        self.pooler, self.classes = nn.Linear(6, POOLED), nn.Linear(POOLED, 3)
        with torch.no_grad():
            self.first.weight[:12], self.first.bias[:12] = self.first.weight[12:24], self.first.bias[12:24]

    def forward(self, x):
        h = x + self.second(torch.tanh(self.first(x)))
        return self.classes(torch.tanh(self.pooler(h[:, 0])))


def train(rank, size):
    net = Pooled()
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    apo = Apoptosis(model, optimizer, torch.zeros(2, POSITIONS, 6), tolerance=1e-3, total_steps=400, align=1,
                    calibration=1.0)  # fmt: skip
    draws, told, ended = torch.Generator().manual_seed(rank), [], []
    for step in range(230):
        x = torch.randn((16, 13)[rank], POSITIONS, 6, generator=draws)  # one rank sees its share sooner
        watching = apo.watching
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.randint(0, 3, (len(x),), generator=draws)).backward()
        optimizer.step()
        if event := apo.step():
            told.append((step, dict(event.groups), event.notes))
        if watching and not apo.watching:
            ended.append((step, apo._memory.behind))
    return told, ended, {name: p.detach().clone() for name, p in net.named_parameters()}


def test_ranks_leave_out_the_same_groups_and_wait_for_them_together():
    results, faults = together(train)
    assert faults == [None, None]
    (told, ended, state), (told_too, ended_too, other) = results
    assert (told, ended) == (told_too, ended_too)
    (_, first), *later = ended
    assert first == ("pooler",)
    assert () in [behind for _, behind in later]
    assert set(told[0][1]) == {"first"}
    assert told[0][2][0].startswith("pooler: left for the next event")
    assert all(torch.equal(state[name], other[name]) for name in state)
