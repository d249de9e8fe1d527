"""A load that fails leaves DistributedDataParallel with the buckets that it had, in which gradients are summed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apoptosis import Apoptosis, load, save
from apoptosis.distributed.wrappers import layouts_of
from apoptosis.errors import CheckpointError


def test_buckets_stay_where_a_load_fails(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        net = DistributedDataParallel(nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 6)))
        optimizer = torch.optim.Adam(net.parameters())
        apo = Apoptosis(net, optimizer, torch.zeros(2, 6), total_steps=100, calibration=1.0)
        for _ in range(3):
            net(torch.randn(8, 6)).sum().backward()
            optimizer.step()
            apo.step()
        save(tmp_path / "without", net, optimizer)
        before = layouts_of([net])
        assert before != [None]
        with pytest.raises(CheckpointError, match="no apoptosis state"):
            load(tmp_path / "without", net, optimizer, apo)
        assert layouts_of([net]) == before
        with pytest.raises(CheckpointError):
            apo.load_state_dict(apo.state_dict() | {"verdict": {}})
        assert layouts_of([net]) == before
    finally:
        dist.destroy_process_group()
