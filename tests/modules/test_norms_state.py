"""The state_dict of a norm that lost channels holds tensors alone, and such a norm can be scripted."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from apoptosis import shrink_
from apoptosis.errors import ShapeError

KINDS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "rms, eps": lambda width: nn.RMSNorm(width, eps=0.1)}


@pytest.fixture(params=list(KINDS))
def shrunk(request):
    """A network whose norm makes up for channels that were twice others, and inputs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), KINDS[request.param](16), nn.Linear(16, 3))
    with torch.no_grad():
        net[0].weight[8:], net[0].bias[8:] = net[0].weight[:8] * 2, net[0].bias[:8] * 2
    x = torch.randn(256, 4)
    assert shrink_(net, x[:2], [x], tolerance=1e-4, norm_widths="compensated").groups == {"0": (16, 8)}
    return net, x


def spoiled(net):
    """A copy of the same shapes that knows nothing of the channels that are gone."""
    other = copy.deepcopy(net)
    width = other[1].mean_weights.numel()
    other[1].set_extra_state(torch.cat([torch.ones(2 * width), torch.zeros(width + 2), torch.tensor([float(width)])]))
    return other


def test_a_state_dict_holds_tensors_alone_and_passes_through_safetensors(shrunk, tmp_path):
    net, x = shrunk
    state = net.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert sum(value.numel() for value in state.values()) > 0
    save_file(state, tmp_path / "net.safetensors")
    other = spoiled(net)
    assert not torch.equal(other(x), net(x))
    other.load_state_dict(load_file(tmp_path / "net.safetensors"))
    assert torch.equal(other(x), net(x))
    assert other[1].full_width == 16
    assert isinstance(other[1].full_width, int)


def test_the_dictionary_that_the_state_was_once_still_loads(shrunk):
    net, x = shrunk
    old = net.state_dict() | {"1._extra_state": net[1].statistics.attributes()}
    other = spoiled(net)
    other.load_state_dict(old)
    assert torch.equal(other(x), net(x))


@pytest.mark.parametrize(
    "state", [{"mean_weights": torch.ones(8)}, torch.ones(26), torch.ones(3), torch.ones(9, 3), None, "x"]
)
def test_a_damaged_state_is_refused_and_changes_nothing(shrunk, state):
    net, x = shrunk
    before = net(x)
    with pytest.raises(ShapeError, match="is no state of a Shrunk"):
        net[1].set_extra_state(state)
    assert torch.equal(net(x), before)


@pytest.mark.filterwarnings("ignore:.*torch.jit.:DeprecationWarning")
def test_a_shrunk_norm_can_be_scripted(shrunk, tmp_path):
    net, x = shrunk
    scripted = torch.jit.script(net)
    assert torch.equal(scripted(x), net(x))
    torch.jit.save(scripted, tmp_path / "net.pt")
    assert torch.equal(torch.jit.load(tmp_path / "net.pt")(x), net(x))
    double = net.double()
    assert torch.equal(torch.jit.script(double)(x.double()), double(x.double()))
