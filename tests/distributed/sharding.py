"""Networks sharded by fully_shard, and their training, for the tests beside."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from apoptosis import Apoptosis


def perceptron(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 97), nn.ReLU(), nn.Linear(97, 64), nn.ReLU(), nn.Linear(64, 3))


def shard(net, units=None, mesh=None, **options):
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for unit in units if units is not None else (m for m in net if isinstance(m, nn.Linear)):
        fully_shard(unit, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def data(rank, size, rows=48, seed=0):
    draws = torch.Generator().manual_seed(5)
    basis = torch.randn(3, 12, generator=draws)
    common = torch.Generator().manual_seed(100 + seed)
    while True:
        x = torch.randn(rows, 3, generator=common) @ basis
        x = x[rank::size]
        yield x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(net, rank, size, *, steps=24, make=torch.optim.Adam, after=None, given=None, start=0, **options):
    """Train, and tell of it. given: an optimizer and an Apoptosis that go on at step `start`."""
    if given is None:
        optimizer = make(net.parameters(), lr=3e-3)
        arguments = {"tolerance": 0.05, "total_steps": steps, "align": 1, "calibration": 1.0} | options
        given = optimizer, Apoptosis(net, optimizer, torch.zeros(2, 12), **arguments)
    optimizer, apo = given
    told, losses = [], []
    for step, (x, y) in zip(range(steps), data(rank, size), strict=False):
        if step < start:
            continue
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if event := apo.step():
            told.append((step, event.as_dict()))
        if after is not None:
            after(step, net, optimizer, apo)
    state = {name: whole(p) for name, p in net.named_parameters()}
    kept = {
        f"{name}.{key}": whole(value)
        for name, p in net.named_parameters()
        for key, value in optimizer.state[p].items()
        if isinstance(value, torch.Tensor)
    }
    return {"events": told, "state": state, "moments": kept, "losses": losses}
