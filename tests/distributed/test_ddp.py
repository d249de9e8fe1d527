"""The same removal on every rank, inside DistributedDataParallel over real processes."""

import contextlib
import os
import re
import signal
import time
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apoptosis import Apoptosis, load, save, shrink_
from apoptosis.distributed.ranks import TorchRanks
from apoptosis.engine import applying
from apoptosis.engine import step as pruning
from apoptosis.errors import ArgumentError
from apoptosis.graph import analyse
from apoptosis.observe import Observer
from distributed.processes import together


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 3))


def data(rank, size, rows=64):
    draws = torch.Generator().manual_seed(5)
    basis = torch.randn(3, 12, generator=draws)
    own = torch.Generator().manual_seed(100 + rank)
    while True:
        x = torch.randn(rows // size, 3, generator=own) @ basis
        yield x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def train(rank, size, *, steps=80, rows=64, wrap=None, accumulate=1, after=None, saved=None, **options):
    net = network()
    model = DistributedDataParallel(net, **(wrap or {}))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    arguments = {"tolerance": 0.05, "total_steps": steps, "align": 1, "calibration": 1.0} | options
    apo = Apoptosis(model, optimizer, torch.zeros(2, 12), **arguments)
    told, losses = [], []
    for step, (x, y) in zip(range(steps), data(rank, size, rows), strict=False):
        optimizer.zero_grad()
        for part in range(accumulate):
            rest = part < accumulate - 1
            with model.no_sync() if rest else contextlib.nullcontext():
                loss = nn.functional.cross_entropy(model(x[part::accumulate]), y[part::accumulate])
                (loss / accumulate).backward()
        optimizer.step()
        losses.append(loss.item())
        if after is not None:
            after(step, net)
        if event := apo.step():
            told.append((step, event.as_dict()))
        if saved is not None:
            saved(step, net, optimizer=optimizer, apo=apo)
    state = {name: p.detach().clone() for name, p in net.named_parameters()}
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in net.named_parameters()}
    return {"events": told, "state": state, "moments": moments, "losses": losses, "ledger": apo.ledger().as_dict()}


def probed(rank, size):
    x, y = next(data(50 + rank, 1, rows=256))
    return train(rank, size, probe=(x, y))


def test_every_rank_removes_the_same_channels_at_the_same_step():
    results, faults = together(train)
    assert faults == [None, None]
    one, two = results
    assert one["events"]
    assert [step for step, _ in one["events"]] == [step for step, _ in two["events"]]
    assert [e["groups"] for _, e in one["events"]] == [e["groups"] for _, e in two["events"]]
    for kind in ("state", "moments"):
        assert all(torch.equal(one[kind][name], two[kind][name]) for name in one[kind])
    assert one["state"]["0.weight"].shape[0] < 96
    assert sum(one["losses"][-5:]) < sum(one["losses"][:5])
    assert "bytes summed over 2 ranks" in one["events"][0][1]["notes"][0]


def probed_alike(rank, size):
    x, y = next(data(50, 1, rows=256))
    return train(rank, size, probe=(x, y))


def test_one_probe_on_two_ranks_is_refused():
    _, faults = together(probed_alike)
    assert all("ArgumentError: probe=: rank 0 and rank 1 have the same examples" in fault for fault in faults)


def test_the_probe_examples_of_all_ranks_count():
    results, faults = together(probed)
    assert faults == [None, None]
    one, two = results
    accuracy = [c for _, e in one["events"] for c in e["certificates"] if c["kind"] == "accuracy"]
    assert accuracy
    assert accuracy[0]["rows"] == 64  # an eighth of each rank's 256
    assert one["ledger"]["accuracy_cost"] == two["ledger"]["accuracy_cost"]


def same(one, two):
    return all(torch.equal(one[kind][name], two[kind][name]) for kind in ("state", "moments") for name in one[kind])


WAYS = {
    "static graph": {"wrap": {"static_graph": True}},
    "unused parameters": {"wrap": {"find_unused_parameters": True}},
    "bucket views": {"wrap": {"gradient_as_bucket_view": True}},
    "small buckets": {"wrap": {"bucket_cap_mb": 0.01}},
    "accumulation": {"accumulate": 2},
    "odd batches": {"rows": 50},
    "outputs alike": {"criterion": "reconstruction"},
    "exact": {"tolerance": 0.0},
}


def in_every_way(rank, size):
    return {name: train(rank, size, **options) for name, options in WAYS.items()}


def test_every_way_of_wrapping_and_stepping():
    results, faults = together(in_every_way)
    assert faults == [None, None]
    for name in WAYS:
        one, two = (found[name] for found in results)
        assert same(one, two), name
        assert len(one["events"]) == len(two["events"]), name
        assert one["events"] or name == "exact", name


def refused(rank, size):
    model = DistributedDataParallel(network())
    try:
        shrink_(model, torch.zeros(2, 12), [torch.randn(64, 12)], tolerance=0.1)
    except ArgumentError as error:
        return str(error)
    return ""


def test_one_shot_use_is_refused_by_name():
    results, faults = together(refused)
    assert faults == [None, None]
    assert "over 2 processes" in results[0]


def pooled_moments(rank, size):
    structure = analyse(network(), (torch.zeros(2, 12),))
    groups = [g for g in structure.groups if g.pin is None]
    net = network()
    observer = Observer(net, groups, seed=rank, gradients=True, ranks=TorchRanks(dist.group.WORLD, torch.device("cpu")))
    observer.open()
    rows = torch.randn(3, 200, 12, generator=torch.Generator().manual_seed(0))
    for x in rows:
        nn.functional.cross_entropy(net(x[rank::size]), torch.zeros(len(x[rank::size]), dtype=torch.long)).backward()
        observer.end_step()
    observer.close()
    observer.pool()
    seen = net[:2](rows.reshape(-1, 12)).detach().double()
    own = next(o for (name, _), o in observer.observations().items() if name == "0")
    return own.moments.mean, own.moments.covariance(), own.moments.num_rows, own.grad_factor, seen


@pytest.mark.parametrize("size", [2, 3])
def test_pooled_moments_are_those_of_all_rows(size):
    results, faults = together(pooled_moments, size=size)
    assert faults == [None] * size
    for mean, covariance, num_rows, grad_factor, seen in results:
        assert num_rows == len(seen)
        torch.testing.assert_close(mean, seen.mean(0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(covariance, torch.cov(seen.T, correction=0), rtol=1e-4, atol=1e-6)
        assert torch.equal(covariance, results[0][1])
        assert torch.equal(grad_factor, results[0][3])


def resumed(rank, size, folder):
    whole = train(rank, size, saved=partial(keep, rank=rank, folder=folder))
    net = network(1)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    apo = Apoptosis(model, optimizer, torch.zeros(2, 12), tolerance=0.05, total_steps=80, align=1, calibration=1.0)
    load(f"{folder}/net.safetensors", model, optimizer, apo)
    batches = data(rank, size)
    for _ in range(51):
        next(batches)
    for _, (x, y) in zip(range(51, 80), batches, strict=False):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        apo.step()
    return whole, {name: p.detach().clone() for name, p in net.named_parameters()}


def keep(step, net, *, rank, folder, optimizer, apo):
    if step == 50:
        assert apo._observer is None
        if rank == 0:
            save(f"{folder}/net.safetensors", net, optimizer, apo)
        dist.barrier()


def test_a_resumed_run_comes_to_the_same_bits(tmp_path):
    results, faults = together(resumed, str(tmp_path))
    assert faults == [None, None]
    for whole, state in results:
        assert all(torch.equal(whole["state"][name], state[name]) for name in state)


def of_other_minds(rank, size):
    return train(rank, size, tolerance=0.05 if rank == 0 else 0.04)


def of_other_weights(rank, size):
    def drift(step, net):
        if step == 5 and rank == 1:
            with torch.no_grad():
                net[2].weight[3, 4] += 1.0

    return train(rank, size, after=drift)


@pytest.mark.parametrize(
    ("work", "told"), [(of_other_minds, "arguments .*'tolerance'"), (of_other_weights, r"parameters .*'2\.weight'")]
)
def test_ranks_that_disagree_are_named(work, told):
    _, faults = together(work)
    for fault in faults:
        assert re.search(rf"RankError: rank [01] and rank [01] differ in {told}", fault)


def dying(rank, size, where):
    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1 and where == "planning":
        pruning.make_plan = die
    if rank == 1 and where == "surgery":
        applying.compare = die
    train(rank, size)


@pytest.mark.parametrize("where", ["planning", "surgery"])
def test_a_rank_that_dies_in_an_event_ends_the_others_with_one_error(where):
    start = time.monotonic()
    results, faults = together(dying, where, timeout=20)
    assert results == [None, None]
    assert faults[1] is None  # it had no time to tell
    assert "RankError: rank 0 of 2 lost another rank while it waited" in faults[0]
    assert time.monotonic() - start < 60


def with_bad_numbers(rank, size):
    net = network()
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    apo = Apoptosis(model, optimizer, torch.zeros(2, 12), tolerance=0.05, total_steps=80, align=1, calibration=1.0)
    told = []
    for step, (x, y) in zip(range(16), data(rank, size), strict=False):
        bad = rank == 1 and apo.decision.at_step == step  # the first pass of the window
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x * float("nan") if bad else x), y).backward()
        if all(bool(p.grad.isfinite().all()) for p in net.parameters()):  # of all ranks: they were averaged
            optimizer.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert not apo.step()
        told += [str(warning.message) for warning in caught]
    return told


def test_rows_that_are_not_finite_are_told_of_their_rank():
    results, faults = together(with_bad_numbers)
    assert faults == [None, None]
    for told in results:
        assert any("rank 1" in line and "NaN" in line for line in told)
