"""Capturing leaves no trace, and fails with one line."""

from __future__ import annotations

import gc
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from apoptosis.errors import CaptureError
from apoptosis.graph import analyse
from apoptosis.graph.trace.result import TraceResult
from apoptosis.graph.trace.storage import StorageMap
from apoptosis.graph.trace.tracer import Tracer


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(216, 5), nn.RReLU(),
        nn.Linear(5, 2),
    )  # fmt: skip


def test_nothing_of_the_model_changes() -> None:
    net, x = network(), torch.randn(4, 3, 8, 8)
    net(x).sum().backward()
    net[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    identities = [id(t) for t in (*net.parameters(), *net.buffers())]
    versions = [t._version for t in (*net.parameters(), *net.buffers())]
    grads = [p.grad for p in net.parameters()]
    values = [g.clone() for g in grads]
    flags = [m.training for m in net.modules()]
    hooks = nn.modules.module._global_forward_hooks.copy(), nn.modules.module._global_forward_pre_hooks.copy()
    calls = []
    handle = net[0].register_forward_hook(lambda *_: calls.append(1))
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    analyse(net, (x,), {})
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [id(t) for t in (*net.parameters(), *net.buffers())] == identities
    assert [t._version for t in (*net.parameters(), *net.buffers())] == versions
    assert all(p.grad is g for p, g in zip(net.parameters(), grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads, values, strict=True))
    assert [m.training for m in net.modules()] == flags
    assert hooks == (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)
    assert len(net[0]._forward_hooks) == 1
    assert len(calls) == 2
    handle.remove()


def test_a_living_graph_still_goes_backward() -> None:
    net, x = network(), torch.randn(4, 3, 8, 8)
    loss = net(x).sum()
    analyse(net, (x,), {})
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_restored_after_a_failure() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            self.norm(x)
            raise RuntimeError("the user's own\nproblem")

    net = Fails().eval()
    before, x = net.norm.running_mean, torch.randn(3, 4)
    state = torch.get_rng_state()
    with pytest.raises(
        CaptureError,
        match=r"^Fails fails on example_input in training mode \(test_capture.py:\d+\): RuntimeError: the user's own$",
    ):
        analyse(net, (x,), {})
    assert net.norm.running_mean is before
    assert torch.equal(before, torch.zeros(4))
    assert not net.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not nn.modules.module._global_forward_pre_hooks


def test_hint_for_a_single_example() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(CaptureError, match="needs at least two examples"):
        analyse(net, (torch.randn(1, 4),), {})


def test_wrong_shape_and_lazy_parameters() -> None:
    with pytest.raises(CaptureError, match="shape the model trains on"):
        analyse(nn.Linear(4, 4), (torch.randn(2, 5),), {})
    with pytest.raises(CaptureError, match="not initialised"):
        analyse(nn.LazyLinear(4), (torch.randn(2, 5),), {})


def test_same_structure_every_time() -> None:
    class Stochastic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            h = self.a(x)
            return self.c(h + self.b(h) if not self.training or random.random() < 0.5 else h)

    net, x = Stochastic(), torch.randn(3, 8)
    runs = []
    for seed in range(4):
        random.seed(seed)
        structure = analyse(net, (x,), {})
        runs.append([(g.name, g.num_channels, g.macs_per_channel, g.pin) for g in structure.groups])
    assert all(run == runs[0] for run in runs)


def test_training_goes_on_as_if_nothing_had_happened() -> None:
    def train(*, analysing: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(3):
            loss = net(torch.randn(4, 3, 8, 8)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if analysing:
                analyse(net, (torch.ones(4, 3, 8, 8),), {})
        return [t.clone() for t in net.state_dict().values()]

    assert all(torch.equal(a, b) for a, b in zip(train(analysing=False), train(analysing=True), strict=True))


def _calls(depth: int) -> int:
    """Return how many functions of Python a capture of so many layers calls, which no load of the machine changes."""
    net, x, count = (
        nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(64, 64), nn.ReLU())]),
        torch.ones(4, 64),
        0,
    )

    def note(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event == "call"

    analyse(net, (x,), {})  # what is made once is there
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        analyse(net, (x,), {})
    finally:
        sys.setprofile(before)
    return count


def test_fast_enough_to_run_after_every_event() -> None:
    """Captures grow in proportion to the layers, and by a few thousand calls for each, some milliseconds."""
    few, many = _calls(5), _calls(20)
    assert (many - few) / 15 < 8000
    assert many < 4.5 * few


def test_an_evaluation_flag_outside_is_no_matter() -> None:
    net, x = network(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        quiet = analyse(net.eval(), (x,), {})
    loud = analyse(net.train(), (x,), {})
    assert [(g.name, g.num_channels, g.neuron) for g in quiet.groups] == [
        (g.name, g.num_channels, g.neuron) for g in loud.groups
    ]


def test_nothing_of_a_pass_waits_for_the_garbage_collector() -> None:
    def alive() -> int:
        return sum(type(o) in (Tracer, StorageMap, TraceResult) for o in gc.get_objects())

    net, x = network(), torch.randn(4, 3, 8, 8)
    gc.collect()
    gc.disable()
    try:
        before = alive()
        analyse(net, (x,), {})
        assert alive() == before
    finally:
        gc.enable()


def test_every_capture_draws_the_same_and_other_devices_keep_their_numbers() -> None:
    draws = []
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    net[1].register_forward_hook(lambda _, args, out: draws.append(out.detach().clone()))
    for seed in (1, 2):
        torch.manual_seed(seed)
        waiting = len(torch.cuda._queued_calls)  # seeds for devices that are not begun with yet
        states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        analyse(net, (torch.ones(3, 4),), {})
        assert len(torch.cuda._queued_calls) == waiting
        assert all(
            torch.equal(a, b) for a, b in zip(states, torch.cuda.get_rng_state_all() if states else [], strict=True)
        )
    assert torch.equal(draws[0], draws[2])
