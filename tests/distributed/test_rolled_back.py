"""After an event that was rolled back, and after loading, gradients are summed over all ranks as before."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apoptosis import Apoptosis, load, save
from apoptosis.errors import CheckpointError
from distributed.processes import together


class Literal(nn.Module):
    """Its forward pass fails with a narrower hidden layer, from a moment on that no trial at construction sees."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(12, 96), nn.Linear(96, 3)
        self.begun = False

    def forward(self, x):
        h = self.hidden(x).relu()
        return self.out(h.reshape(len(x), 96) if self.begun else h)


def train(rank, size):
    torch.manual_seed(0)
    net = Literal()
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    apo = Apoptosis(model, optimizer, torch.zeros(2, 12), tolerance=0.05, total_steps=80, align=1, calibration=1.0)
    draws, basis = torch.Generator().manual_seed(rank), torch.randn(3, 12)
    alike, net.begun = [], True
    for _ in range(80):
        x = torch.randn(32, 3, generator=draws) @ basis
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
        found = [torch.zeros_like(net.hidden.weight) for _ in range(size)]
        dist.all_gather(found, net.hidden.weight.grad)
        alike.append(torch.equal(*found))
        optimizer.step()
        assert not apo.step()
    return alike, apo.ledger().rolled_back


def test_gradients_are_averaged_after_a_rollback():
    results, faults = together(train)
    assert faults == [None, None]
    for alike, rolled_back in results:
        assert rolled_back
        assert all(alike)


def reloaded(rank, size, folder):
    path = f"{folder}/{rank}"
    torch.manual_seed(0)
    net = Literal()
    save(path, net)
    model = DistributedDataParallel(net)
    alike = []
    for apo in (None, "refused"):  # the same widths both times; what fails half-way is undone
        if apo is None:
            load(path, model)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
            apo = Apoptosis(model, optimizer, torch.zeros(2, 12), total_steps=80, calibration=1.0)
            save(path, net, optimizer, apo)
            apo.load_state_dict = refuse
            try:
                load(path, model, optimizer, apo)
            except CheckpointError:
                alike.append(True)
        x = torch.randn(32, 12, generator=torch.Generator().manual_seed(rank))
        model(x).square().mean().backward()
        found = [torch.zeros_like(net.hidden.weight) for _ in range(size)]
        dist.all_gather(found, net.hidden.weight.grad)
        alike.append(torch.equal(*found))
        net.zero_grad()
    return alike


def refuse(state):
    raise CheckpointError("of another run")


def test_gradients_are_averaged_after_loading(tmp_path):
    results, faults = together(reloaded, str(tmp_path))
    assert faults == [None, None]
    assert results == [[True, True, True]] * 2
