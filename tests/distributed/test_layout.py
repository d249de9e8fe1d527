"""More than two ranks come to the same bits after resuming: the layout of the buckets is in the checkpoint."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apoptosis import Apoptosis, load, save
from apoptosis.distributed.wrappers import layouts_of, rebuild_wrappers
from apoptosis.errors import CheckpointError
from distributed.processes import together
from distributed.test_faults import batch, network

STEPS, FEW = 60, 3


class Run:
    """A rank's part of a run whose gradients travel in several buckets."""

    def __init__(self, rank, seed=0, **options):
        self.rank, self.net = rank, network(seed)
        self.model = DistributedDataParallel(self.net, **({"bucket_cap_mb": 0.01} | options))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)
        self.apo = Apoptosis(
            self.model, self.optimizer, torch.zeros(2, 12), tolerance=0.05, total_steps=STEPS, align=1, calibration=1.0
        )

    def steps(self, first, last):
        """Yield (step, the event if there was one) after each."""
        for step in range(first, last):
            x, y = batch(step, self.rank)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            yield step, self.apo.step()

    def bits(self):
        return {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def save(self, path, whole):
        """Whole: the wrapper is given, else the network inside of it."""
        if self.rank == 0:
            save(path, self.model if whole else self.net, self.optimizer, self.apo)
        dist.barrier()

    def load(self, path, whole):
        load(path, self.model if whole else self.net, self.optimizer, self.apo)


def alike(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def check_resuming(rank, folder, steps, first, **options):
    """Save a run after its first steps, its first event and some more, and compare what comes of the checkpoints."""
    run, bits, saved, event = Run(rank, **options), {}, {}, None
    for step, changed in run.steps(0, steps):
        bits[step] = run.bits()
        event = step if changed and event is None else event
        since = step if event is None else step - event
        if not run.apo.watching and since in first:
            saved[step] = f"{folder}/{step}.safetensors"
            run.save(saved[step], whole=bool(step % 2))
    assert event is not None
    assert len(saved) == 2 * len(first)
    for step, path in saved.items():
        again = Run(rank, seed=1, **options)
        again.load(path, whole=step % 3 > 0)
        if step == max(saved):  # saved and loaded again before it has made a step
            again.save(f"{folder}/again.safetensors", whole=True)
            again = Run(rank, seed=2, **options)
            again.load(f"{folder}/again.safetensors", whole=True)
        for now, _ in again.steps(step + 1, step + 1 + FEW):
            assert alike(again.bits(), bits[now]), f"{options}, saved at {step}: other bits at {now}"


def resumed(rank, size, folder):
    check_resuming(rank, folder, 24, (0, 1, 2))
    # Two steps with the first layout there, and a resumed run makes two anew: not after the first.
    check_resuming(rank, folder, 24, (2,), static_graph=True)


def test_four_ranks_come_to_the_same_bits(tmp_path):
    _, faults = together(resumed, str(tmp_path), size=4, timeout=150)
    assert faults == [None] * 4


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sizes(parallel):
    return [int(size) for size in parallel._get_ddp_logging_data()["bucket_sizes"].split(",")]


def step(parallel):
    parallel(torch.randn(4, 12)).sum().backward()


@pytest.mark.usefixtures("alone")
def test_a_layout_is_told_of_when_it_is_another_one_and_taken_up():
    parallel = DistributedDataParallel(network(), bucket_cap_mb=0.01)
    assert layouts_of([parallel])[0] is None
    step(parallel)
    to_come = layouts_of([parallel])[0]
    step(parallel)
    assert to_come == layouts_of([parallel])[0]
    assert to_come == {"ranks": 1, "buckets": [["4.bias", "4.weight", "2.bias", "2.weight"], ["0.bias", "0.weight"]]}
    assert len(sizes(parallel)) == 1  # what it began with
    rebuild_wrappers([parallel], parallel.module, layouts=[to_come])
    assert sizes(parallel) == [4 * (3 + 3 * 64 + 64 + 64 * 96), 4 * (96 + 96 * 12)]
    assert layouts_of([parallel])[0] == to_come
    step(parallel)
    rebuild_wrappers([parallel], parallel.module)
    assert len(sizes(parallel)) == 1
    assert layouts_of([parallel])[0] is None


BUCKETS = [["4.bias", "4.weight", "2.bias", "2.weight"], ["0.bias", "0.weight"]]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("ranks", "buckets"),
    [(2, BUCKETS), (1, BUCKETS[:1]), (1, [*BUCKETS, []]), (1, [["4.bias"], *BUCKETS]), (1, [["w"], *BUCKETS])],
)
def test_a_layout_of_other_ranks_or_parameters_is_left_alone(ranks, buckets):
    parallel = DistributedDataParallel(network(), bucket_cap_mb=0.01)
    rebuild_wrappers([parallel], parallel.module, layouts=[{"ranks": ranks, "buckets": buckets}])
    assert len(sizes(parallel)) == 1
    step(parallel)


@pytest.mark.usefixtures("alone")
def test_a_layout_that_would_mix_types_is_left_alone():
    net = network()
    net[4].double()
    parallel = DistributedDataParallel(net, bucket_cap_mb=0.01)
    before = sizes(parallel)
    rebuild_wrappers([parallel], parallel.module, layouts=[{"ranks": 1, "buckets": BUCKETS}])
    assert sizes(parallel) == before


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_without_a_layout_is_loaded():
    run = Run(0)
    assert len(list(run.steps(0, 3))) == 3
    state = run.apo.state_dict()
    assert state["buckets"][0]["buckets"] == BUCKETS
    for damage in (5, [5], [{"ranks": 1}], [{"ranks": 1, "buckets": 5}]):
        with pytest.raises(CheckpointError, match="damaged"):
            run.apo.load_state_dict(state | {"buckets": damage})
        assert run.apo.state_dict()["buckets"] == state["buckets"]
    del state["buckets"]
    run.apo.load_state_dict(state)
    assert len(sizes(run.model)) == 1
