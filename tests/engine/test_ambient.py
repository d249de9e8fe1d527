"""Contexts of torch that a call may stand in: what comes out of an event can be trained, or the call is refused."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from apoptosis import Apoptosis, load, save, shrink_
from apoptosis.errors import ArgumentError


def _planted():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        net[0].weight[8:], net[0].bias[8:] = net[0].weight[:8], net[0].bias[:8]
    return net


def _inputs(rows=256):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))


def _trains(net, optimizer):
    optimizer.zero_grad()
    net(_inputs()).square().mean().backward()
    optimizer.step()


CONTEXTS = {
    "none": nullcontext,
    "no_grad": torch.no_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "device": lambda: torch.device("cpu"),
    "stance": lambda: torch.compiler.set_stance("force_eager"),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_shrink_and_load_under_contexts_of_torch(name, tmp_path):
    net = _planted()
    optimizer = torch.optim.Adam(net.parameters())
    _trains(net, optimizer)
    with torch.no_grad():
        net[0].weight[8:], net[0].bias[8:] = net[0].weight[:8], net[0].bias[:8]
    with CONTEXTS[name]():
        assert shrink_(net, _inputs(2), [_inputs()], tolerance=0.01, optimizer=optimizer)
    assert net[0].out_features == 8
    _trains(net, optimizer)
    save(tmp_path / "net.safetensors", net, optimizer)
    other = _planted()
    again = torch.optim.Adam(other.parameters())
    with CONTEXTS[name]():
        load(tmp_path / "net.safetensors", other, again)
    _trains(other, again)
    assert other[0].out_features == 8


@pytest.mark.parametrize("name", [*CONTEXTS, "inference"])
def test_step_under_contexts_of_torch(name):
    context = torch.inference_mode if name == "inference" else CONTEXTS[name]
    net = _planted()
    optimizer = torch.optim.SGD(net.parameters(), 1e-4)
    apo = Apoptosis(net, optimizer, _inputs(2), total_steps=40, align=1, calibration=0.0, tolerance=0.05)
    events = []
    for _ in range(40):
        _trains(net, optimizer)
        with context():
            events.append(apo.step())
    assert any(events)
    _trains(net, optimizer)
    assert not any(p.is_inference() for p in net.parameters())


def test_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        assert shrink_(_planted(), _inputs(2), [_inputs()], tolerance=0.01)
    finally:
        torch.use_deterministic_algorithms(False)


def test_inference_mode_is_refused_where_what_comes_out_could_not_be_trained(tmp_path):
    net = _planted()
    save(tmp_path / "net.safetensors", net)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    with torch.inference_mode():
        with pytest.raises(ArgumentError, match=r"torch\.inference_mode"):
            shrink_(net, _inputs(2), [_inputs()], tolerance=0.01)
        with pytest.raises(ArgumentError, match=r"torch\.inference_mode"):
            load(tmp_path / "net.safetensors", net)
        with pytest.raises(ArgumentError, match=r"torch\.inference_mode"):
            Apoptosis(net, torch.optim.SGD(net.parameters(), 0.1), _inputs(2))
        made = _planted()
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    with pytest.raises(ArgumentError, match=r"'0\.weight' was made under torch\.inference_mode"):
        shrink_(made, _inputs(2), [_inputs()], tolerance=0.01)
