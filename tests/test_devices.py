"""The loop on the processor and, where there is one, on a CUDA device: the same tests, precision by precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from apoptosis import load, save

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
every_device = pytest.mark.parametrize("device", ["cpu", CUDA])


def wide(device: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(6, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4)
    return nn.Sequential(*layers).to(device)


def train(runs, net, optimizer, apo, device, *, dtype=None, scaler=None, steps=120):
    """Steps in mixed precision; events, and the share of the last batches' examples that are told right."""
    events, right = [], 0
    for step in range(steps):
        x = runs.inputs(128, step).to(device)
        y = runs.labels(x)
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            out = net(x)
        loss = nn.functional.cross_entropy(out.float(), y)
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if apo is not None and (event := apo.step()):
            events.append(event)
        right += int((out.argmax(1) == y).sum()) if step >= steps - 8 else 0
    return events, right / (8 * 128)


@every_device
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_mixed_precision_shrinks_and_learns(runs, device, dtype):
    net = wide(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler(device) if dtype is torch.float16 else None
    apo = runs.start(net, optimizer, runs.inputs(4, 99).to(device), total_steps=120, tolerance=0.02)
    events, right = train(runs, net, optimizer, apo, device, dtype=dtype, scaler=scaler)
    assert events
    assert net[0].out_features < 256
    assert right > 0.9
    assert all(p.device.type == device and p.dtype == torch.float32 for p in net.parameters())
    states = [s for s in optimizer.state.values() for s in s.values() if s.dim()]
    assert states
    assert all(s.device.type == device for s in states)


@every_device
def test_overflow_of_a_scaled_loss_is_no_fault_of_the_network(runs, device):
    net = wide(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40)  # the first steps overflow and are left out
    apo = runs.start(net, optimizer, runs.inputs(4, 99).to(device), total_steps=120, tolerance=0.02)
    events, right = train(runs, net, optimizer, apo, device, dtype=torch.float16, scaler=scaler)
    assert scaler.get_scale() < 2.0**40
    assert events
    assert right > 0.9


@every_device
def test_widths_that_tensor_cores_like(runs, device):
    net = wide(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    apo = runs.start(net, optimizer, runs.inputs(4, 99).to(device), total_steps=120, tolerance=0.02, align=64)
    events, _ = train(runs, net, optimizer, apo, device, dtype=torch.bfloat16)
    assert events
    assert {layer.out_features % 64 for layer in (net[0], net[2])} == {0}


@every_device
def test_a_shrunk_network_goes_to_disk_and_back(runs, device, tmp_path):
    net = wide(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3, fused=True)
    apo = runs.start(net, optimizer, runs.inputs(4, 99).to(device), total_steps=120, tolerance=0.02)
    train(runs, net, optimizer, apo, device, steps=80)
    save(tmp_path / "half", net, optimizer, apo)
    fresh = wide(device)
    other = torch.optim.Adam(fresh.parameters(), lr=3e-3, fused=True)
    again = runs.start(fresh, other, runs.inputs(4, 99).to(device), total_steps=120, tolerance=0.02)
    load(tmp_path / "half", fresh, other, again)
    assert runs.same(fresh.state_dict(), net.state_dict())
    for model, chosen, own in ((net, optimizer, apo), (fresh, other, again)):
        train(runs, model, chosen, own, device, steps=5)
    assert runs.same(fresh.state_dict(), net.state_dict())


@every_device
def test_compiled_code_is_dropped_at_events_and_the_limit_of_recompilations_is_never_met(runs, device):
    torch.compiler.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(tuple(inputs[0].shape))
        return graph.forward

    net = wide(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    model = torch.compile(net, backend=backend, dynamic=False)
    apo = runs.start(model, optimizer, runs.inputs(4, 99).to(device), total_steps=400, tolerance=0.01)
    events, _ = train(runs, model, optimizer, apo, device, steps=400)
    assert len(compiled) == len(events) + 1
    out = copy.deepcopy(net)(runs.inputs(8, 1).to(device))
    assert torch.allclose(model(runs.inputs(8, 1).to(device)), out, atol=1e-5)
    torch.compiler.reset()
