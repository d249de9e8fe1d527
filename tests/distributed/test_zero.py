"""ZeroRedundancyOptimizer: every rank holds a share of the optimizer's state, which follows."""

import re

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apoptosis import Apoptosis, load, save
from apoptosis.errors import ApoptosisError
from distributed.processes import together
from distributed.sharding import data, perceptron


def run(rank, size, make, steps=40, start=0, prepare=None):
    model = DistributedDataParallel(perceptron())
    optimizer = make(model.parameters())
    options = {"tolerance": 0.05, "total_steps": 40, "align": 1, "calibration": 1.0}
    apo = Apoptosis(model, optimizer, torch.zeros(2, 12), **options)
    if prepare is not None:
        prepare(model, optimizer, apo)
    events, batches = [], data(rank, size)
    for step, (x, y) in zip(range(steps), batches, strict=False):
        if step < start:
            continue
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if event := apo.step():
            events.append((step, event.groups))
    return model, optimizer, apo, events


def told(model, optimizer, apo, events):
    inner = getattr(optimizer, "optim", optimizer)
    state = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    moments = {n: inner.state[p]["exp_avg_sq"] for n, p in model.module.named_parameters() if p in inner.state}
    return {"state": state, "moments": moments, "events": events}


def zero(parameters, **options):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # in a process of its own: loading it warns

    return ZeroRedundancyOptimizer(parameters, torch.optim.Adam, lr=3e-3, **options)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=3e-3)


def in_three_ways(rank, size):
    return (
        told(*run(rank, size, adam)),
        told(*run(rank, size, zero)),
        told(*run(rank, size, lambda parameters: zero(parameters, parameters_as_bucket_view=True))),
    )


def test_a_share_of_the_state_follows():
    results, faults = together(in_three_ways, timeout=120)
    assert faults == [None, None]
    plain = results[0][0]
    assert plain["events"]
    for way in (1, 2):
        held = [name for found in results for name in found[way]["moments"]]
        assert sorted(held) == sorted(plain["moments"])  # each on one rank
        for found in results:
            assert found[way]["events"] == plain["events"]
            assert all(torch.equal(found[way]["state"][name], plain["state"][name]) for name in plain["state"])
            for name, moment in found[way]["moments"].items():
                assert torch.equal(moment, plain["moments"][name])


def resumed(rank, size, path):
    _, optimizer, apo, _ = parts = run(rank, size, zero, steps=25)
    model = parts[0]
    told_before = ""
    if rank == 0:
        try:
            save(path, model, optimizer, apo)
        except ApoptosisError as error:
            told_before = str(error)
    optimizer.consolidate_state_dict()
    if rank == 0:
        save(path, model, optimizer, apo)
    torch.distributed.barrier()
    again = told(*run(rank, size, zero, start=25, prepare=lambda *parts: load(path, *parts)))
    plain = told(*run(rank, size, adam, start=25, prepare=lambda *parts: load(path, *parts)))
    return told(*run(rank, size, zero)), again, plain, told_before


def test_a_run_is_resumed_with_or_without_it(tmp_path):
    results, faults = together(resumed, str(tmp_path / "net.safetensors"), timeout=120)
    assert faults == [None, None]
    assert "consolidate_state_dict() on all ranks" in results[0][3]
    for whole, again, plain, _ in results:
        assert whole["state"]["0.weight"].shape[0] < 97
        for other in (again, plain):
            assert all(torch.equal(whole["state"][name], other["state"][name]) for name in whole["state"])


def refused(rank, size):
    found = []
    for wrap, options in ((DistributedDataParallel, {"overlap_with_ddp": True}), (lambda net: net, {})):
        model = wrap(perceptron())
        try:
            Apoptosis(model, zero(model.parameters(), **options), torch.zeros(2, 12), total_steps=10)
        except ApoptosisError as error:
            found.append(str(error))
    return found


def test_what_is_refused_is_named():
    results, faults = together(refused, timeout=120)
    assert faults == [None, None]
    for overlap, alone in results:
        assert re.match("ZeroRedundancyOptimizer with overlap_with_ddp=True", overlap)
        assert re.match("ZeroRedundancyOptimizer steps over 2 processes, and the model is trained by 1", alone)
