"""A checkpoint of a network that shrank several times, by several runs, loads into the network as it is built."""

import pytest
import torch
from torch import nn

from apoptosis import Apoptosis, load, save, shrink_
from apoptosis.errors import CheckpointError


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))
    with torch.no_grad():
        net[0].weight[20:], net[0].bias[20:] = net[0].weight[:12], net[0].bias[:12]
    return net


def run(net, **more):
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    return optimizer, Apoptosis(net, optimizer, torch.zeros(2, 6), total_steps=50, calibration=1.0, **more)


def test_after_one_shot_and_a_second_run_it_loads_into_the_full_network(tmp_path):
    net, x = network(), torch.randn(256, 6, generator=torch.Generator().manual_seed(1))
    shrink_(net, x[:2], [x], tolerance=0)
    assert net[0].out_features < 32
    optimizer, apo = run(net)
    save(tmp_path / "second", net, optimizer, apo)
    save(tmp_path / "alone", net)
    for name in ("second", "alone"):
        fresh = network()
        other, again = run(fresh)
        load(tmp_path / name, fresh, *((other, again) if name == "second" else ()))
        torch.testing.assert_close(fresh(x), net(x))
        save(tmp_path / "third", fresh)  # loaded and saved once more: built as it ever was
        load(tmp_path / "third", network())


def test_another_network_is_still_refused(tmp_path):
    net, x = network(), torch.randn(256, 6)
    shrink_(net, x[:2], [x], tolerance=0)
    save(tmp_path / "one", net)
    wide = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 2))
    with pytest.raises(CheckpointError, match=r"built with shape \(32, 6\), here \(64, 6\)"):
        load(tmp_path / "one", wide)


def test_a_new_head_counts_as_built_when_it_came(tmp_path):
    net, x = network(), torch.randn(256, 6)
    shrink_(net, x[:2], [x], tolerance=0)
    net[4] = nn.Linear(16, 5)
    optimizer, apo = run(net)
    save(tmp_path / "one", net, optimizer, apo)
    fresh = network()
    fresh[4] = nn.Linear(16, 5)
    load(tmp_path / "one", fresh)
    torch.testing.assert_close(fresh(x), net(x))
