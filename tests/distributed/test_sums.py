"""Sums in pieces of a bounded size, and DistributedDataParallel set up again for shapes changed by hand."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from apoptosis.distributed import ranks
from apoptosis.distributed.ddp import rebuild_ddp
from apoptosis.distributed.ranks import TorchRanks
from apoptosis.errors import ArgumentError
from apoptosis.graph import analyse
from apoptosis.observe import Observer, pooled
from distributed.processes import together


@pytest.mark.parametrize(
    ("sizes", "told"),
    [([], []), ([1], [[0]]), ([4, 4, 4], [[0, 1], [2]]), ([20, 1, 20, 3, 4], [[0], [1], [2], [3, 4]])],
)
def test_buckets_hold_consecutive_sites_up_to_the_bound(sizes, told, monkeypatch):
    monkeypatch.setattr(pooled, "SUM_NUMBERS", 8)
    assert pooled._buckets(sizes) == told


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))


def moments(rank, size):
    net = network()
    groups = [g for g in analyse(net, (torch.zeros(2, 6),)).groups if g.pin is None]
    observer = Observer(net, groups, seed=rank, ranks=TorchRanks(dist.group.WORLD, torch.device("cpu")))
    observer.open()
    net(torch.randn(300, 6, generator=torch.Generator().manual_seed(rank)))
    observer.end_step()
    observer.close()
    observer.pool()
    return [(o.moments.mean, o.moments.covariance()) for o in observer.observations().values()]


def in_both_ways(rank, size):
    whole = moments(rank, size)
    calls, all_reduce = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        calls.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    pooled.SUM_NUMBERS = ranks.SUM_NUMBERS = 100
    return whole, moments(rank, size), max(calls), len(calls)


def test_small_pieces_sum_to_the_same_bits():
    results, faults = together(in_both_ways)
    assert faults == [None, None]
    for whole, pieces, largest, number in results:
        assert largest <= 100
        assert number > 24 * 25 // 2 // 100
        for (mean, covariance), (other_mean, other) in zip(whole, pieces, strict=True):
            assert torch.equal(mean, other_mean)
            assert torch.equal(covariance, other)
    for one, two in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(one[1], two[1])


def rebuilt(rank, size):
    net = network()
    model = DistributedDataParallel(net)
    model.register_comm_hook(None, fp16_compress_hook)
    found = []
    for step in range(4):
        if step == 2:
            net[0], net[2] = nn.Linear(6, 5), nn.Linear(5, 16)
            for p in net.parameters():
                dist.broadcast(p.data, 0)
            rebuild_ddp(model)
        net.zero_grad()
        model(torch.full((4, 6), float(rank + step))).square().sum().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    assert [hook for hook, _ in model._comm_hooks] == [fp16_compress_hook]
    return found


def test_a_rebuilt_wrapper_averages_gradients_of_the_new_shapes():
    results, faults = together(rebuilt)
    assert faults == [None, None]
    for one, two in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert results[0][3][0].shape == (5, 6)
    assert bool(results[0][3][0].ne(0).any())


def test_a_model_without_the_wrapper_is_refused():
    with pytest.raises(ArgumentError, match="Sequential is not in DistributedDataParallel"):
        rebuild_ddp(network())
