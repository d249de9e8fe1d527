"""Digits of shrunk norms: the types that they compute in, inputs that are small, means that are large."""

import copy

import pytest
import torch
from torch import Tensor, nn

from apoptosis import shrink_
from apoptosis.modules.norms import NormEdit
from apoptosis.surgery.norms import norm_changes


def narrowed(norm: nn.Module, mix: Tensor, offset: Tensor | None = None) -> nn.Module:
    """Return what a norm becomes where x = x_K @ mix + offset, the kept channels first."""
    out, kept = copy.deepcopy(norm), len(mix)
    for name, value in norm_changes(out, NormEdit(module="n", mix=mix, offset=offset, plain=False)).items():
        setattr(out, name, value)
    for name, parameter in list(out.named_parameters()):
        setattr(out, name, nn.Parameter(parameter.detach()[:kept].clone()))
    return out


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm, lambda width: nn.RMSNorm(width, eps=1e-6)])
def test_small_inputs_in_every_type(make, dtype, scale):
    """An eps of None is that of the type that the stock norm computes in, float32's for both short ones."""
    norm = make(16)
    small = narrowed(norm, torch.eye(8, dtype=torch.float64).repeat(1, 2)).to(dtype)
    x = (torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)
    want = norm.to(dtype)(torch.cat([x, x], -1))[:, :8].detach()
    got = small(x).detach()
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0.0, atol=8 * torch.finfo(dtype).eps * float(want.abs().max()))


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's own, of the stock norm
def test_an_event_changes_nothing_under_autocast_either():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.RMSNorm(64), nn.Linear(64, 4))
    with torch.no_grad():
        net[0].weight.mul_(0.1)
        net[0].bias.mul_(0.1)
        net[0].weight[32:], net[0].bias[32:] = net[0].weight[:32], net[0].bias[:32]
    x = torch.randn(512, 8)

    def answer() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return net(x).float()

    before = answer()
    event = shrink_(net, x[:2], [x], tolerance=1e-4, norm_widths="compensated")
    assert event.groups == {"0": (64, 32)}
    assert float((answer() - before).norm() / before.norm()) < 0.01


@pytest.mark.parametrize("mean", [0.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize(("width", "gone"), [(4096, 8), (64, 32)])
@pytest.mark.parametrize("multiple", [0.0, 0.3, 0.9999, 1.0])
@pytest.mark.parametrize("constant", [False, True])
def test_large_means_cost_no_more_digits_than_the_stock_norm(mean, width, gone, multiple, constant):
    """What went had the others' mean where constants make up for it, so that terms of the mean cancel."""
    torch.manual_seed(0)
    kept, norm = width - gone, nn.LayerNorm(width)
    mix = torch.zeros(kept, width, dtype=torch.float64)
    mix[:, :kept] = torch.eye(kept, dtype=torch.float64)
    mix[range(gone), range(kept, width)] = multiple
    offset = torch.zeros(width, dtype=torch.float64)
    offset[kept:] = (1.0 - multiple) * mean if constant else 0.0
    small, x = narrowed(norm, mix, offset), torch.randn(20, kept) + mean
    wide = x.double() @ mix + offset
    with torch.no_grad():
        want = copy.deepcopy(norm).double()(wide)[:, :kept]
        stock = float((norm(wide.float())[:, :kept] - want).abs().max() / want.abs().max())
        error = float((small(x) - want).abs().max() / want.abs().max())
    assert error < 4.0 * stock + 2e-7 * (1.0 + mean / 5.0)
