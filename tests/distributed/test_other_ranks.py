"""A run with held-out rows goes on with another number of ranks, and its limits stay true."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apoptosis import Apoptosis, load, save
from apoptosis.decide.acceptance import ALPHA
from apoptosis.errors import CheckpointError
from apoptosis.numerics.bounds import alpha_for_attempt, clopper_pearson_upper
from distributed.processes import together

STEPS, ROWS = 60, 1200
BUDGET = 0.9  # all is granted; what is spent is counted


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 3))


def batch(step, rows=64):
    basis = torch.randn(3, 12, generator=torch.Generator().manual_seed(5))
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(step)) @ basis
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def start(rank, size, *, budget=BUDGET, probe=True, labels=True, seed=0):
    """A run whose held-out rows are divided among its ranks."""
    net = network(seed)
    model = DistributedDataParallel(net) if size > 1 else net
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, y = (part[rank::size] for part in batch(10_000, ROWS))
    given = {"budget": budget, "probe": (x, y) if labels else x} if probe else {}
    apo = Apoptosis(
        model, optimizer, torch.zeros(2, 12), tolerance=0.05, total_steps=STEPS, align=1, calibration=1.0, **given
    )
    return model, optimizer, apo


def train(rank, size, model, optimizer, apo, first):
    events = []
    for step in range(first, STEPS):
        x, y = (part[rank::size] for part in batch(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if event := apo.step():
            events.append(event)
            yield step, events
    yield STEPS, events


def limits(events):
    return [c for event in events for c in event.certificates if c.kind == "accuracy"]


def write(rank, size, folder):
    spent = {}
    for budget in (BUDGET, None):
        run = start(rank, size, budget=budget)
        step, events = next(train(rank, size, *run, 0))  # to the first event
        if rank == 0:
            save(f"{folder}/{budget}.safetensors", *run, step=step)
        dist.barrier()
        spent[budget] = limits(events)[0].value
    return spent


def go_on(rank, size, folder):
    found = {}
    for budget in (BUDGET, None):
        run = start(rank, size, budget=budget, seed=1)
        step = load(f"{folder}/{budget}.safetensors", *run)["step"]
        carried = run[2].ledger()
        _, events = next(train(rank, size, *run, step + 1))  # to the next event
        found[budget] = carried, limits(events)[0], run[2].ledger()
    return found


def test_limits_are_carried_to_another_number_of_ranks(tmp_path):
    (spent, _), faults = together(write, str(tmp_path))
    assert faults == [None, None]
    results, faults = together(go_on, str(tmp_path), size=3)
    assert faults == [None] * 3
    for found in (go_on(0, 1, str(tmp_path)), *results):
        for budget, (carried, limit, ledger) in found.items():
            assert carried.accuracy_cost == spent[budget]
            assert carried.attempts == 1
            assert limit.rows == ROWS  # all of them: which were judged before is not known
            least = clopper_pearson_upper(0, ROWS, alpha_for_attempt(2, ALPHA, earlier_results=1))
            assert limit.value >= least > clopper_pearson_upper(0, ROWS, alpha_for_attempt(2, ALPHA))
            assert ledger.accuracy_cost == pytest.approx(spent[budget] + limit.value)
            assert any("used by several attempts" in note for note in ledger.notes)
    for options, told in (({"probe": False}, "this run has none"), ({"labels": False, "budget": None}, "labels")):
        model, optimizer, apo = start(0, 1, seed=1, **options)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with pytest.raises(CheckpointError, match=told):
            load(tmp_path / "None.safetensors", model, optimizer, apo)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
