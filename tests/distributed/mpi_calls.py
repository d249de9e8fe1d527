"""What MpiRanks promises, checked by every rank: mpirun -n 4 python mpi_calls.py."""

import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from apoptosis.distributed.ranks import ranks_of
from apoptosis.errors import ArgumentError, NonFiniteError, RankError
from apoptosis.launch import start_group
from apoptosis.tools.launch.mpi import MpiRanks, average_gradients


def until_there(*names):
    """Wait for files that other ranks write: what they have done is known, however slow the machine is."""
    deadline = time.monotonic() + 100
    while not all(Path(name).exists() for name in names):
        assert time.monotonic() < deadline, f"not all of {names} came"
        time.sleep(0.01)


def check(group):
    ranks = group.ranks
    own = torch.arange(5.0) + ranks.rank
    all_of = range(ranks.size)
    assert torch.equal(ranks.total(own), sum(torch.arange(5.0).double() + r for r in all_of))
    assert ranks.bytes_sent == 40
    assert torch.equal(own, torch.arange(5.0) + ranks.rank)
    low, high = ranks.range_of(torch.tensor([ranks.rank, -ranks.rank]))
    assert (low.tolist(), high.tolist()) == ([0, 1 - ranks.size], [ranks.size - 1, 0])
    values = [("rank", r, torch.full((r,), float(r))) for r in all_of]  # of other lengths on every rank
    for found, wanted in zip(ranks.gathered(values[ranks.rank]), values, strict=True):
        assert found[:2] == wanted[:2]
        assert torch.equal(found[2], wanted[2])
    assert ranks.first(ranks.rank + 7) == 7
    assert ranks.all(True)
    assert not ranks.all(ranks.rank != 1)
    assert ranks.any(ranks.rank == 1)
    assert not ranks.any(False)
    for dtype, size in ((torch.float32, 7), (torch.float64, 100_000), (torch.bfloat16, 33), (torch.float16, 3)):
        buckets = [torch.full((size,), float(ranks.rank + k), dtype=dtype) for k in range(3)]
        futures = [ranks.average(bucket) for bucket in buckets]  # under way at the same time
        for k, (future, bucket) in enumerate(zip(futures, buckets, strict=True)):
            found = future.wait()
            assert found.data_ptr() == bucket.data_ptr()
            assert torch.equal(found, torch.full((size,), sum(r + k for r in all_of) / ranks.size, dtype=dtype))

    pair = [dist.new_group(own) for own in ([0, 1], list(range(2, ranks.size)))][ranks.rank > 1]
    with pytest.raises(ArgumentError, match=f"process_group= has 2 of {ranks.size} processes"):
        group.parallel(nn.Linear(2, 2), process_group=pair)
    mixed = nn.parallel.DistributedDataParallel(nn.Linear(2, 2), process_group=pair)
    mixed.register_comm_hook(ranks, average_gradients)
    with pytest.raises(ArgumentError, match=f"is over 2 processes, and its communication hook sums over {ranks.size}"):
        ranks_of([mixed], mixed.module)

    if ranks.rank:
        until_there("asked")
    future = ranks.average(torch.ones(4))  # returns at once, and backward goes on
    if ranks.rank == 0:
        assert not future.done()
        Path("asked").touch()
    assert torch.equal(future.wait(), torch.ones(4))

    def work():
        if ranks.rank == 2:
            raise NonFiniteError("bad")

    with pytest.raises(NonFiniteError, match=r"^rank 2: bad$"):
        ranks.run_collectively(work)


def check_timeout(ranks):
    """One rank stays away: the others are told so, once and for all."""
    if ranks.rank == 3:
        return
    for _ in range(2):
        with pytest.raises(RankError, match=f"rank {ranks.rank} of 4 lost another rank.*no answer"):
            ranks.total(torch.zeros(1))
    future = ranks.average(torch.zeros(3))
    with pytest.raises(RuntimeError, match="RankError"):
        future.wait()


if __name__ == "__main__":
    with start_group("mpi", device="cpu", timeout=120) as group:
        check(group)
        from mpi4py import MPI

        late = MpiRanks(MPI.COMM_WORLD.Dup(), timeout=1.5)
        check_timeout(late)
        sys.stdout.write(f"{group.rank} done\n")
        sys.stdout.flush()
        Path(f"done-{group.rank}").touch()
        # mpirun ends all when the first goes without a common end, so that all must have told by then
        until_there(*(f"done-{rank}" for rank in range(4)))
        time.sleep(1)  # what they told has to come through mpirun
        raise SystemExit(0)  # without a common end: the late one's sum is never complete
