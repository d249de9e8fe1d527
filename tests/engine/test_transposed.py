"""Grouped transposed convolutions: a channel owns one row of every block; events work, in every dimension."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from apoptosis import Apoptosis, shrink_
from apoptosis.criteria import criteria
from apoptosis.graph import analyse

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def decoder(dims: int, middle: str, *, bias: bool = True, dropout: float = 0.0) -> nn.Sequential:
    """Channels 4 and 12 of the second layer, which makes 16 in two blocks, are duplicates of channels 0 and 8."""
    conv, transposed = CONVS[dims], TRANSPOSED[dims]
    between = {"act": [nn.ReLU()], "norm": [NORMS[dims](16), nn.ReLU()], "none": []}[middle]
    net = nn.Sequential(
        conv(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Dropout(dropout),
        transposed(8, 16, 3, groups=2, bias=bias),
        *between,
        transposed(16, 8, 3, groups=2, bias=bias),
        nn.Tanh(),
        conv(8, 3, 3),
    )
    with torch.no_grad():
        net[3].weight[:, 4] = net[3].weight[:, 0]
        if bias:
            net[3].bias[4::8] = net[3].bias[0::8]
    return net


def data(dims: int, seed: int = 0, rows: int = 32) -> Tensor:
    return torch.randn(rows, 3, *[4] * dims, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("middle", ["act", "norm", "none"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_duplicate_in_every_block_goes_exactly(dims: int, middle: str) -> None:
    torch.manual_seed(0)
    net = decoder(dims, middle).double().eval()
    before = copy.deepcopy(net)
    event = shrink_(net, data(dims).double()[:4], [data(dims, 1).double()], tolerance=0, align=1)
    assert net[3].weight.shape[1] <= 7, event.notes
    assert net[3].out_channels == net[3].weight.shape[1] * net[3].groups
    x = data(dims, 2).double()
    torch.testing.assert_close(net(x), before(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("criterion", criteria())
@pytest.mark.parametrize("bias", [True, False])
def test_every_criterion_takes_blocks(bias: bool, criterion: str) -> None:
    for dims in (1, 2, 3):
        net = decoder(dims, "act", bias=bias)
        shrink_(net.eval(), data(dims)[:4], [data(dims)], tolerance=0.3, align=1, criterion=criterion)
        assert net(data(dims)).isfinite().all()


def test_a_channel_of_several_rows_is_no_single_neuron() -> None:
    groups = {g.name: g for g in analyse(decoder(2, "act"), (data(2),)).groups}
    assert groups["3"].num_channels <= 8
    assert groups["3"].neuron is None
    assert groups["0"].neuron is None or groups["0"].neuron.weight == "0.weight"


@pytest.mark.parametrize("middle", ["act", "norm"])
def test_training_goes_on_through_events(middle: str) -> None:
    torch.manual_seed(0)
    net = decoder(2, middle, dropout=0.2)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    apo = Apoptosis(net, optimizer, example_input=data(2)[:4], total_steps=60, tolerance=0.3, align=1, calibration=0.0)
    for step in range(60):
        optimizer.zero_grad()
        net(data(2, step)).square().mean().backward()
        optimizer.step()
        apo.step()
    assert apo.ledger().events, "no event in 60 steps"
    assert net[3].weight.shape[1] <= 7
