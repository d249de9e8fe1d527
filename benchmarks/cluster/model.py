"""A cost model of data-parallel steps, fitted on measured ones, and what it says of more nodes.

Holds: the formulas, pure. Elsewhere: measuring (rank.py), JSON and tables.

A step of one process with M multiply-adds per example, B examples and P parameters takes
    c0 + c1 * 3 M B + c2 * P
seconds (fixed, arithmetic of forward and backward, optimizer), fitted on the processor time of one process alone. N
processes on C cores take that max(1, N / C) times: they share the cores. A sum of S bytes on a link takes
    2 (N - 1) alpha + 2 (N - 1) / N * S * beta
seconds (ring all-reduce), fitted on plain sums. A measured step is the sum of both: the last bucket of
DistributedDataParallel, which nothing overlaps, is all but 1 MiB of so small a network. The projection lets all buckets
but the last overlap with backward.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls

TRAIN = 3.0  # passes' worth of multiply-adds in a step: forward, and two products in backward
LARGE = 2**20  # bytes of a sum that four buckets of tc do not hold
ROUNDS = 30  # of alpha and beta in turn
BUCKET = 25 * 2**20  # bytes of a bucket of DistributedDataParallel
NODE_CORES = 16  # of a projected node, each as fast as the measured one
NODE_BATCH = 32  # examples per node and step
NODES = (64, 256, 1024)
BACKENDS = {"gloo": "gloo", "mpi": "MPI"}  # and how the page calls them
Record = Mapping[str, Any]

#: name -> parameters, multiply-adds per example at 224 px (torchvision's networks), whose ratios are taken: the first
#: of these tasks that was measured
NETWORKS: dict[str, tuple[float, float, tuple[str, ...]]] = {
    "AlexNet": (61_100_840, 714_188_480, ("alexnet",)),
    "VGG-16": (138_357_544, 15_470_264_320, ("vgg", "alexnet")),
    "ResNet-50": (25_557_032, 4_089_184_256, ("residual", "cifar10-conv")),
}


def name_of(world: Record, link: Record) -> str:
    """Name what carries the sums of a world over one of its links."""
    return f"{BACKENDS[world['backend']]}, {link['link']}"


def fitted(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Return coefficients, none negative, that give the least relative squared error."""
    weights = 1.0 / np.asarray(seconds)
    found, _ = nnls(np.asarray(rows) * weights[:, None], np.ones(len(seconds)))
    return [float(x) for x in found]


def fit_compute(steps: Sequence[Record], threads: int) -> dict[str, float]:
    """Fit c0, c1 and c2 on the steps of one process; other programs take wall time off it, but no processor time."""
    rows = [(1.0, TRAIN * s["macs"] * s["rows"], float(s["parameters"])) for s in steps]
    return dict(zip(("c0", "c1", "c2"), fitted(rows, [s["cpu_seconds"] / threads for s in steps]), strict=True))


def fit_link(sums: Sequence[tuple[int, Record]]) -> dict[str, float]:
    """Fit alpha on the quickest of the smallest sums, beta on those that no token bucket lets through at once.

    Args: sums: pairs of number of processes, record.
    """
    small = min(s["bytes"] for _, s in sums)
    large = [(2 * (n - 1), n, s) for n, s in sums if s["bytes"] > LARGE]
    alpha = beta = 0.0
    for _ in range(ROUNDS):
        rest = [(s["seconds"] - turns * alpha) / s["seconds"] for turns, _, s in large]
        rows = [turns / n * s["bytes"] / s["seconds"] for turns, n, s in large]
        beta = max(0.0, float(np.dot(rows, rest) / np.dot(rows, rows)))
        quickest = [s["seconds"] / (2 * (n - 1)) - s["bytes"] / n * beta for n, s in sums if s["bytes"] == small]
        alpha = max(0.0, min(quickest))
    return {"alpha": alpha, "beta": beta}


def compute_seconds(fit: Mapping[str, float], macs: float, batch: float, parameters: float) -> float:
    """Seconds of a step of one process that has a core for itself."""
    return fit["c0"] + fit["c1"] * TRAIN * macs * batch + fit["c2"] * parameters


def sum_seconds(link: Mapping[str, float], size: int, num_bytes: float) -> float:
    """Seconds of one ring all-reduce.

    >>> sum_seconds({"alpha": 0.0, "beta": 1e-8}, 2, 1e6)
    0.01
    """
    if size == 1:
        return 0.0
    return 2 * (size - 1) * link["alpha"] + 2 * (size - 1) / size * num_bytes * link["beta"]


def taken(world: Record, step: Record) -> float:
    """Seconds of a step: of one process alone those of the processor, which other programs do not add to."""
    return float(step["cpu_seconds"] / world["threads"] if world["size"] == 1 else step["seconds"])


def step_seconds(compute: Mapping[str, float], link: Mapping[str, float] | None, world: Record, step: Record) -> float:
    """Seconds of a measured step, as the model says."""
    crowd = max(1.0, world["size"] * world["threads"] / world["cores"])
    own = crowd * compute_seconds(compute, step["macs"], step["rows"], step["parameters"])
    return own if link is None else own + sum_seconds(link, world["size"], step["payload"])


def errors(worlds: Sequence[Record], compute: Mapping[str, float], links: Mapping[str, Mapping[str, float]]) -> Any:
    """Relative errors of the model on all measured steps, by link; the first is of one process."""
    found: dict[str, list[float]] = {}
    for world in worlds:
        for link in world["links"]:
            name = "one process" if world["size"] == 1 else name_of(world, link)
            for step in link["steps"]:
                predicted = step_seconds(compute, None if world["size"] == 1 else links[name], world, step)
                found.setdefault(name, []).append(predicted / taken(world, step) - 1.0)
    return {
        name: {"points": len(e), "median": statistics.median(map(abs, e)), "worst": max(e, key=abs)}
        for name, e in found.items()
    }


def projected_step(
    compute: Mapping[str, float], link: Mapping[str, float], size: int, macs: float, parameters: float
) -> dict[str, float]:
    """Seconds of a step on `size` nodes of NODE_CORES cores, and of the part of it in which only the link works."""
    own = compute_seconds(compute, macs, NODE_BATCH, parameters) / NODE_CORES
    arithmetic = compute["c1"] * TRAIN * macs * NODE_BATCH / NODE_CORES
    num_bytes = 4 * parameters
    buckets = max(1, math.ceil(num_bytes / BUCKET))
    each = sum_seconds(link, size, num_bytes / buckets)
    waiting = max(0.0, (buckets - 1) * each - arithmetic * (TRAIN - 1) / TRAIN) + each
    return {"seconds": own + waiting, "waiting": waiting}


def project(
    compute: Mapping[str, float],
    links: Mapping[str, Mapping[str, float]],
    ratios: Mapping[str, tuple[float, float]],
) -> list[dict[str, Any]]:
    """Steps before and after apoptosis. ratios: task -> share of parameters, of multiply-adds that is left."""
    found = []
    for network, (parameters, macs, tasks) in NETWORKS.items():
        task = next(task for task in tasks if task in ratios)
        left, right = ratios[task]
        for name, link in links.items():
            for size in NODES:
                before = projected_step(compute, link, size, macs, parameters)
                after = projected_step(compute, link, size, macs * right, parameters * left)
                found.append(
                    {
                        "network": network,
                        "ratios_of": task,
                        "link": name,
                        "nodes": size,
                        "before": before,
                        "after": after,
                        "speed_up": before["seconds"] / after["seconds"],
                        "bytes_before": 8 * (size - 1) / size * parameters,
                        "bytes_after": 8 * (size - 1) / size * parameters * left,
                    }
                )
    return found


def whole_run(dense: float, shrunk: float, first_event: float, sizes: tuple[int, int], run: Record) -> dict[str, float]:
    """Sum the steps and events of a committed run at measured seconds per step.

    Args:
        dense: seconds per step at full width. shrunk: at the smaller of `sizes` parameters. Between and below, a step
            takes what lies on the line through both. first_event: seconds of the first one; later ones in proportion
            to theirs in the committed run.
        run: steps; events, each with step, share of the parameters after it and seconds.
    """
    most, least = sizes
    total = event_seconds = 0.0
    step, now = 0, float(most)
    for event in (*run["events"], {"step": run["steps"], "share": 0.0, "seconds": 0.0}):
        total += (event["step"] - step) * max(0.0, shrunk + (dense - shrunk) * (now - least) / (most - least))
        event_seconds += first_event * event["seconds"] / run["events"][0]["seconds"]
        step, now = event["step"], event["share"] * most
    without = dense * run["steps"]
    return {"speed_up": without / (total + event_seconds), "event_share": event_seconds / (total + event_seconds)}
