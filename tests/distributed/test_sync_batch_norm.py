"""nn.SyncBatchNorm: frozen on the CPU, where torch has no synchronised pass, and synchronised on a GPU."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from apoptosis import Apoptosis
from apoptosis.distributed.wrappers import unwrap
from apoptosis.errors import ArgumentError
from apoptosis.model.passes import unsynchronised
from distributed.processes import together
from distributed.sharding import data, train


def network(norm):
    torch.manual_seed(0)
    layers = nn.Linear(12, 97), norm(97), nn.ReLU(), nn.Linear(97, 64), norm(64), nn.ReLU(), nn.Linear(64, 3)
    return nn.Sequential(*layers)


def frozen(rank, size):
    """The same run with each kind of norm, whose statistics are frozen while its weights train."""
    found = []
    for norm in (nn.BatchNorm1d, nn.SyncBatchNorm):
        net = network(norm)
        net[1].running_var.fill_(2.0)
        net[1].eval()
        net[4].eval()
        mesh = init_device_mesh("cpu", (size,))
        for layer in net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        found.append(train(fully_shard(net, mesh=mesh), rank, size, steps=40))
        assert not any("forward" in vars(module) for module in net.modules())
    return found


def test_frozen_on_the_cpu_it_is_a_plain_batch_norm():
    results, faults = together(frozen, timeout=120)
    assert faults == [None, None]
    for plain, synchronised in results:
        assert synchronised["events"]
        assert [step for step, _ in plain["events"]] == [step for step, _ in synchronised["events"]]
        for kind in ("state", "moments"):
            assert all(torch.equal(plain[kind][name], synchronised[kind][name]) for name in plain[kind])


def test_own_passes_wait_for_nobody_and_leave_nothing_behind():
    net = nn.Sequential(nn.Linear(4, 6), nn.SyncBatchNorm(6))
    plain = nn.BatchNorm1d(6)
    x = torch.randn(8, 6)
    with unsynchronised(net):
        assert torch.equal(net[1](x), plain(x))
    assert torch.equal(net[1].running_mean, plain.running_mean)
    with pytest.raises(RuntimeError, match="shapes"), unsynchronised(net):
        net(x[:, :3])
    assert "forward" not in vars(net[1])


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_on_the_cpu_a_wrapper_that_cannot_be_set_up_is_refused():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    parallel = DistributedDataParallel(net)
    net[1] = nn.SyncBatchNorm(6)  # torch refuses it where it is there before
    with pytest.raises(ArgumentError, match=r"nn\.SyncBatchNorm in DistributedDataParallel on the CPU"):
        unwrap(parallel)


def synchronised(rank, size):
    net = network(nn.SyncBatchNorm).cuda()
    model = DistributedDataParallel(net, device_ids=[0])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    example = torch.zeros(2, 12, device="cuda")
    apo = Apoptosis(model, optimizer, example, tolerance=0.05, total_steps=60, align=1, calibration=1.0)
    events = []
    for step, (x, y) in zip(range(60), data(rank, size), strict=False):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.cuda()), y.cuda()).backward()
        optimizer.step()
        if event := apo.step():
            events.append((step, event.as_dict()["groups"]))
    return events, {name: value.cpu() for name, value in net.state_dict().items()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_stays_synchronised():
    results, faults = together(synchronised, timeout=120)
    assert faults == [None, None]
    (one, state), (two, other) = results
    assert one
    assert one == two
    assert all(torch.equal(state[name], other[name]) for name in state)  # statistics of all rows among them
