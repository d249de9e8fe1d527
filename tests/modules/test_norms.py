"""Norms that keep their statistics when channels go: what a user can do with them, and with the opt-in."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

from apoptosis import Apoptosis, load, save, shrink_
from apoptosis.errors import ArgumentError, CheckpointError
from apoptosis.graph import analyse
from apoptosis.modules.norms import ShrunkLayerNorm, ShrunkRMSNorm, is_shrunk, norm_strategy_of

WIDTH, ZERO, COPIES = 12, (3, 7), {2: 5, 8: 1}
GEN = torch.Generator().manual_seed(0)


class HandRMS(nn.Module):
    def __init__(self, width: int, eps: float = 0.1) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class Block(nn.Module):
    def __init__(self, norm) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm(WIDTH), nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


NORMS = {
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "rms, eps": lambda width: nn.RMSNorm(width, eps=0.1),
    "by hand": HandRMS,
}


def network(kind: str, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    norm = NORMS[kind]
    net = nn.Sequential(nn.Linear(6, WIDTH), Block(norm), Block(norm), norm(WIDTH), nn.Linear(WIDTH, 4)).to(dtype)
    for module in net.modules():
        if "Norm" in type(module).__name__ or isinstance(module, HandRMS):
            for parameter in module.parameters():
                nn.init.uniform_(parameter, 0.5, 1.5)
    return net


def plant(net: nn.Sequential, zero=ZERO, copies=COPIES) -> None:
    """Channels of the residual stream that are always zero, or another one over again."""
    with torch.no_grad():
        for layer in (net[0], net[1].down, net[2].down):
            for tensor in (layer.weight, layer.bias):
                tensor[list(zero)] = 0.0
                for to, source in copies.items():
                    tensor[to] = tensor[source]


def inputs(rows: int = 300, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 6, generator=GEN).to(dtype)


def shrunk(kind: str, zero=ZERO, copies=COPIES, optimizer=None, net=None):
    net = network(kind) if net is None else net
    plant(net, zero, copies)
    old = copy.deepcopy(net)
    event = shrink_(net, inputs(4), [inputs()], tolerance=0, norm_widths="compensated", optimizer=optimizer)
    return old, net, event


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("training", [False, True])
def test_zeros_and_copies_go_exactly(kind, training):
    copies = {} if kind == "by hand" else COPIES
    old, net, event = shrunk(kind, copies=copies)
    assert event.groups["0"] == (WIDTH, WIDTH - 2 - len(copies))
    x = inputs()
    torch.testing.assert_close(net.train(training)(x), old.train(training)(x), rtol=1e-11, atol=1e-11)
    plain = kind == "by hand"
    assert all(is_shrunk(m) != plain for m in (net[1].norm, net[3]))


def test_zeros_alone_leave_an_rms_norm_what_it_is():
    old, net, event = shrunk("rms, eps", copies={})
    assert event.groups["0"] == (WIDTH, WIDTH - 2)
    assert type(net[3]) is nn.RMSNorm
    assert net[3].normalized_shape == (WIDTH - 2,)
    assert net[3].eps == pytest.approx(0.1 * WIDTH / (WIDTH - 2), rel=1e-12)
    torch.testing.assert_close(net(inputs(5)) * 0, old(inputs(5)) * 0)
    fresh = network("rms, eps")
    narrow = nn.RMSNorm(WIDTH - 2, eps=net[3].eps).double()
    narrow.load_state_dict(net[3].state_dict())
    x = torch.randn(4, WIDTH - 2, dtype=torch.float64)
    assert torch.equal(narrow(x), net[3](x))
    assert fresh[3].eps == 0.1


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_multiples_go_exactly(kind):
    net = network(kind)
    plant(net, (), {})
    with torch.no_grad():
        for layer in (net[0], net[1].down, net[2].down):
            for tensor in (layer.weight, layer.bias):
                tensor[4], tensor[9] = -2.0 * tensor[0], 0.5 * tensor[0]
    old = copy.deepcopy(net)
    event = shrink_(net, inputs(4), [inputs()], tolerance=0, norm_widths="compensated")
    assert event.groups["0"] == (WIDTH, WIDTH - 2)
    x = inputs()
    torch.testing.assert_close(net(x), old(x), rtol=1e-10, atol=1e-10)


def test_what_a_norm_cannot_make_up_for_stays():
    """Sums of two channels are exact at every reader of an RMS norm, and still change its mean square."""
    net = network("rms")
    with torch.no_grad():
        for layer in (net[0], net[1].down, net[2].down):
            for tensor in (layer.weight, layer.bias):
                tensor[4] = tensor[0] + tensor[1]
    event = shrink_(net, inputs(4), [inputs()], tolerance=0, norm_widths="compensated")
    assert "0" not in event.groups


def test_what_is_nearly_redundant_goes_within_the_tolerance():
    net = network("layer")
    plant(net)
    with torch.no_grad():
        net[0].weight += 1e-3 * torch.randn(net[0].weight.shape)
    old = copy.deepcopy(net)
    x = inputs()
    assert "0" not in shrink_(copy.deepcopy(net), x[:4], [x], tolerance=0, norm_widths="compensated").groups
    event = shrink_(net, x[:4], [x], tolerance=0.02, norm_widths="compensated")
    before, after = event.groups["0"]
    assert after <= before - len(COPIES)
    with torch.no_grad():
        assert 0.0 < float((net(x) - old(x)).norm() / old(x).norm()) < 0.05


@pytest.mark.parametrize("kind", NORMS)
def test_by_default_they_are_pinned_and_the_remedy_names_the_way(kind):
    net = network(kind)
    plant(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        event = shrink_(net, inputs(4), [inputs()], tolerance=0)
    assert "0" not in event.groups
    (pin,) = (g.pin for g in analyse(net, (inputs(4),)).groups if g.name == "0")
    assert "norm_widths='compensated'" in pin.remedy


@pytest.mark.parametrize("kind", ["layer", "rms, eps", "by hand"])
def test_a_second_event_and_a_checkpoint(kind, tmp_path):
    copies = {} if kind == "by hand" else COPIES
    net = network(kind)
    optimizer = Adam(net.parameters(), lr=1e-3)
    net(inputs()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    shrunk(kind, copies=copies, optimizer=optimizer, net=net)
    with torch.no_grad():
        for layer in (net[0], net[1].down, net[2].down):
            for tensor in (layer.weight, layer.bias):
                tensor[0] = 0.0 if kind == "by hand" else tensor[4]
    old = copy.deepcopy(net)
    event = shrink_(net, inputs(4), [inputs()], tolerance=0, norm_widths="compensated", optimizer=optimizer)
    width = WIDTH - 3 - len(copies)
    assert event.groups["0"] == (width + 1, width)
    x = inputs()
    torch.testing.assert_close(net(x), old(x), rtol=1e-11, atol=1e-11)
    for parameter in net.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    save(tmp_path / "net.safetensors", net, optimizer)
    fresh = network(kind)
    load(tmp_path / "net.safetensors", fresh, Adam(fresh.parameters(), lr=1e-3))
    assert torch.equal(fresh(x), net(x))
    assert repr(fresh) == repr(net)
    if kind != "by hand":
        other = network("by hand" if kind == "rms, eps" else "rms")
        with pytest.raises(CheckpointError, match="another network"):
            load(tmp_path / "net.safetensors", other)


class Literal(nn.Module):
    """Fails once the width is another one."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], WIDTH)


def test_a_refusal_leaves_everything_bitwise_as_it_was():
    net = network("layer")
    plant(net)
    net.insert(3, Literal())
    before, ids = copy.deepcopy(net.state_dict()), [id(p) for p in net.parameters()]
    event = shrink_(net, inputs(4), [inputs()], tolerance=0, norm_widths="compensated")
    assert not event
    assert any("broke the forward pass" in note for note in event.notes)
    assert type(net[4]) is nn.LayerNorm
    assert not {"full_width", "mean_weights"} & set(vars(net[4]))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert ids == [id(p) for p in net.parameters()]


def test_a_run_takes_the_residual_width_along():
    net = network("layer", torch.float32)
    plant(net)
    optimizer = Adam(net.parameters(), lr=0.0)
    apo = Apoptosis(net, optimizer, inputs(4, torch.float32), tolerance=0.05, total_steps=60, align=1,
                    norm_widths="compensated", calibration=0.0)  # fmt: skip
    assert "0" in {group.name for group in apo.groups()}
    events = []
    for _ in range(60):
        optimizer.zero_grad()
        net(inputs(64, torch.float32)).square().mean().backward()
        optimizer.step()
        event = apo.step()
        events += [event] if event else []
    assert any("0" in event.groups for event in events)
    assert isinstance(net[3], ShrunkLayerNorm)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_shrunk_norms_are_modules_like_others(kind):
    _, net, _ = shrunk(kind)
    norm, x = net[3], torch.randn(3, WIDTH - 4, dtype=torch.float64)
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(twin(x), norm(x))
    assert "full_width=12" in repr(norm)
    assert set(norm.state_dict()) == {*dict(norm.named_parameters()), "_extra_state"}
    other = copy.deepcopy(norm)
    other.square_weights = torch.ones_like(other.square_weights)
    assert not torch.equal(other(x), norm(x))
    other.load_state_dict(norm.state_dict())
    assert torch.equal(other(x), norm(x))
    plain = type(norm).__mro__[2]((WIDTH - 4,)).double()
    with pytest.raises(RuntimeError, match="_extra_state"):  # it would compute something else
        plain.load_state_dict(norm.state_dict())
    half = copy.deepcopy(norm).to(torch.bfloat16)
    out = half(x.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert half.square_weights.dtype == torch.float64
    torch.testing.assert_close(out.double(), norm(x), rtol=0.05, atol=0.05)
    assert torch.autograd.gradcheck(norm, (x.requires_grad_(),))


def test_a_large_mean_costs_no_digits():
    _, net, _ = shrunk("layer", zero=())
    norm = copy.deepcopy(net[3]).float()
    x = torch.randn(5, WIDTH - 2)
    expected = copy.deepcopy(net[3])(x.double())
    torch.testing.assert_close(norm(x + 1000.0).double(), expected, rtol=1e-2, atol=1e-2)


class Gemma(HandRMS):
    def forward(self, x: Tensor) -> Tensor:
        return (1.0 + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class EpsOutside(HandRMS):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class Own(nn.LayerNorm):
    pass


@pytest.mark.parametrize(
    ("module", "way"),
    [
        (nn.LayerNorm(6), "class"), (nn.RMSNorm(6), "class"), (nn.RMSNorm(6, eps=1e-6), "either"),
        (HandRMS(6), "plain"), (Gemma(6), ""), (EpsOutside(6), ""), (EpsOutside(6, 1e-6), ""), (Own(6), ""),
        (nn.LayerNorm((2, 6)), ""), (nn.LayerNorm(6, elementwise_affine=False), ""), (nn.BatchNorm1d(6), ""),
        (nn.Linear(6, 6), ""), (nn.LayerNorm(6, device="meta"), ""),
    ],
)  # fmt: skip
def test_which_norms_can_lose_channels(module, way):
    assert norm_strategy_of(module) == way


def test_a_hand_written_norm_is_recognised_in_every_type():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert norm_strategy_of(HandRMS(16, 1e-6).to(dtype)) == "plain"
        assert norm_strategy_of(Gemma(16, 1e-6).to(dtype)) == ""


CASES = {
    "two streams under one norm": (lambda m, h: m.n(torch.cat([m.b(h), m.c(h)], -1)), {"n": nn.LayerNorm(12)}),
    "one norm on two streams": (lambda m, h: m.n(m.b(h)) + m.d(m.n(m.c(h))), {"n": nn.LayerNorm(6)}),
    "beside the input": (lambda m, h: m.n(m.b(h) * 1 + h[:, :6]), {"n": nn.LayerNorm(6)}),
    "functional": (lambda m, h: nn.functional.layer_norm(m.b(h), (6,)), {}),
    "no weight": (lambda m, h: m.n(m.b(h)), {"n": nn.LayerNorm(6, elementwise_affine=False)}),
    "a class of the user's": (lambda m, h: m.n(m.b(h)), {"n": Own(6)}),
}


class Case(nn.Module):
    def __init__(self, way, modules) -> None:
        super().__init__()
        self.b, self.c, self.d, self.way = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 6), way
        self.out = nn.LazyLinear(3)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.way(self, x))


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_told_stays_pinned_by_name(name):
    net = Case(*CASES[name])
    x = torch.randn(5, 8)
    net(x)
    pins = {g.name: g.pin for g in analyse(net, (x,), norm_widths="compensated").groups}
    assert pins["b"] is not None
    assert pins["b"].reason
    assert pins["b"].remedy
    assert "norm" in pins["b"].reason or "which has none" in pins["b"].reason


def test_arguments_are_checked():
    net = network("layer")
    with pytest.raises(ArgumentError, match="norm_widths='all' must be 'pinned' or 'compensated'"):
        shrink_(net, inputs(4), [inputs()], tolerance=0, norm_widths="all")
    with pytest.raises(ArgumentError, match="norm_widths"):
        Apoptosis(net, Adam(net.parameters()), inputs(4), norm_widths=True)
    plant(net)
    event = shrink_(net, inputs(4), [inputs()], tolerance=0, norm_widths="compensated", criterion="pairwise")
    assert any("a norm reads them, and criterion" in note for note in event.notes)


def test_first_and_second_moments_follow_the_weight():
    net = network("by hand")
    optimizer = Adam(net.parameters(), lr=1e-3)
    net(inputs()).square().mean().backward()
    optimizer.step()
    plant(net, copies={})
    weight, gain = net[3].weight, (WIDTH / (WIDTH - 2)) ** 0.5
    state = {key: value.clone() for key, value in optimizer.state[weight].items()}
    kept = [c for c in range(WIDTH) if c not in ZERO]
    old, grad = weight.detach().clone(), weight.grad.clone()
    shrink_(net, inputs(4), [inputs()], tolerance=0, norm_widths="compensated", optimizer=optimizer)
    torch.testing.assert_close(weight.detach(), gain * old[kept], rtol=1e-12, atol=0)
    torch.testing.assert_close(weight.grad, grad[kept] / gain, rtol=1e-12, atol=0)
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], state["exp_avg"][kept] / gain, rtol=1e-12, atol=0)
    square = state["exp_avg_sq"][kept] / gain**2
    torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"], square, rtol=1e-12, atol=0)


def test_a_shrunk_norm_is_pinned_without_the_opt_in():
    _, net, _ = shrunk("rms")
    assert isinstance(net[3], ShrunkRMSNorm)
    (pin,) = (g.pin for g in analyse(net, (inputs(4),)).groups if g.name == "0")
    assert "normalises over channels" in pin.reason
    assert "norm_widths='compensated'" in pin.remedy
