"""Traps in tensors: weights that are computed, shared or no parameters, hooks, odd inputs, types and layouts.

What every test says is told in test_traps.py, where traps in the user's code are.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import weight_norm as hooked_weight_norm

from apoptosis import shrink_
from apoptosis.errors import ArgumentError
from apoptosis.graph import analyse
from apoptosis.model.evaluate import as_call
from families.plant import plant
from families.traps import FOUND, Net, X, draw, shrink

# ------------------------------------------------------------------------------------------------ computed weights


class EqualisedScale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def _wrapped(kind: str, inputs: int, outputs: int) -> nn.Module:
    torch.manual_seed(1)
    layer = nn.Linear(inputs, outputs).double()
    if kind == "weight norm":
        return parametrizations.weight_norm(layer)
    if kind == "weight norm, by hook":
        with pytest.warns(FutureWarning):
            return hooked_weight_norm(layer)
    if kind == "spectral norm":
        return parametrizations.spectral_norm(layer)
    parametrize.register_parametrization(layer, "weight", EqualisedScale(0.5))
    return layer


COMPUTED = ["weight norm", "weight norm, by hook", "spectral norm", "equalised scale"]


@pytest.mark.parametrize("kind", COMPUTED)
def test_consumers_with_computed_weights(kind: str) -> None:
    """Inputs may go where every row can take a fold and keep its size; else the pin says why."""
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), _wrapped(kind, 8, 3)).double()
    if kind == "spectral norm":
        result = shrink(net, X, {})
        assert not result.event
        assert "contracts channels with values that are not a parameter" in result.pins["0"]
        return
    assert shrink(net, X, {"0": 3}).event.groups == {"0": (8, 5)}


@pytest.mark.parametrize("kind", COMPUTED)
def test_producers_with_computed_weights(kind: str) -> None:
    """Rows may go where each is computed from its own row of the parameters; else the pin says why."""
    net = nn.Sequential(_wrapped(kind, 6, 8), nn.ReLU(), nn.Linear(8, 3).double())
    if kind == "spectral norm":
        result = shrink(net, X, {})
        assert not result.event
        assert "parametrizations.weight.0" in next(iter(result.pins.values()))
        return
    name = analyse(net, (X,), {}).groups[0].name
    assert shrink(net, X, {name: 3}).event.groups == {name: (8, 5)}


# ------------------------------------------------------------------------------- tensors that are no parameters, roles


def test_tensors_outside_the_parameters() -> None:
    """A plain tensor attribute, a closure's tensor: nothing can slice them, so what meets them stays."""

    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
            self.scale = [draw(8, seed=1)]

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu() * self.scale[0])

    torch.manual_seed(0)
    result = shrink(Outside().double(), X, {})
    assert not result.event
    assert "combines channels with a constant, which has none" in result.pins["a"]
    assert "test_traps_tensors.py:" in result.pins["a"]
    one_for_all = Net(lambda net, h: h * torch.tensor(2.0, dtype=h.dtype))
    assert shrink(one_for_all, X, {"a": 3}).event.groups == FOUND


def test_a_matrix_outside_the_parameters() -> None:
    mixing = draw(8, 8, seed=2)
    result = shrink(Net(lambda net, h: h @ mixing), X, {})
    assert not result.event
    assert "contracts channels with values that are not a parameter" in result.pins["a"]


def test_a_parameter_used_twice() -> None:
    """Once along its rows, once along its columns: rows and columns are not the same channels."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 6))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.w).relu(), self.w.t())

    torch.manual_seed(0)
    net = Twice().double()
    result = shrink(net, X, {})
    assert not result.event
    assert "'w' is producer and consumer along the same axis" in result.pins["w"]


def test_one_module_called_twice_pools_its_inputs() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu()) - self.b(self.a(x.flip(0)).relu())

    torch.manual_seed(0)
    assert shrink(Siamese().double(), X, {"a": 3}).event.groups == FOUND


def test_a_parameter_that_scales_and_shifts() -> None:
    net = Net(lambda net, h: (h.relu() + net.shift) * net.gain)
    net.shift, net.gain = nn.Parameter(draw(8, seed=1)), nn.Parameter(draw(1, 8, seed=2))
    result = shrink(net, X, {"a": 3})
    assert result.event.groups == FOUND
    assert result.after.shift.shape == (5,)
    assert result.after.gain.shape == (1, 5)


def test_unused_and_frozen_parameters() -> None:
    net = Net(lambda net, h: h.relu(), unused=nn.Linear(4, 4))
    net.a.bias.requires_grad_(False)
    net.b.bias.requires_grad_(False)
    unused = copy.deepcopy(net.unused.state_dict())
    notes = analyse(net, (X,), {}).notes
    assert any("'unused" in note and "not r" in note for note in notes)
    result = shrink(net, X, {"a": 3})
    assert result.event.groups == FOUND
    assert {n: p.requires_grad for n, p in result.after.named_parameters()} == {
        n: p.requires_grad for n, p in result.before.named_parameters()
    }
    assert all(torch.equal(unused[name], value) for name, value in result.after.unused.state_dict().items())


def test_hooks_of_the_user_are_kept_and_followed() -> None:
    """A hook may change what a module returns: it belongs to the forward pass."""
    seen: list[tuple[int, ...]] = []
    grads: list[tuple[int, ...]] = []
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    handles = [
        net[0].register_forward_hook(lambda module, args, output: output * 2.0 + 1.0),
        net[2].register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape))),
    ]
    net[0].weight.register_hook(lambda grad: grads.append(tuple(grad.shape)))
    args, kwargs = as_call(X)
    plant(net, analyse(net, args, kwargs), "0", 3)
    with torch.no_grad():
        expected = net(X)
    event = shrink_(net, X, [X], tolerance=0)
    assert event.groups == {"0": (8, 5)}
    seen.clear()
    found = net(X)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert seen == [(256, 5)]
    found.sum().backward()
    assert grads == [(5, 6)]
    for handle in handles:
        handle.remove()
    assert not net[0]._forward_hooks
    assert not net[2]._forward_pre_hooks


def test_lazy_modules() -> None:
    net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3)).double()
    with pytest.raises(ArgumentError, match=r"parameter '0\.weight' is lazy: run the model once"):
        shrink_(net, X, [X], tolerance=0)
    net(X)
    assert shrink(net, X, {"0": 3}).event.groups == {"0": (8, 5)}


# ------------------------------------------------------------------------------------------------- inputs and outputs


@dataclass
class Output:
    logits: Tensor
    hidden: dict[str, list[Tensor]] | None = None


class Boxed(nn.Module):
    def __init__(self, *, returned: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.returned = returned
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.double()

    def forward(self, batch: dict[str, Any]) -> Output:
        h = self.a(batch["x"][0]).relu()
        return Output(self.b(h) * batch["weight"], {"inner": [h]} if self.returned else None)


def _batch(rows: int = 256) -> tuple[dict[str, Any]]:
    return ({"x": [draw(rows, 6)], "weight": draw(rows, 1, seed=3), "name": "batch"},)


def test_dict_inputs_and_dataclass_outputs() -> None:
    assert shrink(Boxed(returned=False), _batch(), {"a": 3}).event.groups == FOUND
    result = shrink(Boxed(returned=True), _batch(), {})
    assert not result.event
    assert "network's output" in result.pins["a"]


def test_keyword_inputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, *, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
            h = self.a(x).relu()
            return {"logits": self.b(h if mask is None else h * mask[:, None])}

    torch.manual_seed(0)
    mask = (draw(256, seed=4) > 0).double()
    assert shrink(Named().double(), {"x": X, "mask": mask}, {"a": 3}).event.groups == FOUND


# ------------------------------------------------------------------------------------------------- dtypes, layouts


def _turned(net: Any, h: Tensor) -> Tensor:
    """Multiply pairs of channels as complex numbers."""
    pairs = torch.view_as_complex(h.unflatten(-1, (-1, 2)))
    angle = torch.linspace(0.0, 1.0, len(h), dtype=torch.float64)[:, None]
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def _spectrum(net: Any, h: Tensor) -> Tensor:
    return torch.fft.rfft(h, dim=0).abs().mean(0) * h.tanh()


def _complex_parts(net: Any, h: Tensor) -> Tensor:
    z = torch.complex(h, h.square())
    return (z * z.conj()).real + z.angle()


@pytest.mark.parametrize("between", [_turned, _spectrum, _complex_parts])
def test_complex_tensors(between) -> None:
    net = Net(between)
    width = 4 if between is _turned else 8  # pairs of neighbours, real and imaginary
    assert shrink(net, X, {"a": 1}).event.groups == {"a": (width, width - 1)}


def test_complex_parameters_lose_their_entries() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
            self.w = nn.Parameter(torch.randn(8, dtype=torch.cdouble))

        def forward(self, x: Tensor) -> Tensor:
            return self.b((self.a(x) * self.w).real)

    torch.manual_seed(0)
    net = Spectral()
    net.a.double()
    net.b.double()
    result = shrink(net, X, {"a": 3})
    assert result.event.groups == FOUND
    assert result.after.w.dtype == torch.cdouble
    assert result.after.w.shape == (result.after.a.out_features,)


def test_integer_tensors() -> None:
    """Numbers of words, counts and masks carry no channels; channels that are compared or rounded stay channels."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.a, self.b = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, numbers: Tensor) -> Tensor:
            h = self.a(self.words(numbers).tanh())
            h = torch.where(h > 0, h, h.long().to(h.dtype))
            count = (numbers > 0).sum(1, keepdim=True)
            return self.b(h.sum(1) / count.clamp(min=1))

    torch.manual_seed(0)
    numbers = torch.randint(0, 20, (256, 4), generator=torch.Generator().manual_seed(0))
    result = shrink(Words().double(), numbers, {"words": 3, "a": 3})
    assert result.event.groups == {"words": (8, 5), "a": (8, 5)}
    assert result.after.words.embedding_dim == 5


def test_half_precision_parameters() -> None:
    """Folded in float64 and written back in the parameters' own type: at most its own round-off is lost."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16()
    result = shrink(net, draw(512, 6, dtype=torch.bfloat16), {"0": 3, "2": 3}, rtol=2e-2)
    assert {p.dtype for p in result.after.parameters()} == {torch.bfloat16}
    assert result.event.groups == {"0": (8, 5), "2": (8, 5)}


def test_channels_last() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    net = net.double().to(memory_format=torch.channels_last)
    images = draw(64, 3, 6, 6).to(memory_format=torch.channels_last)
    result = shrink(net, images, {"0": 3, "3": 2})
    assert result.event.groups == {"0": (8, 5), "3": (8, 6)}
    assert result.after[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_inputs_are_not_written_to() -> None:
    net = Net(lambda net, h: h.relu())
    original = net.forward
    net.forward = lambda x: original(x.mul_(2.0))
    x = X.clone()
    shrink_(net, x, [x], tolerance=0)
    assert torch.equal(x, X)
