"""A target on several ranks: trials are of every rank's own examples, the widths chosen are the same."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apoptosis import Apoptosis
from apoptosis.engine import looks, sensitivity
from apoptosis.errors import OutOfMemoryError
from distributed.processes import together
from distributed.test_ddp import train


def halved(rank, size):
    return train(rank, size, target="2x", rows=256)


def test_all_ranks_choose_the_same_widths():
    results, faults = together(halved)
    assert faults == [None, None]
    one, two = results
    assert one["events"]
    assert [(step, e["groups"]) for step, e in one["events"]] == [(step, e["groups"]) for step, e in two["events"]]
    assert all(torch.equal(one["state"][name], two["state"][name]) for name in one["state"])
    left = one["ledger"]["macs"][1] / one["ledger"]["macs"][0]
    assert 0.5 <= left <= 0.525
    assert "reached" in one["ledger"]["goal"]


def after_trials_without_an_event(rank, size):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    apo = Apoptosis(model, optimizer, torch.zeros(2, 12), target="1.3x", total_steps=60, align=8, calibration=1.0)
    draws = torch.Generator().manual_seed(rank)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(128, 12, generator=draws)).square().mean().backward()
        optimizer.step()
        apo.step()
    return [attempt.outcome for attempt in apo.ledger().history], [p.detach().clone() for p in net.parameters()]


def test_gradients_are_averaged_after_trials_that_changed_nothing():
    results, faults = together(after_trials_without_an_event)
    assert faults == [None, None]
    (outcomes, one), (_, two) = results
    assert "nothing" in outcomes
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def failing_on_one_rank(rank, size):
    whole = sensitivity.outputs_of_edited

    def fails(model, probe, **options):
        if rank and sensitivity_trials.append(1) is None and len(sensitivity_trials) == 2:
            raise OutOfMemoryError("memory ran out")
        return whole(model, probe, **options)

    sensitivity.outputs_of_edited = fails
    return train(rank, size, target="2x", rows=256)


sensitivity_trials: list[int] = []


def test_memory_that_runs_out_in_a_trial_of_one_rank_is_told_to_all():
    _, faults = together(failing_on_one_rank)
    assert all(faults)
    assert all("memory ran out" in fault for fault in faults)


class Residual(nn.Module):
    """Two residual blocks, of which the second adds next to nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(12, 24)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 24)) for _ in range(2))
        self.head = nn.Linear(24, 4)
        with torch.no_grad():
            self.blocks[1][2].weight.mul_(1e-4)
            self.blocks[1][2].bias.mul_(1e-4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def emptied(rank, size):
    net = Residual()
    model = DistributedDataParallel(net)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    apo = Apoptosis(model, optimizer, torch.zeros(2, 12), pretrained=True, total_steps=400, align=64, calibration=1.0)
    draws, events = torch.Generator().manual_seed(rank), []
    for _ in range(60):
        optimizer.zero_grad()
        x = torch.randn(96, 12, generator=draws)
        (model(x)[:, 0] - x[:, 0].relu()).square().mean().backward()
        optimizer.step()
        if event := apo.step():
            events.append((event.step, dict(event.groups)))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    return events, state, apo.ledger().as_dict()["macs"]


def test_a_branch_is_emptied_on_all_ranks_alike_and_gradients_stay_averaged():
    results, faults = together(emptied)
    assert faults == [None, None]
    (events, one, macs), (others, two, _) = results
    assert events == others
    assert any(after == 0 for _, groups in events for _, after in groups.values())
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(name.startswith("blocks.1") and "weight" in name for name in one)
    assert macs[1] < 0.55 * macs[0]


def looking(rank, size, compiled):
    if compiled and not rank:
        looks.compile_seconds = lambda: 1.0
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 4))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    apo = Apoptosis(model, optimizer, torch.zeros(2, 12), total_steps=400, align=1, calibration=1.0)
    draws, axes = torch.Generator().manual_seed(rank), torch.randn(12, 12, generator=torch.Generator().manual_seed(9))
    for step in range(130):
        optimizer.zero_grad()
        width = 1 if step < 75 else 12
        x = torch.randn(128, width, generator=draws) @ axes[:width]
        torch.nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        optimizer.step()
        apo.step()
    return [(one.outcome, one.cause) for one in apo.ledger().history], len(apo._memory.spreads)


def test_ranks_agree_on_looks_and_one_that_takes_none_does_not_leave_the_others_waiting():
    for compiled, cause in ((False, "forming"), (True, "")):
        results, faults = together(looking, compiled)
        assert faults == [None, None]
        (one, _), (two, number) = results
        assert one == two
        assert number == 2
        assert one[0][1] == cause
