"""Convolutions of every kind, pooling, padding and shuffling, each held against the removal oracle."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apoptosis.graph import analyse

IMG = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SIG = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
VOL = torch.randn(2, 2, 6, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["plain", "grouped", "depthwise", "multiplier"])
def test_convolutions(oracle, dim: int, transposed: bool, kind: str) -> None:
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dim - 1]
    odd = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][dim - 1] if transposed else conv
    blocks, mid, out = {"plain": (1, 4, 6), "grouped": (2, 8, 8), "depthwise": (4, 4, 4), "multiplier": (4, 4, 8)}[kind]
    net = nn.Sequential(
        conv(2, mid, 1), nn.ReLU(), odd(mid, out, 3, stride=2, groups=blocks), nn.ReLU(), conv(out, 2, 1)
    )
    x = torch.randn(2, 2, *[5] * dim)
    widths = {"plain": {"0": 4, "2": 6}, "grouped": {"0": 4, "2": 4}, "depthwise": {"0": 4}, "multiplier": {"0": 4}}
    structure = oracle(net, (x,), widths[kind], every=2)
    if kind == "grouped":
        site = structure.groups[0].sites[0]
        assert site.input_columns.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
        assert site.columns.tolist() == ([[0, 4], [1, 5], [2, 6], [3, 7]] if transposed else [[0], [1], [2], [3]])
        assert structure.groups[1].members[0].positions.tolist() == (
            [[0], [1], [2], [3]] if transposed else [[0, 4], [1, 5], [2, 6], [3, 7]]
        )
    if kind == "plain":
        site = structure.groups[0].sites[0]
        assert (site.kind, site.taps) == ("conv_transpose" if transposed else "conv", 3**dim)
        assert site.zero_padded == transposed
    if kind == "multiplier":
        assert structure.groups[0].sites[0].columns.shape == (4, 2)


POOLS = [
    (nn.MaxPool2d(2), True), (nn.AvgPool2d(2), False), (nn.AdaptiveAvgPool2d(1), False),
    (nn.AdaptiveAvgPool2d(2), False),
    (nn.AdaptiveMaxPool2d(2), True), (nn.LPPool2d(2, 2), None), (nn.FractionalMaxPool2d(2, output_size=3), True),
    (nn.Upsample(scale_factor=2), False), (nn.Upsample(scale_factor=2, mode="bilinear"), False),
    (nn.ReflectionPad2d(1), False), (nn.ReplicationPad2d(1), False), (nn.CircularPad2d(1), None),
    (nn.ZeroPad2d(1), None), (nn.Dropout2d(0.5), False), (nn.Dropout(0.5), False), (nn.AlphaDropout(0.5), None),
]  # fmt: skip


@pytest.mark.parametrize(("pool", "largest"), POOLS, ids=lambda p: type(p).__name__ if isinstance(p, nn.Module) else "")
def test_pooling_and_padding(oracle, pool: nn.Module, largest: bool | None) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), pool, nn.Conv2d(4, 2, 1))
    structure = oracle(net, (IMG,), {"0": 4}, training=False)
    neuron = structure.groups[0].neuron
    assert (neuron is None) == (largest is None)
    if neuron is not None:
        assert neuron.max_pool == largest
    assert structure.groups[0].sites[0].dropout == (0.5 if "Dropout" in type(pool).__name__ and neuron else 0.0)


def test_pooling_in_one_and_three_dimensions(oracle) -> None:
    for pool in (nn.MaxPool1d(2), nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(3), nn.AdaptiveMaxPool1d(3), nn.LPPool1d(2, 2)):
        oracle(nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), pool, nn.Conv1d(6, 2, 1)), (SIG,), {"0": 6})
    for pool in (nn.MaxPool3d(2), nn.AvgPool3d(2), nn.AdaptiveAvgPool3d(2), nn.AdaptiveMaxPool3d(2)):
        oracle(nn.Sequential(nn.Conv3d(2, 6, 3), nn.ReLU(), pool, nn.Conv3d(6, 2, 1)), (VOL,), {"0": 6})


def test_pixel_shuffle_keeps_blocks(oracle) -> None:
    net = nn.Sequential(nn.Conv2d(3, 12, 3), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(3, 2, 1))
    structure = oracle(net, (IMG,), {"0": 3})
    assert structure.groups[0].members[0].positions.tolist() == [[4 * c + i for i in range(4)] for c in range(3)]
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.PixelUnshuffle(2), nn.Conv2d(16, 2, 1))
    oracle(net, (IMG,), {"0": 4})


def test_pixel_shuffle_keeps_blocks_that_nothing_else_ties(removal) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.Flatten(), nn.Linear(2 * 12 * 12, 2))
    removal(net, (IMG,), {"0": 2})


def test_pixel_shuffle_of_padded_channels_is_pinned() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ConstantPad3d((0, 0, 0, 0, 0, 2), 0.0), nn.PixelShuffle(2), nn.Flatten())
    groups = analyse(nn.Sequential(net, nn.Linear(2 * 12 * 12, 2)), (IMG,), {}).groups
    whole, broken, _ = groups
    assert whole.pin is None
    assert broken.members[0].positions.tolist() == [[4, 5]]
    assert "lays channels out beside values that are none" in broken.pin.reason


def test_channel_shuffle(oracle) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1, groups=1), nn.Conv2d(6, 2, 1))
    shuffled = nn.Sequential(net[0], nn.ChannelShuffle(2), net[2], net[3])
    structure = analyse(shuffled, (IMG,), {})
    assert structure.groups[0].sites[0].columns.reshape(-1).tolist() == [0, 2, 4, 1, 3, 5]


def test_zero_padding_by_the_module_itself() -> None:
    for kw, padded in (({"padding": 1}, True), ({"padding": 1, "padding_mode": "circular"}, False), ({}, False)):
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, **kw))
        structure = analyse(net, (IMG,), {})
        assert structure.groups[0].pin is None
        assert structure.groups[0].sites[0].zero_padded == padded


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_zero_padding_of_even_kernels() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 2, padding="same"))
    assert analyse(net, (IMG,), {}).groups[0].sites[0].zero_padded
