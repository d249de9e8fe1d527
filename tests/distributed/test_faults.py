"""A rank that is lost, hangs, or comes to other numbers: one clear error on every survivor, and a run that goes on."""

import copy
import os
import re
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from apoptosis import Apoptosis, load, save
from apoptosis.checkpoint import file as container
from apoptosis.observe import pooled
from apoptosis.surgery import Transaction
from distributed.processes import mark, together, wait_for

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks are modules of the repository

from benchmarks.cluster.links import Links, why_not

STEPS = 80
TIMEOUT = 5  # seconds that a rank waits for another where the fault is that none answers


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 3))


def batch(step, rank, rows=32):
    basis = torch.randn(3, 12, generator=torch.Generator().manual_seed(5))
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(1000 * step + rank)) @ basis
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


class Run:
    """A rank's part of one run, which rank 0 saves at every second step."""

    def __init__(self, rank, folder=None, seed=0):
        self.rank, self.folder = rank, folder
        self.net = network(seed)
        self.model = DistributedDataParallel(self.net)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)
        self.apo = Apoptosis(
            self.model, self.optimizer, torch.zeros(2, 12), tolerance=0.05, total_steps=STEPS, align=1, calibration=1.0
        )
        self.events = []

    def bits(self):
        state = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        return state, copy.deepcopy(self.optimizer.state_dict()["state"])

    def train_one(self, step, x, y, factor=1.0):
        self.optimizer.zero_grad()
        (nn.functional.cross_entropy(self.model(x), y) * factor).backward()
        self.optimizer.step()

    def go_on(self, first=0, before=None):
        for step in range(first, STEPS):
            if before is not None:
                before(step, self)
            self.train_one(step, *batch(step, self.rank))
            self.kept = self.bits()
            if event := self.apo.step():
                self.events.append((step, event.as_dict()["groups"]))
            if self.folder is not None and self.rank == 0 and step % 2 and not self.apo.watching:
                save(f"{self.folder}/run.safetensors", self.net, self.optimizer, self.apo, step=step)
        return self.net.state_dict(), self.events


def arm():
    """From now on wait TIMEOUT seconds at most: a start may take longer on a busy machine."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT))


def alike(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def die(*args, **kwargs):
    time.sleep(0.5)  # the others wait by now
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_sum(then):
    """Let this process do something else where the window's sums are on their way."""
    inner = pooled._pool_moments

    def outer(watches, found, ranks):
        arm()
        plain, calls = ranks.total, []

        def total(tensor):
            calls.append(tensor)
            return plain(tensor) if len(calls) == 1 else then(plain, tensor)  # not in the first of the two sums

        ranks.total = total
        try:
            inner(watches, found, ranks)
        finally:
            del ranks.total

    pooled._pool_moments = outer


def in_surgery():
    inner = Transaction.apply

    def outer(*args):
        inner(*args)
        die()

    Transaction.apply = outer


def killed(rank, size, folder, where):
    run = Run(rank, folder)

    def before(step, run):
        if rank == 1 and where == "computing" and step == 47:
            run.net[2].register_forward_hook(die)
        elif rank == 1 and run.events and where != "computing":
            in_a_sum(die) if where == "sum" else in_surgery()
            run.events = []

    try:
        run.go_on(before=before)
    except Exception:
        # A survivor is as before the event, model and optimizer, and can still save what it has.
        now, kept = run.bits(), run.kept
        assert where == "computing" or (alike(now[0], kept[0]) and str(now[1]) == str(kept[1]))
        save(f"{folder}/survivor.safetensors", run.net, run.optimizer, run.apo)
        raise


def half_written(rank, size, folder):
    def before(step, run):
        if step == 40:
            container.os.replace = die  # the new file is complete, and not yet in the old one's place

    Run(rank, folder).go_on(before=before)


def undisturbed_and_resumed(rank, size, folders):
    whole, resumed = Run(rank).go_on(), []
    for folder in folders:
        run = Run(rank, seed=1)
        step = load(f"{folder}/run.safetensors", run.model, run.optimizer, run.apo)["step"]
        resumed.append((step, *run.go_on(step + 1)))
    return *whole, resumed


def check_resumes(*folders):
    """What was saved goes on to the bits of a run that was not disturbed."""
    results, faults = together(undisturbed_and_resumed, [str(folder) for folder in folders])
    assert faults == [None] * len(faults)
    for whole, events, resumed in results:
        assert alike(whole, results[0][0])
        for step, state, later in resumed:
            assert 0 < step < STEPS - 1
            assert alike(whole, state)
            assert [e for e in events if e[0] > step] == later


def test_a_killed_rank_costs_the_time_since_the_last_checkpoint(tmp_path):
    for where in ("computing", "sum", "surgery"):
        folder = tmp_path / where
        folder.mkdir()
        results, faults = together(killed, str(folder), where)
        assert results == [None, None]
        assert faults[1] is None  # it had no time to tell
        last = faults[0].strip().splitlines()[-1]
        told = r"apoptosis\.errors\.RankError: rank 0 of 2 lost another rank while it waited \d s for "
        if where == "computing":  # torch's own backward waits, and tells
            told = r"RuntimeError: .*(Connection closed|reset by peer|Broken pipe)"
        assert re.match(told, last)
        assert {path.name for path in folder.iterdir()} == {"run.safetensors", "survivor.safetensors"}
        net = network()
        load(folder / "survivor.safetensors", net)
        net(torch.zeros(2, 12))
    folder = tmp_path / "saving"
    folder.mkdir()
    results, faults = together(half_written, str(folder))
    assert results == [None, None]
    assert faults[0] is None
    assert sorted(path.suffix for path in folder.iterdir()) == [".safetensors", ".tmp"]  # a name that nobody loads
    check_resumes(*tmp_path.iterdir())


def hanging(rank, size, folder):
    def hang(plain, tensor):
        time.sleep(2.5 * TIMEOUT)
        return plain(tensor)

    in_a_sum(hang if rank else lambda plain, tensor: plain(tensor))
    run = Run(rank)
    try:
        run.go_on()
    except Exception:
        assert alike(run.bits()[0], run.kept[0])
        mark(f"{folder}/{rank}")
        if rank == 0:
            wait_for(f"{folder}/1")  # it does not find a closed connection, but a rank that has given up
        raise


def test_a_rank_that_hangs_in_a_sum_ends_all_within_the_timeout(tmp_path):
    _, faults = together(hanging, str(tmp_path))
    for rank, fault in enumerate(faults):
        assert f"RankError: rank {rank} of 2 lost another rank while it waited" in fault
    waited = re.search(r"while it waited (\d+) s for a sum", faults[0])
    assert TIMEOUT - 1 <= int(waited[1]) < 60  # what the group was made with


def stopped(rank, size, folder):
    def before(step, run):
        if step == 3:
            arm()
            mark(f"{folder}/{rank}")
            while rank == 1 and not Path(f"{folder}/error0").exists():
                time.sleep(0.02)  # here it is stopped, and wakes when the other has given up

    try:
        Run(rank).go_on(before=before)
    except Exception:
        mark(f"{folder}/error{rank}")
        raise


def test_a_stopped_rank_ends_the_others_and_itself_when_it_wakes(tmp_path):
    def stop(processes):
        wait_for(tmp_path / "1")
        os.kill(processes[1].pid, signal.SIGSTOP)
        try:
            wait_for(tmp_path / "error0")
        finally:
            os.kill(processes[1].pid, signal.SIGCONT)

    results, faults = together(stopped, str(tmp_path), meanwhile=stop)
    assert results == [None, None]
    for fault in faults:
        assert re.match(r"(RuntimeError|torch\.\S+|apoptosis\.errors\.RankError): ", fault.strip().splitlines()[-1])


def apart(rank, size, folder):
    def wait(plain, tensor):
        mark(f"{folder}/{rank}.ready")
        wait_for(f"{folder}/cut")
        return plain(tensor)

    run, armed = Run(rank, folder), []

    def before(step, run):
        if run.events and not armed:
            armed.append(step)
            in_a_sum(wait)

    try:
        run.go_on(before=before)
    except Exception:
        assert alike(run.bits()[0], run.kept[0])
        raise


def test_a_cut_network_ends_both_sides_within_the_timeout(tmp_path):
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path
    with Links(2) as links:

        def cut(processes):
            for rank in range(2):
                wait_for(folder / f"{rank}.ready")
                (folder / f"{rank}.ready").unlink()
            links.cut(1)
            mark(folder / "cut")

        _, faults = together(apart, str(folder), inside=links.holder, meanwhile=cut)
    for rank, fault in enumerate(faults):
        waited = re.search(rf"RankError: rank {rank} of 2 lost another rank while it waited (\d+) s for a sum", fault)
        assert int(waited[1]) < 60  # what the group was made with
    (folder / "cut").unlink()
    check_resumes(folder)


def with_bad_gradients(rank, size, skipping):
    run, told = Run(rank), []
    for step in range(16):
        x, y = batch(step, rank)
        at = run.apo.decision.at_step
        bad = rank == 1 and at is not None and step == at + 1  # inside the window: numbers are fine, the loss is not
        run.optimizer.zero_grad()
        (nn.functional.cross_entropy(run.model(x), y) * (float("nan") if bad else 1.0)).backward()
        fine = all(bool(p.grad.isfinite().all()) for p in run.net.parameters())  # of all ranks: they were averaged
        if fine or not skipping:
            run.optimizer.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            event = run.apo.step()
        told += [(step, str(warning.message)) for warning in caught] + ([(step, "event")] if event else [])
    return told, run.net.state_dict()


@pytest.mark.parametrize("skipping", [True, False])
def test_gradients_that_are_not_finite_end_in_the_same_on_every_rank(skipping):
    results, faults = together(with_bad_gradients, skipping)
    assert faults == [None, None]
    (one, state), (two, other) = results
    assert one == two
    assert [what for _, what in one if what == "event"] == ["event"] * skipping
    assert [bool(re.search("rank 0: .*NaN", what)) for _, what in one if what != "event"] == [True] * (not skipping)
    for name in state:
        torch.testing.assert_close(state[name], other[name], rtol=0, atol=0, equal_nan=True)


def of_other_order_and_start(rank, size):
    run = Run(rank, seed=rank)  # DistributedDataParallel gives all of them rank 0's
    for step in range(STEPS):
        run.train_one(step, *batch(STEPS - step if rank else step, 0))
        if event := run.apo.step():
            run.events.append((step, event.as_dict()["groups"]))
    return run.net.state_dict(), run.events


def test_another_order_of_data_or_another_start_changes_no_agreement():
    results, faults = together(of_other_order_and_start)
    assert faults == [None, None]
    (one, events), (two, others) = results
    assert events
    assert events == others
    assert alike(one, two)


def of_other_checkpoints(rank, size, folder):
    run = Run(rank)
    run.go_on(first=STEPS - 1)
    before = run.bits()
    save(f"{folder}/{rank}.safetensors", run.net, run.optimizer, run.apo)
    if rank == 1:
        run.apo._memory.step += 1
        save(f"{folder}/1.safetensors", run.net, run.optimizer, run.apo)
        run.apo._memory.step -= 1
    try:
        load(f"{folder}/{rank}.safetensors", run.model, run.optimizer, run.apo)
    finally:
        assert alike(run.bits()[0], before[0])


def test_ranks_that_load_different_checkpoints_are_told(tmp_path):
    _, faults = together(of_other_checkpoints, str(tmp_path))
    for fault in faults:
        assert re.search(r"RankError: rank [01] and rank [01] differ in the checkpoint that they load: 'step'", fault)


def uneven(rank, size, ends_early):
    run = Run(rank)
    with Join([run.model], throw_on_early_termination=ends_early):
        for step in range(STEPS if rank else STEPS // 2):
            run.train_one(step, *batch(step, rank))
            if event := run.apo.step():
                run.events.append(event)
            if rank and step == STEPS // 2 - 1:
                assert run.events


def test_uneven_numbers_of_steps_are_refused_or_end_all_ranks_alike():
    _, faults = together(uneven, False)
    assert all("ArgumentError: step() is called inside torch.distributed.algorithms.join.Join" in f for f in faults)
    _, faults = together(uneven, True)
    assert "RuntimeError: Rank 0 exhausted all inputs" in faults[0]
    assert "RuntimeError: Detected at least one rank that exhausted inputs" in faults[1]
