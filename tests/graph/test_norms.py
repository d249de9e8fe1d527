"""Norms whose forward pass is not all that runs: hooks before and behind it, a forward in its place."""

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

from apoptosis import load, save, shrink_
from apoptosis.errors import CheckpointError, ShapeError
from apoptosis.graph import analyse
from apoptosis.modules.norms import NormEdit, ShrunkLayerNorm, is_shrunk, is_unhooked, norm_strategy_of
from apoptosis.observe.hooks import Hook
from apoptosis.surgery.norms import norm_changes

WIDTH, DOUBLE = 32, 16
X = torch.randn(512, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self, norm=nn.LayerNorm) -> None:
        super().__init__()
        self.a, self.n, self.h = nn.Linear(8, WIDTH), norm(WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.n(self.a(x)))


def network(norm=nn.LayerNorm) -> Net:
    """Every channel under the norm is there twice, and each one gets an offset of its own."""
    torch.manual_seed(0)
    net = Net(norm).double()
    with torch.no_grad():
        net.a.weight[DOUBLE:], net.a.bias[DOUBLE:] = net.a.weight[:DOUBLE], net.a.bias[:DOUBLE]
        if isinstance(net.n, nn.LayerNorm):
            net.n.bias.normal_()
    return net


def shrunk(net: nn.Module):
    old = copy.deepcopy(net)
    event = shrink_(net, X[:2], [X], tolerance=1e-4, norm_widths="compensated")
    with torch.no_grad():
        return event, float((net(X) - old(X)).norm() / old(X).norm())


def swapped(x: Tensor) -> Tensor:
    return torch.cat([x[..., 1:2], x[..., :1], x[..., 2:]], -1)


def swap(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (swapped(args[0]),)


def gate(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] * (1 + 0.2 * torch.tanh(args[0].sum(-1, keepdim=True) / 60)),)


def swap_keywords(module: nn.Module, args: tuple[Tensor], kwargs: dict) -> tuple[tuple[Tensor], dict]:
    return swap(module, args), kwargs


def test_without_anything_around_them_the_channels_go():
    event, change = shrunk(network())
    assert event.groups == {"a": (WIDTH, DOUBLE)}
    assert change < 1e-5


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize(("hook", "keywords"), [(swap, False), (gate, False), (swap_keywords, True)])
def test_a_hook_before_a_norm_pins_its_channels(norm, hook, keywords):
    net = network(norm)
    net.n.register_forward_pre_hook(hook, with_kwargs=keywords)
    event, change = shrunk(net)
    assert event.groups == {}
    assert change == 0.0
    assert type(net.n) is norm
    assert not any("rolled back" in note for note in event.notes)  # the structure says so, not the outputs
    pins = {g.name: g.pin for g in analyse(net, (X[:2],), norm_widths="compensated").groups}
    assert "over channels" in pins["a"].reason


def test_the_remedy_names_what_is_around_the_norm():
    net = network()
    net.n.register_forward_pre_hook(swap)
    for widths in ("compensated", "pinned"):
        (pin,) = (g.pin for g in analyse(net, (X[:2],), norm_widths=widths).groups if g.name == "a")
        assert "Without its forward pre-hooks" in pin.remedy


def test_a_hook_behind_a_norm_is_followed_as_any_reader():
    net = network()
    net.n.register_forward_hook(lambda module, args, out: out * 2.0)
    event, change = shrunk(net)
    assert event.groups == {"a": (WIDTH, DOUBLE)}
    assert change < 1e-5
    net = network()
    net.n.register_forward_hook(lambda module, args, out: swapped(out))
    event, change = shrunk(net)
    assert change < 1e-5
    net = network()
    net.n.register_forward_hook(lambda module, args, out: out + args[0].mean(-1, keepdim=True))
    event, change = shrunk(net)
    assert event.groups == {}
    assert change == 0.0


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_forward_set_on_the_norm_itself_pins_its_channels(wrapped):
    net = network()
    old = net.n.forward
    net.n.forward = (lambda x: old(x)) if wrapped else functools.partial(nn.LayerNorm.forward, net.n)
    event, change = shrunk(net)
    assert event.groups == {}
    assert change == 0.0
    assert type(net.n) is nn.LayerNorm


def test_what_is_around_a_norm_that_is_shrunk_pins_it():
    for around in ("hook", "forward"):
        net = network()
        shrunk(net)
        assert is_shrunk(net.n)
        with torch.no_grad():
            net.a.weight[1], net.a.bias[1] = net.a.weight[0], net.a.bias[0]
        assert shrunk(copy.deepcopy(net))[0].groups == {"a": (DOUBLE, DOUBLE - 1)}
        if around == "hook":
            net.n.register_forward_pre_hook(swap)
        else:
            net.n.forward = functools.partial(ShrunkLayerNorm.forward, net.n)
        event, change = shrunk(net)
        assert event.groups == {}
        assert change == 0.0


def test_what_counts_as_bare():
    def inert(*args: object) -> None:
        return None

    norm = nn.LayerNorm(6)
    norm.register_forward_pre_hook(Hook(inert))  # a window's
    assert norm_strategy_of(norm) == norm_strategy_of(copy.deepcopy(norm)) == "class"
    norm.register_forward_hook(inert)
    assert is_unhooked(norm)
    handle = norm.register_forward_pre_hook(inert)
    assert not is_unhooked(norm)
    assert norm_strategy_of(norm) == ""
    handle.remove()
    assert norm_strategy_of(norm) == "class"
    norm.forward = norm.forward
    assert norm_strategy_of(norm) == ""


def test_surgery_checks_again():
    edit = NormEdit(module="n", mix=torch.tensor([[1.0, 1.0]]), offset=None, plain=False)
    norm = nn.LayerNorm(2)
    assert norm_changes(norm, edit)["__class__"] is ShrunkLayerNorm
    handle = norm.register_forward_pre_hook(swap)
    with pytest.raises(ShapeError, match="remove its forward pre-hooks"):
        norm_changes(norm, edit)
    handle.remove()
    norm.forward = norm.forward
    with pytest.raises(ShapeError, match="remove its forward pre-hooks"):
        norm_changes(norm, edit)


def test_a_checkpoint_is_not_loaded_into_a_norm_that_would_not_run(tmp_path):
    net, fresh = network(), network()
    shrunk(net)
    save(tmp_path / "net.safetensors", net)
    fresh.n.forward = fresh.n.forward
    with pytest.raises(CheckpointError, match="would run in place of its own"):
        load(tmp_path / "net.safetensors", fresh)
    assert type(fresh.n) is nn.LayerNorm
    del fresh.n.forward
    load(tmp_path / "net.safetensors", fresh)
    assert torch.equal(fresh(X), net(X))
