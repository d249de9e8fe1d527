"""The same removal on every rank, inside DistributedDataParallel over real processes."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apoptosis import Apoptosis
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


def train(rank, size, steps=80, **options):
    net = network()
    model = DistributedDataParallel(net)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    arguments = {"tolerance": 0.05, "total_steps": steps, "align": 1, "calibration": 1.0} | options
    apo = Apoptosis(model, optimizer, torch.zeros(2, 12), **arguments)
    told, losses = [], []
    for step, (x, y) in zip(range(steps), data(rank, size), strict=False):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if event := apo.step():
            told.append((step, event.as_dict()))
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


def test_the_probe_examples_of_all_ranks_count():
    results, faults = together(probed)
    assert faults == [None, None]
    one, two = results
    accuracy = [c for _, e in one["events"] for c in e["certificates"] if c["kind"] == "accuracy"]
    assert accuracy
    assert accuracy[0]["rows"] == 64  # an eighth of each rank's 256
    assert one["ledger"]["accuracy_cost"] == two["ledger"]["accuracy_cost"]
