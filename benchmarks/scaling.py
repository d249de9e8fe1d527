"""Measure data-parallel training over links of several speeds, and project it to more nodes.

    python -m benchmarks.scaling --data-dir DIR     benchmarks/results/scaling.json
    python -m benchmarks.scaling --quick            two processes, small networks, seconds; for tests

Lives here: worlds of processes started one after the other, their figures put together. Does not live here: what a rank
measures (cluster/rank.py), the cost model (cluster/model.py), tables (cluster/tables.py).

Links are bounded by tc in network namespaces. Where the machine allows none, a communication hook sleeps for the time
that a ring over such links takes at least, on top of the real sum; then bytes are not counted on the link.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from apoptosis.recipes.folder import write_json
from apoptosis.recipes.machine import machine, versions
from benchmarks.cluster import model
from benchmarks.cluster.links import Links, why_not
from benchmarks.cluster.rank import BATCH, Spec, name_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RATES = (None, 1e9, 1e8)
FULL: dict[str, Any] = {
    "dense": (1024, 1024, 1024),
    "shrunk": (336, 224, 136),  # what the committed run on MNIST, seed 0, ends with
    "warm": 174,
    "events": 2,
    "steps": {name_of(None): 20, name_of(1e9): 10, name_of(1e8): 5},
    "sums": (1_000, 30_000, 300_000, 1_000_000, 3_000_000),
}
QUICK: dict[str, Any] = {
    "dense": (64, 64, 64),
    "shrunk": (16, 16, 16),
    "warm": 40,
    "events": 1,
    "steps": {name_of(None): 3, name_of(1e9): 3, name_of(1e8): 3},
    "sums": (1_000, 30_000, 300_000),
}
BACKENDS = ("gloo",)  # mpi joins with its launcher: ranks are then started by mpirun, one world at a time
TIMEOUT = 1800  # seconds that a world may take
Record = dict[str, Any]


def world(size: int, how: str, args: argparse.Namespace, cores: int, start: str) -> Record:
    """Start the ranks of one world, wait for them and put their figures together."""
    with tempfile.TemporaryDirectory() as folder, Links(size) if how == "namespaces" else nullcontext() as links:
        plan = QUICK if args.quick else FULL
        rates = RATES[::2] if args.quick else RATES
        spec = Spec(size=size, folder=folder, backend=args.backend, how=how, threads=max(1, cores // size),
                    rates=rates, start=start, data_dir=args.data_dir, seed=args.seed, **plan)  # fmt: skip
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(asdict(spec)), encoding="utf-8")
        device = "lo" if links is None else "eth0"
        environment = os.environ | {"GLOO_SOCKET_IFNAME": device, "OMP_NUM_THREADS": str(spec.threads)}
        words = [sys.executable, "-m", "benchmarks.cluster.rank", str(path)]
        ranks = [
            subprocess.Popen([*([] if links is None else links.enter(n)), *words, str(n)], cwd=ROOT, env=environment)
            for n in range(size)
        ]
        try:
            if any([rank.wait(TIMEOUT) for rank in ranks]):
                raise SystemExit(f"a rank of {size} failed")
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        found = [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(size)]
    return {"size": size, "threads": spec.threads, "cores": cores, "links": joined([f["links"] for f in found])}


def joined(ranks: list[Any]) -> Any:
    """Put the records of all ranks together: the slowest rank's seconds, everybody's processor time, most bytes."""
    first = ranks[0]
    if isinstance(first, dict):
        return {key: _joined(key, [rank[key] for rank in ranks]) for key in first}
    if isinstance(first, list):
        return [joined(list(each)) for each in zip(*ranks, strict=True)]
    return first


def _joined(key: str, values: list[Any]) -> Any:
    if key == "cpu_seconds":
        return sum(values)
    if key in ("seconds", "median_seconds", "hook_seconds", "bytes_on_link"):
        return None if values[0] is None else max(values)
    return joined(values)


def committed_run() -> Record:
    """Read the run on MNIST whose widths and events are taken over, and what its grounds leave of networks."""
    cell = json.loads((RESULTS / "paper" / "mnist-0.json").read_text(encoding="utf-8"))
    events, full = cell["contestants"]["apoptosis"]["events"], cell["contestants"]["dense"]["parameters"]
    return {
        "steps": cell["epochs"] * (cell["train_rows"] // cell["batch"]),
        "events": [
            {"step": e["step"], "seconds": e["seconds"], "share": (e["macs"] + sum(e["widths"].values()) + 10) / full}
            for e in events
        ],
    }


def ratios() -> dict[str, tuple[float, float]]:
    """Ground -> shares of parameters and of multiply-adds that apoptosis left in the committed runs."""
    found = {}
    for ground in dict.fromkeys(ground for _, _, ground in model.NETWORKS.values()):
        cell = json.loads((RESULTS / "paper" / f"{ground}-0.json").read_text(encoding="utf-8"))["contestants"]
        found[ground] = tuple(cell["apoptosis"][key] / cell["dense"][key] for key in ("parameters", "macs"))
    return found


def step_of(link: Record, layout: str, rows: int = BATCH) -> Record:
    return next(s for s in link["steps"] if s["layout"] == layout and s["rows"] == rows)


def with_runs(worlds: list[Record], run: Record) -> None:
    """Add to every link what a whole run would take at its steps, and its event in dense steps."""
    for place, link in ((w, link) for w in worlds for link in w["links"]):
        dense, shrunk = (model.taken(place, step_of(link, layout)) for layout in ("dense", "shrunk"))
        event = link["event"]
        cost = 0.0
        if event is not None:
            cost = event["cpu_seconds"] if place["size"] == 1 else event["seconds"] + event["hook_seconds"]
            event["dense_steps"] = cost / dense
        sizes = tuple(step_of(link, layout)["parameters"] for layout in ("dense", "shrunk"))
        link["run"] = model.whole_run(dense, shrunk, cost, sizes, run)


def fit(worlds: list[Record]) -> Record:
    """Fit the cost model on everything that was measured, and say how far off it is."""
    compute = model.fit_compute(worlds[0]["links"][0]["steps"], worlds[0]["threads"])
    sums: dict[str, list[tuple[int, Record]]] = {}
    for w in worlds:
        for link in w["links"] if w["size"] > 1 else ():
            sums.setdefault(link["link"], []).extend((w["size"], s) for s in link["sums"])
    links = {name: model.fit_link(found) for name, found in sums.items()}
    alpha = min((link["alpha"] for link in links.values()), default=0.0)  # a bound on the rate delays no small message
    links = {name: link | {"alpha": alpha} for name, link in links.items()}
    return {"compute": compute, "links": links, "errors": model.errors(worlds, compute, links)}


def targets(worlds: list[Record], fitted: Record) -> list[dict[str, str]]:
    """Compare with what issue 5 aims at: four processes, at 1 Gbit/s and where communication bounds."""
    one = worlds[0]["links"][0]
    four = {link["link"]: link for w in worlds if w["size"] == 4 for link in w["links"]}
    if not four:
        return []
    single = model.taken(worlds[0], step_of(one, "dense")) / model.taken(worlds[0], step_of(one, "shrunk"))
    found, cores = [], f"on {worlds[0]['cores']} core{'s' * (worlds[0]['cores'] > 1)}"

    def add(target: str, measured: str, met: bool) -> None:
        found.append({"target": f"4 processes, {target}", "measured": measured, "met": "yes" if met else "no"})

    for name, link in four.items():
        dense, shrunk = step_of(link, "dense"), step_of(link, "shrunk")
        by_model = [
            model.compute_seconds(fitted["compute"], s["macs"], s["rows"], s["parameters"])
            + model.sum_seconds(fitted["links"][name], 4, s["payload"])
            for s in (dense, shrunk)
        ]
        least = {"1000 Mbit/s": (single, one["run"]["speed_up"]), "100 Mbit/s": (5.0, 5.0)}.get(name)
        if least is not None:
            what = "as one process alone" if name == "1000 Mbit/s" else "where communication bounds"
            ratio, whole = dense["seconds"] / shrunk["seconds"], link["run"]["speed_up"]
            own = f"{by_model[0] / by_model[1]:.1f}x by the model with a core for each"
            add(f"{name}: steps after apoptosis at least {least[0]:.1f}x faster, {what}",
                f"{ratio:.1f}x {cores}; {own}", ratio >= least[0])  # fmt: skip
            add(f"{name}: the whole run at least {least[1]:.1f}x faster",
                f"{whole:.1f}x at the measured steps", whole >= least[1])  # fmt: skip
        event = link["event"]
        if event is not None:
            sent = (event["bytes_on_link"] or 0.0) * fitted["links"][name]["beta"]
            own = f"{(event['cpu_seconds'] / 4 + sent) / by_model[0]:.1f} by the model with a core for each"
            add(f"{name}: an event under 10 dense steps of the same layout",
                f"{event['dense_steps']:.1f} {cores}, with the watching before it; {own}",
                event["dense_steps"] < 10)  # fmt: skip
    return found


def followed(result: Record) -> Record:
    """Add all that follows from the measured worlds."""
    worlds = result["worlds"]
    with_runs(worlds, committed_run())
    fitted = fit(worlds)
    slow = {name: link for name, link in fitted["links"].items() if name == "1000 Mbit/s"}
    for link in tuple(slow.values()):
        slow["10 Gbit/s, assumed"] = link | {"beta": link["beta"] / 10}
    projection = model.project(fitted["compute"], slow, ratios())
    return result | {"model": fitted, "targets": targets(worlds, fitted), "projection": projection}


def measured(args: argparse.Namespace) -> Record:
    """Run all worlds and say all that follows."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    reason = why_not() if args.how == "namespaces" else "not asked for"
    how = "hook" if reason else "namespaces"
    with tempfile.TemporaryDirectory() as folder:
        start = f"{folder}/start.pt"
        worlds = [world(size, how, args, cores, start) for size in sorted({1, *args.sizes})]
    return {
        "kind": "scaling",
        "seed": args.seed,
        "backend": args.backend,
        "how": how,
        "why_no_namespaces": reason,
        "batch": BATCH,
        "data": "mnist" if args.data_dir else "synthetic",
        "versions": versions(),
        "machine": machine(torch.device("cpu")) | {"cores": cores, "load_before": load},
        "worlds": worlds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda s: [int(n) for n in s.split(",")], help="processes: 1,2,4,8")
    parser.add_argument("--backend", default="gloo", choices=BACKENDS)
    parser.add_argument(
        "--how", default="namespaces", choices=("namespaces", "hook"), help="where there are none: hook"
    )
    parser.add_argument("--data-dir", help="where mnist lies; numbers of its shape are drawn without")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--refit", action="store_true", help="measure nothing: the model anew, from the JSON's worlds")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, default=RESULTS / "scaling.json")
    given = parser.parse_args()
    given.sizes = given.sizes or ([2] if given.quick else [2, 4, 8])
    result = json.loads(given.json.read_text(encoding="utf-8")) if given.refit else measured(given)
    result = followed(result)
    write_json(given.json, result)
    print(f"wrote {given.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
