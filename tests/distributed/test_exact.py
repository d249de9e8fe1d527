"""Tolerance 0 over several real processes: what goes is redundant on the rows of all ranks, to round-off."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apoptosis import Apoptosis
from apoptosis.distributed.ranks import TorchRanks
from apoptosis.graph import analyse
from apoptosis.observe import Observer
from distributed.processes import together


def network():
    """Channels 24 to 31 repeat the first eight; channel 8 reads an input that is zero but on rank 1."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 3)).double()
    with torch.no_grad():
        net[0].weight[:, 11] = 0.0
        net[0].weight[24:], net[0].bias[24:] = net[0].weight[:8], net[0].bias[:8]
        net[0].weight[8], net[0].bias[8] = 0.0, 0.0
        net[0].weight[8, 11] = 1e-6  # a variance of 1e-12: below what products of these rows resolve beside 1
    return net


def batch(rank, step):
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(10 * step + rank)).double()
    x[:, 11] *= rank
    return x


def shrunk(rank, size):
    net = network()
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    apo = Apoptosis(model, optimizer, batch(0, 0)[:2], tolerance=0.0, total_steps=40, align=1, calibration=0.0)
    before = net(batch(1, 99)).detach()
    for step in range(40):
        optimizer.zero_grad()
        model(batch(rank, step)).square().mean().backward()
        optimizer.step()
        apo.step()
    return net[0].out_features, float((net(batch(1, 99)) - before).abs().max())


def test_what_one_rank_alone_sees_alive_stays_on_all():
    results, faults = together(shrunk)
    assert faults == [None, None]
    for width, error in results:
        assert width == 24  # eight repeat others; the faint one lives
        assert error < 1e-12


def roots(rank, size):
    net = network()
    groups = [g for g in analyse(net, (batch(0, 0)[:2],)).groups if g.pin is None]
    observer = Observer(net, groups, seed=rank, exact=True, ranks=TorchRanks(dist.group.WORLD, torch.device("cpu")))
    observer.open()
    for step in range(4):
        net(batch(rank, step)).sum().backward()
        observer.end_step()
    observer.close()
    observer.pool()
    rows = torch.cat([net[:2](batch(r, step)).detach() for r in range(size) for step in range(4)])
    (found,) = observer.observations().values()
    return found.moments.root(), found.moments.covariance(), rows


def test_triangles_of_all_ranks_are_one_of_all_rows():
    results, faults = together(roots, size=3)
    assert faults == [None] * 3
    for root, covariance, rows in results:
        centred = (rows - rows.mean(0)) / len(rows) ** 0.5
        torch.testing.assert_close(root.T @ root, covariance, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(root.norm(dim=0), centred.norm(dim=0), rtol=1e-12, atol=1e-18)
        assert int((torch.linalg.svdvals(root) > 1e-12).sum()) == 24
        assert torch.equal(root, results[0][0])
