"""One process of a scaling run: python -m benchmarks.cluster.rank SPEC.json [RANK]

Holds: what one rank measures: plain sums, steps of the dense and of the shrunk network, one event.
Elsewhere: starting ranks (start.py; gloo's are given their number, MPI knows its own), what follows from the figures
(model.py).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from apoptosis import Apoptosis
from apoptosis.distributed.ranks import Ranks, TorchRanks
from apoptosis.tools.launch import Group, start_group
from apoptosis.tools.launch.mpi import MpiRanks
from apoptosis.tools.recipes.datasets import DATASETS
from benchmarks.cluster import links
from benchmarks.cluster.throttle import ring_seconds, throttled

BATCH = 128
ROWS = 8192  # examples that batches are drawn from
TIMEOUT = timedelta(seconds=300)
Record = dict[str, Any]
Step = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The specification that all ranks of a world read.

    folder: where their records go. threads: of each. data_dir: of the data sets.
    backend: "gloo", or "mpi" (mpirun has started the ranks; gradients, moments and votes go by MPI).
    how: "namespaces" (tc bounds what each rank sends) or "hook" (a communication hook sleeps on top of the sum).
    """

    size: int
    folder: str
    backend: str
    how: str
    threads: int
    data_dir: str | None
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec(Job):
    """Steps, sums and events. rates: of the links in bits per second, None for what the machine gives.

    start: file of weights that events begin with, trained by the first world for `warm` steps.
    """

    start: str
    warm: int
    events: int
    rates: tuple[float | None, ...]
    dense: tuple[int, ...]
    shrunk: tuple[int, ...]
    steps: dict[str, int]
    sums: tuple[int, ...]


def mlp(widths: Sequence[int], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    sizes = [784, *widths]
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise(sizes):
        layers += [nn.Linear(num_in, num_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 10))


def examples(spec: Spec) -> tuple[Tensor, Tensor]:
    """MNIST's training images, or numbers of the same shape where it is not at hand."""
    folder, file = Path(spec.data_dir or "."), "train-images-idx3-ubyte.gz"
    if spec.data_dir and any((place / file).exists() for place in (folder / "mnist", folder)):
        x, y = DATASETS["mnist"].read(folder, None)[0].between(0, ROWS)
        return x.reshape(len(x), -1) / x.max(), y
    draws = torch.Generator().manual_seed(spec.seed)
    x = torch.randn(ROWS, 30, generator=draws) @ torch.randn(30, 784, generator=draws)
    return x, (x[:, :10]).argmax(1)


def name_of(rate: float | None) -> str:
    return "unbounded" if rate is None else f"{rate / 1e6:.0f} Mbit/s"


class World:
    """This process among the others. ranks: sums and votes, over gloo or MPI. group: under MPI, of `start_group`."""

    def __init__(self, spec: Any, rank: int, ranks: Ranks, group: Group | None = None) -> None:
        self.spec, self.rank, self.ranks, self.group = spec, rank, ranks, group
        self.rate: float | None = None

    @cached_property
    def examples(self) -> tuple[Tensor, Tensor]:
        return examples(self.spec)

    def batches(self, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        draws, (x, y) = torch.Generator().manual_seed(1000 * self.spec.seed + self.rank), self.examples
        while True:
            chosen = torch.randint(0, len(x), (rows,), generator=draws)
            yield x[chosen], y[chosen]

    def wrap(self, net: nn.Module) -> nn.Module:
        if self.spec.size == 1:
            return net
        throttle = self.spec.how == "hook" and self.rate is not None
        if self.group is not None and not throttle:
            return self.group.parallel(net)
        model = DistributedDataParallel(net)
        if throttle:
            model.register_comm_hook((self.rate, self.ranks), throttled)
        return model

    def over(self, rate: float | None) -> None:
        """Put a link of this speed between this rank and the others."""
        if self.spec.how == "namespaces" and self.spec.size > 1:
            links.slow_down(rate)
        self.rate = rate
        self.together()

    def summed(self, tensor: Tensor) -> None:
        if isinstance(self.ranks, MpiRanks):
            self.ranks.average(tensor).wait()  # the way that gradients take
        else:
            dist.all_reduce(tensor)
        if self.spec.how == "hook" and self.rate is not None:
            time.sleep(ring_seconds(tensor, self.spec.size, self.rate))

    def sent(self) -> int | None:
        return links.bytes_sent() if self.spec.how == "namespaces" and self.spec.size > 1 else None

    def together(self) -> None:
        self.ranks.all(True)


def timed(world: World, count: int, work: Step, warm: int = 1) -> Record:
    """Wall seconds, processor seconds and sent bytes of one run of the work.

    Wall seconds are the least of all runs: other programs, and other ranks on the same core, can only add to them.
    """
    for _ in range(warm):
        work()
    world.together()
    sent, cpu, seconds = world.sent(), time.process_time(), []
    for _ in range(count):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    used = (time.process_time() - cpu) / count
    now = world.sent()
    return {
        "seconds": min(seconds),
        "median_seconds": statistics.median(seconds),
        "cpu_seconds": used,
        "bytes_on_link": None if sent is None or now is None else (now - sent) / count,
    }


def sums(world: World) -> list[Record]:
    """Plain sums of several sizes: what the link is like."""
    found = []
    for numbers in world.spec.sums if world.spec.size > 1 else ():
        tensor = torch.zeros(numbers)
        work = timed(world, 3 if numbers > 100_000 else 8, lambda tensor=tensor: world.summed(tensor))
        found.append({"bytes": 4 * numbers, **work})
    return found


def step_with(world: World, net: nn.Module, model: nn.Module, rows: int) -> tuple[torch.optim.Optimizer, Step]:
    """Return an optimizer and what takes one step with it."""
    optimizer, batches = torch.optim.Adam(net.parameters(), lr=1e-3), world.batches(rows)

    def step() -> None:
        x, y = next(batches)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return optimizer, step


def steps(world: World, layout: str, rows: int, count: int) -> Record:
    """Time steps of a network of given widths."""
    net = mlp(getattr(world.spec, layout), world.spec.seed)
    _, step = step_with(world, net, world.wrap(net), rows)
    parameters = num_parameters(net)
    macs = sum(m.in_features * m.out_features for m in net if isinstance(m, nn.Linear))
    return {
        "layout": layout,
        "rows": rows,
        "parameters": parameters,
        "macs": macs,
        "payload": 4 * parameters if world.spec.size > 1 else 0,
        **timed(world, count, step, warm=2),
    }


def num_parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def started(world: World) -> nn.Sequential:
    """Return the dense network as it is where a run's first event comes."""
    net, path = mlp(world.spec.dense, world.spec.seed), Path(world.spec.start)
    if not path.exists():
        _, step = step_with(world, net, net, BATCH)
        for _ in range(world.spec.warm):
            step()
        torch.save(net.state_dict(), path)
    net.load_state_dict(torch.load(path))
    return net


def event(world: World) -> Record:
    """Train until the first event, and say what it took besides the steps."""
    net = started(world)
    model = world.wrap(net)
    optimizer, step = step_with(world, net, model, BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apo = Apoptosis(model, optimizer, world.examples[0][:2], total_steps=60, calibration=1.0)
        watched, done = False, None
        while not (watched and not apo.watching):
            step()
            watched = apo.watching
            world.together()  # what is timed below begins everywhere at once
            sent, start, cpu = world.sent(), time.perf_counter(), time.process_time()
            done = apo.step()
    now = world.sent()
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "hook_seconds": apo.hook_seconds,
        "bytes_on_link": None if sent is None or now is None else now - sent,
        "committed": bool(done),
        "parameters_after": num_parameters(net),
    }


def quickest_event(world: World) -> Record:
    """Return the quicker of some events from the same weights, by what all ranks took together."""
    found = []
    for _ in range(world.spec.events):
        one = event(world)
        found.append((sum(world.ranks.gathered(one["seconds"])), one))
    return min(found, key=lambda pair: pair[0])[1]


def measure(world: World) -> Record:
    """All of a world, link by link."""
    spec, found = world.spec, []
    for rate in spec.rates if spec.size > 1 else (None,):
        world.over(rate)
        name = name_of(rate)
        rows = {BATCH, max(1, BATCH // spec.size)} if spec.size > 1 else {BATCH, BATCH // 2, BATCH // 4, BATCH // 8}
        found.append(
            {
                "link": name,
                "rate": rate,
                "sums": sums(world),
                "steps": [
                    steps(world, layout, n, spec.steps[name])
                    for layout in ("dense", "shrunk")
                    for n in sorted(rows, reverse=True)
                ],
                "event": quickest_event(world) if spec.how == "namespaces" or rate is None else None,
            }
        )
    return {"rank": world.rank, "transport": transport(world.ranks), "links": found}


def transport(ranks: Ranks) -> str:
    """What carries the sums, in words."""
    if not isinstance(ranks, MpiRanks):
        return "gloo" if ranks.size > 1 else ""
    from mpi4py import MPI

    return " ".join(MPI.Get_library_version().splitlines()[0].replace("Version:", "").split())


@contextmanager
def joined(spec: Job, rank: int | None) -> Iterator[World]:
    """Meet the other ranks, and part from them when all are done. rank: None where MPI knows it."""
    torch.set_num_threads(spec.threads)
    if spec.backend == "mpi":
        with start_group("mpi", device="cpu", timeout=TIMEOUT.total_seconds()) as group:
            yield World(spec, group.rank, group.ranks, group)
        return
    assert rank is not None
    if spec.size == 1:
        yield World(spec, rank, Ranks())
        return
    store = dist.FileStore(str(Path(spec.folder) / "store"), spec.size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=spec.size, timeout=TIMEOUT)
    yield World(spec, rank, TorchRanks(dist.group.WORLD, torch.device("cpu")))
    dist.barrier()
    dist.destroy_process_group()


def run(kind: type[Job], work: Callable[[World], Record]) -> None:
    """Do this rank's part of a world, as the command line says, and leave its record in the world's folder."""
    spec = kind(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    with joined(spec, int(sys.argv[2]) if len(sys.argv) > 2 else None) as world:
        found = work(world)
        (Path(spec.folder) / f"{world.rank}.json").write_text(json.dumps(found), encoding="utf-8")


def main() -> None:
    run(Spec, measure)


if __name__ == "__main__":
    main()
