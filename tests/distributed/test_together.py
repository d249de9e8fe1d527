"""What ranks ask of each other fits, or all are told: work that fails on one while the other is in the midst of it."""

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from apoptosis import Apoptosis
from apoptosis.distributed.protocol import kind_of
from apoptosis.distributed.ranks import Ranks, TorchRanks, ranks_of
from apoptosis.errors import ArgumentError, RankError
from distributed.processes import together
from distributed.test_ddp import network


def halfway(rank, size):
    ranks = TorchRanks(dist.group.WORLD, torch.device("cpu"))

    def work():
        if rank == 1:
            raise ValueError("cut off")
        return ranks.gathered("in the midst of it")

    try:
        ranks.run_collectively(work)
    except (ValueError, RankError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_work_that_fails_on_one_rank_is_told_to_one_that_is_still_at_it():
    results, faults = together(halfway)
    assert faults == [None, None]
    assert results[0].startswith("RankError: rank 1 of 2 failed")
    assert "cut off" in results[0]
    assert results[1] == "ValueError: cut off"


def given(rank, size):
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        Apoptosis(model, optimizer, torch.zeros(2, 12), calibration=1.0 if rank else None)
    except RankError as error:
        return str(error)


def test_a_calibration_on_one_rank_alone_is_refused():
    results, faults = together(given)
    assert faults == [None, None]
    assert all("calibration" in told for told in results)


class Others(Ranks):
    """Ranks that come in by a communication hook, as those of MPI do."""


def joined(rank, size):
    model = DistributedDataParallel(network())
    others = Others()
    others.rank, others.size = rank, size
    model.register_comm_hook(others, average)
    told = ""
    assert ranks_of([model], model.module) is others
    with Join([model]):
        try:
            kind_of(model).check_step(model)
        except ArgumentError as error:
            told = str(error)
        model(torch.zeros(2, 12)).sum().backward()
    return told


def average(state: Others, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0] / dist.get_world_size())


def test_join_is_refused_whoever_sums_the_gradients():
    results, faults = together(joined)
    assert faults == [None, None]
    assert all("Join" in told for told in results)
