"""DistributedDataParallel over a process group that is not the default one."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apoptosis import Apoptosis, load, save
from distributed.processes import together
from distributed.test_ddp import data, network, same, train


def two_pairs(rank, size):
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    number, own = divmod(rank, 2)
    probe = next(data(50 + rank, 1, rows=256))
    found = train(own, 2, wrap={"process_group": pairs[number]}, steps=60 + 20 * number, probe=probe)
    found["after"] = [dist.get_world_size(pairs[number]), dist.get_world_size()]
    return found


def test_two_groups_train_and_shrink_a_network_each():
    results, faults = together(two_pairs, size=4, timeout=180)  # one pair waits for the other, in the end
    assert faults == [None] * 4
    for one, two in (results[:2], results[2:]):
        assert one["events"]
        assert [step for step, _ in one["events"]] == [step for step, _ in two["events"]]
        assert same(one, two)
        assert "bytes summed over 2 ranks" in one["events"][0][1]["notes"][0]
        assert one["ledger"]["accuracy_cost"] == two["ledger"]["accuracy_cost"]
        assert one["ledger"]["probe_rows"] == 512
    assert results[0]["events"] != results[2]["events"]  # of runs of other lengths


def beside_one_that_does_not_train(rank, size, folder):
    group = dist.new_group([1, 2])
    if rank == 0:
        return None

    def keep(step, net, optimizer, apo):
        if step == 50 and rank == 1:
            assert not apo.watching
            save(f"{folder}/net.safetensors", net, optimizer, apo)
        if step == 50:
            dist.barrier(group)

    whole = train(rank - 1, 2, wrap={"process_group": group}, saved=keep)
    model = DistributedDataParallel(network(1), process_group=group)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    apo = Apoptosis(model, optimizer, torch.zeros(2, 12), tolerance=0.05, total_steps=80, align=1, calibration=1.0)
    load(f"{folder}/net.safetensors", model, optimizer, apo)
    for step, (x, y) in zip(range(80), data(rank - 1, 2), strict=False):
        if step > 50:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            apo.step()
    return whole["events"], all(torch.equal(whole["state"][name], p) for name, p in model.module.named_parameters())


def test_a_process_outside_of_the_group_takes_no_part(tmp_path):
    results, faults = together(beside_one_that_does_not_train, str(tmp_path), size=3, timeout=180)  # it waits for all
    assert faults == [None] * 3
    (one, resumed), (two, again) = results[1:]
    assert one
    assert [step for step, _ in one] == [step for step, _ in two]
    assert resumed
    assert again
