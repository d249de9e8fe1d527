"""Complex-valued channels: folds keep imaginary parts, errors are those of the complex outputs, the rest is pinned."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import apoptosis
from apoptosis import Apoptosis, shrink_
from apoptosis.graph import analyse

C64 = torch.complex64


def _random(*shape: int, seed: int = 1, dtype: torch.dtype = C64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _planted(*weights: Tensor) -> None:
    with torch.no_grad():
        for weight in weights:
            half = len(weight) // 2
            weight[half:] = weight[:half] * torch.linspace(0.5, 2.0, half).view(-1, *[1] * (weight.dim() - 1))


class Pair(nn.Module):
    """Two complex linear layers with something between them."""

    def __init__(self, between=lambda h: h, planted: bool = True, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, width, dtype=C64), nn.Linear(width, 4, dtype=C64)
        self.between = between
        if planted:
            _planted(self.a.weight, self.a.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def _crelu(h: Tensor) -> Tensor:
    return torch.complex(F.relu(h.real), F.relu(h.imag))


def _as_real_and_back(h: Tensor) -> Tensor:
    return torch.view_as_complex(F.leaky_relu(torch.view_as_real(h)).contiguous())


class Magnitudes(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).abs())


class Flat(Pair):
    """Real and imaginary parts side by side are read by a real layer."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(torch.view_as_real(self.a(x)).flatten(-2)))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(_random(16, 6, seed=2)), nn.Parameter(_random(4, 16, seed=3))
        _planted(self.w)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(_crelu(F.linear(x, self.w)), self.v)


class Mixing(nn.Module):
    """Attention over complex values, with real scores."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(6, 8, dtype=C64), nn.Linear(6, 8, dtype=C64)
        self.v, self.o = nn.Linear(6, 16, dtype=C64), nn.Linear(16, 4, dtype=C64)
        for layer in (self.q, self.k, self.v):
            _planted(layer.weight, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.q(x) @ self.k(x).conj().mT).abs().softmax(-1)
        return self.o(scores.to(C64) @ self.v(x))


class Spectral(nn.Module):
    """The layer of a Fourier neural operator: the lowest frequencies are mixed by matrices of their own."""

    def __init__(self, inputs: int, outputs: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(_random(inputs, outputs, 2 * modes, modes, seed=4) / inputs)

    def forward(self, x: Tensor) -> Tensor:
        low, found = self.modes, torch.fft.rfft2(x)
        out = torch.zeros(len(x), self.weight.shape[1], *found.shape[2:], dtype=found.dtype)
        out[:, :, :low, :low] = torch.einsum("bixy,ioxy->boxy", found[:, :, :low, :low], self.weight[:, :, :low])
        out[:, :, -low:, :low] = torch.einsum("bixy,ioxy->boxy", found[:, :, -low:, :low], self.weight[:, :, low:])
        return torch.fft.irfft2(out, s=x.shape[-2:])


class Operator(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lift, self.head, self.out = nn.Conv2d(2, width, 1), nn.Conv2d(width, 24, 1), nn.Conv2d(24, 1, 1)
        self.spectral = nn.ModuleList(Spectral(width, width, 3) for _ in range(2))
        self.local = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(2))
        with torch.no_grad():  # the channels behind every layer come in pairs
            for layer in self.local:
                half = width // 2
                layer.weight[half:], layer.bias[half:] = layer.weight[:half], layer.bias[:half]
            for spectral in self.spectral:
                spectral.weight[:, width // 2 :] = spectral.weight[:, : width // 2]

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        for spectral, local in zip(self.spectral, self.local, strict=True):
            x = F.gelu(spectral(x) + local(x))
        return self.out(F.gelu(self.head(x)))


CASES = {
    "linear": (lambda: Pair(lambda h: h * h.abs()), 6, {"a": (16, 8)}),
    "crelu": (lambda: Pair(_crelu), 6, {"a": (16, 8)}),
    "as real and back": (lambda: Pair(_as_real_and_back), 6, {"a": (16, 8)}),
    "magnitudes": (Magnitudes, 6, {"a": (16, 8)}),
    "side by side": (Flat, 6, {"a": (16, 8)}),
    "functional": (Functional, 6, {"w": (16, 8)}),
    "attention": (Mixing, (7, 6), {"v": (16, 8)}),
}


def _change(before: Tensor, after: Tensor) -> float:
    return float(((after - before).abs().norm() / before.abs().norm()).detach())


@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
@pytest.mark.parametrize("name", CASES)
def test_planted_channels_go_and_the_outputs_stay(name, tolerance):
    make, shape, groups = CASES[name]
    net, x = make().eval(), _random(500, *(shape if isinstance(shape, tuple) else (shape,)))
    before = net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where it discards an imaginary part
        event = shrink_(net, x[:4], [x], tolerance=tolerance)
    assert event.groups == groups
    assert _change(before, net(x)) < 1e-5
    assert event.measured["output_rms"] < 1e-5


def test_fourier_neural_operator():
    net, x = Operator().eval(), _random(30, 2, 16, 16, dtype=torch.float32)
    structure = analyse(net, (x[:2],))
    assert [g.name for g in structure.groups if g.pin is not None] == ["out"]
    before = net(x)
    event = shrink_(net, x[:2], [x], tolerance=0.0)
    assert event.groups["spectral.0"] == event.groups["spectral.1"] == (12, 6)
    assert net.spectral[1].weight.shape == (6, 6, 6, 3)
    assert _change(before, net(x)) < 1e-5


def test_a_complex_multiple_is_no_real_multiple():
    net, x = Pair(lambda h: h, planted=False), _random(500, 6)
    with torch.no_grad():
        net.a.weight[8:], net.a.bias[8:] = 1j * net.a.weight[:8], 1j * net.a.bias[:8]
    net.a.weight.data[:, 3:] *= 1e-9  # else six inputs explain everything
    before = net(x)
    shrink_(net, x[:4], [x], tolerance=0.0)
    assert _change(before, net(x)) < 1e-5


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("inputs", ["complex", "real"])  # real ones give channels whose two parts are not alike
def test_the_certificate_is_the_error_of_the_complex_output(inputs, functional):
    class Read(Pair):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            return F.linear(h, self.b.weight, self.b.bias) if functional else self.b(h)

    net = Read(planted=False, width=40).eval()
    x = _random(4000, 6)
    if inputs == "real":
        x = torch.complex(x.real, torch.zeros(()).expand_as(x.real))
    with torch.no_grad():
        net.a.weight *= 0.3
    before = net(x)
    event = shrink_(net, x[:4], [x], tolerance=0.1)
    assert event.groups["a"][1] < 40
    (site,) = [c for c in event.certificates if c.kind == "empirical"]
    with torch.no_grad():
        moved = float((net(x) - before).abs().square().mean())
        spread = float((before - before.mean(0)).abs().square().mean())
    assert site.value == pytest.approx((moved / spread) ** 0.5, rel=0.25)


def _train(net, optimizer, apo, x, steps):
    events = []
    for _ in range(steps):
        (net(x) - x[:, :4]).abs().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        events += [event] if (event := apo.step()) else []
    return events


def test_training_with_events_and_a_checkpoint(tmp_path):
    net, x = Pair(_crelu, width=24), _random(300, 6)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    apo = Apoptosis(net, optimizer, x[:4], tolerance=0.05, total_steps=60, align=1, calibration=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        events = _train(net, optimizer, apo, x, 40)
    assert events
    assert net.a.weight.dtype == C64
    assert net.a.weight.imag.abs().mean() > 0.01
    assert optimizer.state[net.a.weight]["exp_avg"].shape == net.a.weight.shape
    apoptosis.save(tmp_path / "file", net, optimizer, apo)
    twin = Pair(_crelu, width=24)
    other = torch.optim.Adam(twin.parameters(), lr=1e-3)
    again = Apoptosis(twin, other, x[:4], tolerance=0.05, total_steps=60, align=1, calibration=1.0)
    apoptosis.load(tmp_path / "file", twin, other, again)
    _train(net, optimizer, apo, x, 15)
    _train(twin, other, again, x, 15)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


def test_what_cannot_be_followed_is_pinned_by_name():
    class Convolutions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(2, 6, 3, dtype=C64), nn.Conv1d(6, 2, 3, dtype=C64)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    pins = {g.name: g.pin for g in analyse(Convolutions(), (_random(3, 2, 9),)).groups}
    assert "complex convolution" in str(pins["a"])
    pins = {g.name: g.pin for g in analyse(Mixing(), (_random(3, 7, 6),)).groups}
    assert "multiplies complex channels with one another" in str(pins["q"])
    assert "view_as_real" in str(pins["q"])


def test_the_state_of_a_half_filled_window_holds_complex_inputs():
    net, x = Pair(_crelu), _random(20, 6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    apo = Apoptosis(net, optimizer, x[:4], tolerance=0.05, total_steps=200, align=1, calibration=1.0)
    for _ in range(100):
        _train(net, optimizer, apo, x, 1)
        if apo.watching:
            break
    _train(net, optimizer, apo, x, 2)
    state = copy.deepcopy(apo.state_dict())
    assert state["window"] is not None
    apo.load_state_dict(state)
    assert _train(net, optimizer, apo, x, 60)
