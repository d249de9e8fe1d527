"""replay(): what every consumer site reads, from a pass that leaves no trace in the model."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apoptosis.errors import CaptureError
from apoptosis.graph import analyse, replay
from apoptosis.records import Seen, Structure

GEN = torch.Generator().manual_seed(0)
X = torch.randn(4, 5, 8, generator=GEN)


class Everything(nn.Module):
    """Buffers that a pass writes, randomness, dropout, a recurrence, a functional layer and attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.norm, self.drop = nn.Linear(8, 6), nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.lstm, self.mha = nn.LSTM(6, 6, batch_first=True), nn.MultiheadAttention(6, 2, batch_first=True)
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.out = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
        self.calls += 1
        h = self.norm(self.lstm(self.drop(self.a(x)))[0]) + 0.0 * torch.rand(()) * random.random() * np.random.rand()
        return self.out(F.linear(self.mha(h, h, h)[0], self.weight).tanh() * gain)


def shown(model: nn.Module, x: Tensor, *, training: bool = True) -> list[tuple[str, Tensor, Tensor | None]]:
    found: list[tuple[str, Tensor, Tensor | None]] = []

    def watch(seen: Seen) -> None:
        found.append((seen.site, seen.x.clone(), None if seen.right is None else seen.right.clone()))

    replay(model, (x,), {}, watch, training=training)
    return found


def sites(structure: Structure) -> dict[str, int]:
    return {s.key: int(s.input_columns.max()) + 1 for g in structure.groups if g.pin is None for s in g.sites}


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = Everything()
    model.norm.eval()
    model(X).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    objects = {name: id(value) for name, value in (*model.named_parameters(), *model.named_buffers())}
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    flags = {name: m.training for name, m in model.named_modules()}
    hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    before = X.clone()

    assert shown(model, X, training=training)

    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: id(value) for name, value in (*model.named_parameters(), *model.named_buffers())} == objects
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())
    assert {name: m.training for name, m in model.named_modules()} == flags
    assert {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()} == hooks
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == generators[1:]
    assert torch.equal(X, before)
    assert torch.is_grad_enabled()


def test_flags_of_the_backends_are_left_as_they_were() -> None:
    before = (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.mha.get_fastpath_enabled())
    shown(Everything(), X)
    assert before == (
        torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.mha.get_fastpath_enabled()
    )  # fmt: skip


def test_every_site_is_shown_at_its_width() -> None:
    model = Everything()
    wanted = sites(analyse(model, (X,), {}))
    assert len(wanted) >= 5
    found = shown(model, X)
    assert set(wanted) <= {key for key, _, _ in found}
    for key, x, right in found:
        if key in wanted:
            assert x.shape[-1] >= wanted[key]
            assert (right is not None) == key.endswith(":product")
            assert right is None or right.shape[-1] == x.shape[-1]


def test_a_functional_layer_reads_what_its_input_is() -> None:
    model = Everything().eval()
    with torch.no_grad():
        h = model.norm(model.lstm(model.a(X))[0])
        read = model.mha(h, h, h)[0]
    (x,) = (x for key, x, _ in shown(model, X, training=False) if key == ":weight:1")
    torch.testing.assert_close(x.reshape(-1, 6), read.reshape(-1, 6))


def test_a_recurrence_reads_its_states_step_by_step() -> None:
    model = Everything().eval()
    with torch.no_grad():
        states = model.lstm(model.a(X))[0]
    steps = [x for key, x, _ in shown(model, X, training=False) if key == "lstm:lstm.weight_hh_l0:1"]
    assert len(steps) == 5
    assert float(steps[0].abs().max()) == 0.0  # the first state
    read = torch.stack([s.reshape(-1, 6) for s in steps[1:]], 1)
    torch.testing.assert_close(read, states[:, :-1])


def test_dropout_lets_everything_through() -> None:
    model = Everything()
    (read,) = (x for key, x, _ in shown(model, X, training=True) if key == "lstm:lstm.weight_ih_l0:1")
    with torch.no_grad():
        plain = model.a(X)
    for a, b in zip(read.reshape(-1, 6).T, plain.reshape(-1, 6).T, strict=True):  # rows in either order
        torch.testing.assert_close(a.sort().values, b.sort().values)


def test_named_arguments_and_errors() -> None:
    model = Everything()
    found: dict[float, Tensor] = {}
    for gain in (1.0, 2.0):
        replay(
            model, (X,), {"gain": gain},
            lambda seen, gain=gain: found.update({gain: seen.x.clone()}) if seen.site == "out:out.weight:1" else None,
        )  # fmt: skip
    torch.testing.assert_close(found[2.0], 2.0 * found[1.0])
    with pytest.raises(CaptureError):
        replay(model, (X[..., :3],), {}, lambda seen: None)
    assert model.training
    assert float(model.calls) == 0.0


def test_an_error_of_the_watch_leaves_the_model_whole() -> None:
    def broken(seen: Seen) -> None:
        raise ZeroDivisionError

    model = Everything()
    with pytest.raises((ZeroDivisionError, CaptureError)):
        replay(model, (X,), {}, broken)
    assert float(model.calls) == 0.0
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
