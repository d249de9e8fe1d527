"""A target on several ranks: trials are of every rank's own examples, the widths chosen are the same."""

from __future__ import annotations

import torch

from distributed.processes import together
from distributed.test_ddp import train


def halved(rank, size):
    return train(rank, size, target="2x", rows=256)


def test_all_ranks_choose_the_same_widths():
    results, faults = together(halved)
    assert faults == [None, None]
    one, two = results
    assert one["events"]
    assert [(step, e["groups"]) for step, e in one["events"]] == [(step, e["groups"]) for step, e in two["events"]]
    assert all(torch.equal(one["state"][name], two["state"][name]) for name in one["state"])
    left = one["ledger"]["macs"][1] / one["ledger"]["macs"][0]
    assert 0.5 <= left <= 0.525
    assert "reached" in one["ledger"]["goal"]
