"""Whole runs of several processes and of one; a rank of them is python -m benchmarks.cluster.whole SPEC.json RANK

Holds: training by the comparison's recipe with every batch shared out over the ranks, and the start of such ranks.
Elsewhere: single steps and events (rank.py), options (benchmarks/scaling.py).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apoptosis import Apoptosis
from apoptosis.tools.recipes.optim import learning_rates
from benchmarks import shared
from benchmarks.cluster.links import Links, why_not
from benchmarks.cluster.rank import Job, Record, World, name_of, num_parameters, run
from benchmarks.cluster.start import run_ranks
from benchmarks.paper.tasks import QUICK, TASKS, Task, TaskData

PROBE_ROWS = 4096
SIZE = 4
QUICK_EPOCHS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole(Job):
    """One run. rate: of the links in bits per second. method: "dense" or "apoptosis".

    quick: bundled digits, and events whatever they cost here, since a small network's are hardly ever worth it.
    """

    rate: float | None
    method: str
    epochs: int
    quick: bool


def task_of(quick: bool) -> Task:
    return QUICK if quick else TASKS["mnist"]


def part(rows: int, world: World) -> slice:
    """This rank's rows of `rows`."""
    size, rank = world.spec.size, world.rank
    return slice(rank * rows // size, (rank + 1) * rows // size)


def train(world: World) -> Record:
    """Train from the first to the last step, and say what all of it took; data and the test are not on the clock."""
    spec: Whole = world.spec
    task = task_of(spec.quick)
    data = task.load(None if spec.data_dir is None else Path(spec.data_dir), None)
    torch.manual_seed(spec.seed)
    net = task.build(data, 1.0)
    before = num_parameters(net)
    world.over(spec.rate if spec.size > 1 else None)
    sent, cpu, start = world.sent(), time.process_time(), time.perf_counter()
    events, widths, steps = _loop(world, task, data, net)
    world.together()
    seconds, used, now = time.perf_counter() - start, time.process_time() - cpu, world.sent()
    return {
        "seconds": seconds,
        "cpu_seconds": used,
        "bytes_on_link": None if sent is None or now is None else now - sent,
        "steps": steps,
        "test": score(net, data),
        "parameters_before": before,
        "parameters": num_parameters(net),
        "events": events,
        "widths": widths,
    }


def _loop(world: World, task: Task, data: TaskData, net: nn.Module) -> tuple[list[Record], dict[str, int], int]:
    """Take all steps in the comparison's order; return events, widths at the end and the number of steps."""
    spec: Whole = world.spec
    per_epoch = len(data.train) // task.batch
    total, step, events = per_epoch * spec.epochs, 0, []
    model, apo = world.wrap(net), None
    optimizer = torch.optim.Adam(net.parameters(), lr=task.lr, fused=True)
    if spec.method == "apoptosis":
        probe = part(min(PROBE_ROWS, len(data.validation)), world)
        apo = Apoptosis(model, optimizer, data.train.between(0, 2)[0], total_steps=total,
                        probe=data.validation.between(probe.start, probe.stop), seed=spec.seed,
                        calibration=1.0 if spec.quick else None)  # fmt: skip
    own, rates = part(task.batch, world), learning_rates("one-cycle", task.lr, total)
    for epoch in range(spec.epochs):
        draws = torch.Generator().manual_seed(2 * (spec.seed * 100_003 + epoch))
        order = torch.randperm(len(data.train), generator=draws)[: per_epoch * task.batch]
        for rows in order.view(per_epoch, task.batch):
            x, y = data.train.take(rows[own])
            optimizer.param_groups[0]["lr"] = rates[step]
            loss = data.loss(model(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            if apo is not None and (event := apo.step()):
                events.append({"step": event.step, "seconds": event.seconds, "parameters": num_parameters(net)})
    return events, {} if apo is None else {g.name: g.num_channels for g in apo.groups()}, total


@torch.no_grad()
def score(net: nn.Module, data: TaskData) -> float:
    """The metric on the test part."""
    net.eval()
    outputs: list[Tensor] = [net(x) for x in data.test.between(0, len(data.test))[0].split(512)]
    return float(data.score(torch.cat(outputs), data.test.labels))


# ---------------------------------------------------------------------------------------------- what starts the ranks


def measured(args: argparse.Namespace) -> Record:
    """Run dense and apoptosis, on four processes over a link and on one alone."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    reason = why_not() if args.how == "namespaces" else "not asked for"
    task = task_of(args.quick)
    size = args.sizes[-1]
    runs = []
    for processes in (size, 1):
        for method in ("dense", "apoptosis"):
            found = _one(processes, method, args, cores, "hook" if reason else "namespaces")
            print(f"{processes} x {method}: {found['seconds']:.1f} s, {task.metric} {found['test']:.4f}", flush=True)
            runs.append(found)
    found = shared.result(
        "scaling-whole",
        seed=args.seed,
        backend="gloo",
        how="hook" if reason else "namespaces",
        why_no_namespaces=reason,
        link=name_of(args.rate),
        rate=args.rate,
        task=task.name,
        network=task.network,
        metric=task.metric,
        batch=task.batch,
        epochs=epochs_of(args),
        runs=runs,
    )
    return found | {"machine": found["machine"] | {"cores": cores, "load_before": load}}


def epochs_of(args: argparse.Namespace) -> int:
    """As many as are asked for, else those of the committed run."""
    return int(args.epochs or (QUICK_EPOCHS if args.quick else TASKS["mnist"].epochs))


def _one(size: int, method: str, args: argparse.Namespace, cores: int, how: str) -> Record:
    with tempfile.TemporaryDirectory() as folder, Links(size) if how == "namespaces" else nullcontext() as links:
        spec = Whole(size=size, folder=folder, backend="gloo", how=how, threads=max(1, cores // size),
                     data_dir=args.data_dir, seed=args.seed, rate=args.rate, method=method,
                     epochs=epochs_of(args), quick=args.quick)  # fmt: skip
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(asdict(spec)), encoding="utf-8")
        program = ["-m", "benchmarks.cluster.whole", str(path)]
        run_ranks("gloo", size, program, links=links, folder=Path(folder), threads=spec.threads)
        ranks: list[dict[str, Any]] = [
            json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(size)
        ]
    if any((rank["parameters"], rank["widths"]) != (ranks[0]["parameters"], ranks[0]["widths"]) for rank in ranks):
        raise SystemExit(f"ranks of {method} end with different widths")
    sent = [rank["bytes_on_link"] for rank in ranks if rank["bytes_on_link"] is not None]
    return ranks[0] | {
        "size": size,
        "method": method,
        "threads": spec.threads,
        "seconds": max(rank["seconds"] for rank in ranks),
        "cpu_seconds": sum(rank["cpu_seconds"] for rank in ranks),
        "bytes_on_link": max(sent, default=None),
    }


if __name__ == "__main__":
    run(Whole, train)
