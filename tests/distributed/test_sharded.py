"""The same removal on every rank, in models that fully_shard has spread over real processes."""

import os
import re
import signal
import time
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from apoptosis import Apoptosis, save, shrink_
from apoptosis.errors import ApoptosisError
from apoptosis.surgery.undo_log import UndoLog
from distributed.processes import together
from distributed.sharding import data, perceptron, shard, train, whole

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
MAKERS = {
    "Adam": torch.optim.Adam,
    "SGD": partial(torch.optim.SGD, momentum=0.9),
    "RMSprop": partial(torch.optim.RMSprop, momentum=0.5),
}


def alike(one, other):
    assert [(s, e["groups"]) for s, e in one["events"]] == [(s, e["groups"]) for s, e in other["events"]]
    assert one["events"]
    for kind in ("state", "moments"):
        mine = one[kind]
        theirs = {name.removeprefix("module."): value for name, value in other[kind].items()}
        assert set(mine) == set(theirs)
        for name in mine:
            torch.testing.assert_close(
                mine[name], theirs[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def same(one, two):
    return all(torch.equal(one[kind][name], two[kind][name]) for kind in ("state", "moments") for name in one[kind])


def both(rank, size):
    found = {}
    for name, make in MAKERS.items():
        sharded = train(shard(perceptron()), rank, size, make=make)
        found[name] = sharded, train(DistributedDataParallel(perceptron()), rank, size, make=make)
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_a_sharded_run_is_the_data_parallel_run(size):
    results, faults = together(both, size=size, timeout=120)
    assert faults == [None] * size
    for name in MAKERS:
        for found in results:
            alike(*found[name])
            assert same(found[name][0], results[0][name][0])
        assert results[0][name][0]["state"]["0.weight"].shape[0] < 97


class Block(nn.Module):
    def __init__(self, width=16, heads=4):
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.up, self.down = nn.Linear(width, 48), nn.Linear(48, width)

    def forward(self, x):
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(nn.functional.gelu(self.up(self.after(x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(3, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        x = self.embed(x.view(-1, 4, 3))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def transformers(rank, size):
    def run(**options):
        net = Transformer()
        return train(shard(net, net.blocks, **options), rank, size, tolerance=0.1)

    net = Transformer()
    norms = train(shard(net, net.blocks), rank, size, tolerance=0.1, norm_widths="compensated")
    parallel = train(DistributedDataParallel(Transformer()), rank, size, tolerance=0.1)
    return {"parallel": parallel, "full": run(), "bf16": run(mp_policy=BF16), "norms": norms}


def test_blocks_of_a_transformer():
    results, faults = together(transformers, timeout=120)
    assert faults == [None, None]
    for found in results:
        alike(found["full"], found["parallel"])
        assert found["bf16"]["events"]
        assert found["bf16"]["state"]["blocks.0.up.weight"].shape[0] < 48
        assert found["bf16"]["state"]["blocks.0.up.weight"].dtype == torch.float32
        assert found["norms"]["state"]["embed.weight"].shape[0] < 16
        for how in ("full", "bf16", "norms"):
            assert same(found[how], results[0][how])
    assert sum(results[0]["bf16"]["losses"][-5:]) < sum(results[0]["bf16"]["losses"][:5])


def ways(rank, size):
    """Units within a unit, one unit for all, one of several modules, parameters that stay in full after a pass."""
    nested = perceptron()
    inner = nn.Sequential(nested[0], nested[1], nested[2])
    nested = nn.Sequential(inner, nested[3], nested[4])
    several, frozen = perceptron(), perceptron()
    frozen[0].weight.requires_grad_(False)

    def probing(step, net, optimizer, apo):  # leaves the outermost unit in full
        with torch.no_grad():
            net(torch.randn(4, 12))

    return {
        "nested": train(shard(nested, [inner[0], inner]), rank, size),
        "one unit": train(shard(perceptron(), []), rank, size, after=probing),
        "several modules": train(shard(several, [[several[0], several[2]]]), rank, size),
        "kept in full": train(shard(perceptron(), reshard_after_forward=False), rank, size, after=probing),
        "frozen": train(shard(frozen), rank, size),
    }


def test_every_way_of_wrapping():
    results, faults = together(ways, timeout=120)
    assert faults == [None, None]
    for how in results[0]:
        assert results[0][how]["events"], how
        assert same(results[0][how], results[1][how]), how
    plain = [(s, e["groups"]) for s, e in results[0]["one unit"]["events"]]
    assert [(s, e["groups"]) for s, e in results[0]["several modules"]["events"]] == plain


def snapshot(net, optimizer):
    found = {name: whole(p) for name, p in net.named_parameters()}
    for name, p in net.named_parameters():
        found |= {f"{name}.{key}": whole(value) for key, value in optimizer.state[p].items()}
    return found, [id(p) for p in net.parameters()], [id(p) for g in optimizer.param_groups for p in g["params"]]


def undone(rank, size):
    """Events that are refused, and one that fails in the midst of surgery, beside a run without any."""
    told, plain = [], train(shard(perceptron()), rank, size, exclude=("*",))
    refused = train(shard(perceptron()), rank, size, tolerance=0.95, criterion="magnitude", log=told.append)
    write, left = UndoLog.set_item, [3]

    def failing(self, *args):
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError("in the midst of surgery")
        write(self, *args)

    states = []

    def at_event(step, net, optimizer, apo):
        states.append(snapshot(net, optimizer))

    UndoLog.set_item = failing
    net, caught = shard(perceptron()), ""
    try:
        train(net, rank, size, after=at_event)
    except MemoryError as error:
        caught = str(error)
    UndoLog.set_item = write
    net(torch.randn(4, 12)).sum().backward()  # it still runs
    after = {name: whole(p) for name, p in net.named_parameters()}
    return plain, refused, told, caught, states[-1][0], after


def test_what_is_undone_leaves_no_trace():
    results, faults = together(undone, timeout=120)
    assert faults == [None, None]
    for rank, (plain, refused, told, caught, before, after) in enumerate(results):
        assert not plain["events"]
        assert not refused["events"]
        assert rank or all(event["rolled_back"] for event in told)
        assert rank or told
        assert refused["losses"] == plain["losses"]
        assert same(refused, plain)
        assert caught == "in the midst of surgery"
        assert all(after[name].shape == before[name].shape for name in after)


class Gauge:
    """Counts the bytes of full parameters that lie in this process's memory whenever one is gathered."""

    def __init__(self, net):
        self._net, self._live, self._gather = net, {}, DTensor.full_tensor
        self.most = self.gathered = 0

    def __enter__(self):
        gauge = self

        def full_tensor(tensor):
            found = gauge._gather(tensor)
            key, size = id(found), found.numel() * found.element_size()
            gauge._live[key] = size
            weakref.finalize(found, gauge._live.pop, key, None)
            gauge.gathered += size
            summon_full_params = [p for p in gauge._net.parameters() if not isinstance(p, DTensor)]
            held = sum(p.untyped_storage().nbytes() for p in summon_full_params if id(p) not in gauge._live)
            gauge.most = max(gauge.most, sum(gauge._live.values()) + held)
            return found

        DTensor.full_tensor = full_tensor
        return self

    def __exit__(self, *error):
        DTensor.full_tensor = self._gather


def measured(rank, size):
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(64, 64), nn.ReLU())), nn.Linear(64, 3))
    net = nn.Sequential(nn.Linear(12, 64), *net)
    net = shard(net)
    with Gauge(net) as gauge:
        found = train(net, rank, size)
    return gauge.most, gauge.gathered, len(found["events"])


def test_no_rank_holds_more_than_a_unit():
    results, faults = together(measured, timeout=120)
    assert faults == [None, None]
    unit = 4 * (64 * 64 + 64)
    for most, gathered, events in results:
        assert events
        assert gathered > 10 * unit
        assert unit <= most <= 2 * unit  # a unit, and the parameter of it that is just being gathered


def uneven(rank, size):
    """Batches and probes of other sizes on each rank, and an event whose passes are not equally many."""
    net, rows = shard(perceptron()), (300, 700)[rank]
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    apo = Apoptosis(net, optimizer, torch.zeros(2, 12), tolerance=0.05, total_steps=24, align=1, calibration=1.0)
    events = 0
    for _, (x, y) in zip(range(24), data(0, 1, rows, seed=rank), strict=False):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        events += bool(apo.step())
    net = Transformer()
    other = data(0, 1, 400 * (1 + rank), seed=50 + rank)
    found = train(shard(net, net.blocks), rank, size, tolerance=0.1, probe=next(other))
    return events, found


def test_ranks_may_see_unequally_many_examples():
    results, faults = together(uneven, timeout=120)
    assert faults == [None, None]
    assert results[0][0] == results[1][0] > 0
    assert results[0][1]["events"]
    assert same(results[0][1], results[1][1])


class Explicit(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(12, 32), nn.Linear(32, 3)

    def forward(self, x):
        self.head.unshard()
        return self.head(self.body(x).relu())

    def other(self, x):
        return self(x)


class OwnForward(nn.SyncBatchNorm):
    def forward(self, x):
        return super().forward(x)


def refusals(rank, size):
    mesh = init_device_mesh("cpu", (size,))

    def tensor_parallel(net):
        return parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})

    def both_plans(net):
        both = init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "tensor"))
        net = parallelize_module(net, both["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        return fully_shard(net, mesh=both["data"])

    def with_method(net):
        net = fully_shard(Explicit(), mesh=mesh)
        register_fsdp_forward_method(net, "other")
        return net

    def explicit(net):
        return shard(net, [net.head])

    def alone(net):
        net = nn.Sequential(nn.Linear(12, 12), Block(12, 4))
        fully_shard(net[1].attention, mesh=mesh)
        return fully_shard(net, mesh=mesh)

    def even():
        return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))

    makers = {
        "tensor parallel": tensor_parallel,
        "both plans": both_plans,
        "other dimension": lambda net: shard(even(), [], shard_placement_fn=lambda p: Shard(p.ndim - 1)),
        "offload": lambda net: shard(net, offload_policy=CPUOffloadPolicy(pin_memory=False)),
        "method": with_method,
        "attention": alone,
        "explicit": lambda net: explicit(Explicit()),
        "batch norm": lambda net: shard(nn.Sequential(net[0], OwnForward(97))),
    }
    found = {}
    for name, make in makers.items():
        net = make(perceptron())
        before = {key: whole(p) for key, p in net.named_parameters()}
        try:
            Apoptosis(net, torch.optim.Adam(net.parameters()), torch.zeros(2, 12), total_steps=10)
        except ApoptosisError as error:
            found[name] = f"{type(error).__name__}: {error}"
        assert all(torch.equal(whole(p), before[key]) for key, p in net.named_parameters())
    net = shard(perceptron())
    for name, work in {
        "one shot": lambda: shrink_(net, torch.zeros(2, 12), [torch.randn(64, 12)], tolerance=0.1),
        "one file": lambda: save("nowhere.safetensors", net),
    }.items():
        try:
            work()
        except ApoptosisError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


REFUSED = {
    "tensor parallel": r"ArgumentError: parameter '0\.weight' is a DTensor not of fully_shard .*parallelize_module",
    "both plans": r"ArgumentError: parameter '0\.weight' is a DTensor of fully_shard on top of another plan",
    "other dimension": r"ArgumentError: parameter '.*' is a DTensor sharded along dimension 1: .*shard_placement_fn",
    "offload": r"ArgumentError: parameter '0\.weight' is a DTensor kept on the CPU \(CPUOffloadPolicy\)",
    "method": r"ArgumentError: the model gathers its parameters in 'other' \(register_fsdp_forward_method\)",
    "attention": r"ArgumentError: module '1\.attention' is an nn\.MultiheadAttention that fully_shard has wrapped",
    "explicit": r"CaptureError: .*calls unshard\(\) or reshard\(\)",
    "batch norm": r"CaptureError: module '1' .*OwnForward.* is an nn\.SyncBatchNorm with a forward pass of its own",
    "one shot": r"ArgumentError: the model is trained by several processes \(fully_shard over 2 processes\)",
    "one file": r"CheckpointError: .*spread over processes.*save_sharded",
}


def test_what_is_refused_is_named():
    results, faults = together(refusals, timeout=120)
    assert faults == [None, None]
    for found in results:
        assert set(found) == set(REFUSED)
        for name, told in REFUSED.items():
            assert re.match(told, found[name], re.DOTALL), found[name]


def dying(rank, size):
    """One of two ranks is gone while a parameter is gathered in the midst of an event."""
    if rank == 1:
        left, gather = [40], DTensor.full_tensor

        def full_tensor(tensor):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return gather(tensor)

        DTensor.full_tensor = full_tensor
    train(shard(perceptron()), rank, size)


def test_a_rank_that_dies_while_parameters_are_gathered_is_told_of():
    start = time.monotonic()
    results, faults = together(dying, timeout=20)
    assert results == [None, None]
    assert faults[1] is None  # it had no time to tell
    assert re.search(r"RankError: (rank 0 of 2 )?lost another rank while", faults[0])
    assert time.monotonic() - start < 60


def by_two_dimensions(rank, size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    net = perceptron()
    for unit in (net[0], net[2], net[4]):
        fully_shard(unit, mesh=mesh)
    return train(fully_shard(net, mesh=mesh), rank, size, steps=40)


def test_shards_that_several_ranks_hold_alike():
    results, faults = together(by_two_dimensions, size=4, timeout=120)
    assert faults == [None] * 4
    for found in results:
        assert found["events"]
        assert same(found, results[0])
