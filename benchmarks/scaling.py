"""Measure data-parallel training over links of several speeds, and project it to more nodes.

    python -m benchmarks.scaling --data-dir DIR     benchmarks/results/scaling.json
    python -m benchmarks.scaling --quick            two processes, small networks, seconds; for tests
    python -m benchmarks.scaling --backend mpi      sums by MPI alone; gloo and MPI without, where there is an mpirun
    python -m benchmarks.scaling --whole --data-dir DIR     whole runs: benchmarks/results/scaling-whole.json

Holds: worlds of processes one after the other, their figures put together. Elsewhere: how processes are
started (cluster/start.py), what a rank measures (cluster/rank.py), the cost model (cluster/model.py), tables
(cluster/tables.py).

Links are bounded by tc in network namespaces. Where the machine allows none, a communication hook sleeps for the time
that a ring over such links takes at least, on top of the real sum; then bytes are not counted on the link.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import shared
from benchmarks.cluster import model, whole
from benchmarks.cluster.links import Links, why_not
from benchmarks.cluster.rank import BATCH, Spec, name_of
from benchmarks.cluster.stand_ins import STAND_INS
from benchmarks.cluster.start import run_ranks, why_no_links_for_mpi, why_no_mpi
from benchmarks.paper.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
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
Record = dict[str, Any]


def world(size: int, backend: str, how: str, args: argparse.Namespace, cores: int, start: str) -> Record:
    """Start the ranks of one world, wait for them and put their figures together."""
    with tempfile.TemporaryDirectory() as folder, Links(size) if how == "namespaces" else nullcontext() as links:
        plan = QUICK if args.quick else FULL
        rates = RATES[::2] if args.quick else RATES
        spec = Spec(size=size, folder=folder, backend=backend, how=how, threads=max(1, cores // size),
                    rates=rates, start=start, data_dir=args.data_dir, seed=args.seed, **plan)  # fmt: skip
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(asdict(spec)), encoding="utf-8")
        program = ["-m", "benchmarks.cluster.rank", str(path)]
        run_ranks(backend, size, program, links=links, folder=Path(folder), threads=spec.threads)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(size)]
    links_of_all = joined([f["links"] for f in found])
    return {"size": size, "backend": backend, "how": how, "transport": found[0]["transport"], "threads": spec.threads,
            "cores": cores, "links": links_of_all}  # fmt: skip


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
    """Read the run on MNIST whose widths and events are taken over, and what its tasks leave of networks."""
    cell = json.loads((shared.RESULTS / "paper" / "mnist-0.json").read_text(encoding="utf-8"))
    events, full = cell["methods"]["apoptosis"]["events"], cell["methods"]["dense"]["parameters"]
    return {
        "steps": cell["epochs"] * (cell["train_rows"] // cell["batch"]),
        "events": [
            {"step": e["step"], "seconds": e["seconds"], "share": (e["macs"] + sum(e["widths"].values()) + 10) / full}
            for e in events
        ],
    }


def tasks() -> dict[str, Record]:
    """Task -> what apoptosis left there: shares of parameters and multiply-adds, accuracy with it and without."""
    found = {}
    for task in dict.fromkeys(task for _, _, several in model.NETWORKS.values() for task in several):
        path = shared.RESULTS / (f"scaling-{task}.json" if task in STAND_INS else f"paper/{task}-0.json")
        if path.exists():
            cell = json.loads(path.read_text(encoding="utf-8"))
            dense, apoptosis = (cell["methods"][name] for name in ("dense", "apoptosis"))
            shares = {key: apoptosis[key] / dense[key] for key in ("parameters", "macs")}
            entry = {"network": (TASKS | STAND_INS)[task].network, "epochs": cell["epochs"]}
            entry["rows"] = cell["train_rows"]
            found[task] = entry | shares | {"dense": dense["test"], "apoptosis": apoptosis["test"]}
    return found


def ratios(measured: Mapping[str, Record]) -> dict[str, tuple[float, float]]:
    return {task: (one["parameters"], one["macs"]) for task, one in measured.items()}


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
    links: dict[str, dict[str, float]] = {}
    for backend in backends_of(worlds):
        sums: dict[str, list[tuple[int, Record]]] = {}
        for w in worlds:
            for link in w["links"] if w["size"] > 1 and w["backend"] == backend else ():
                sums.setdefault(model.name_of(w, link), []).extend((w["size"], s) for s in link["sums"])
        own = {name: model.fit_link(found) for name, found in sums.items()}
        alpha = min(link["alpha"] for link in own.values())  # a bound on the rate delays no small message
        links |= {name: link | {"alpha": alpha} for name, link in own.items()}
    return {"compute": compute, "links": links, "errors": model.errors(worlds, compute, links)}


def backends_of(worlds: list[Record]) -> list[str]:
    return list(dict.fromkeys(w["backend"] for w in worlds if w["size"] > 1))


def targets(worlds: list[Record], fitted: Record) -> list[dict[str, str]]:
    """Compare with the targets of docs/scaling.md: four processes, at 1 Gbit/s and where communication bounds."""
    one = worlds[0]["links"][0]
    single = model.taken(worlds[0], step_of(one, "dense")) / model.taken(worlds[0], step_of(one, "shrunk"))
    gains = {"1000 Mbit/s": (single, one["run"]["speed_up"]), "100 Mbit/s": (5.0, 5.0)}
    return [
        target
        for place in worlds
        for link in (place["links"] if place["size"] == 4 else ())
        for target in _targets(place, link, fitted, gains.get(link["link"]))
    ]


def _targets(
    place: Record, link: Record, fitted: Record, least: tuple[float, float] | None
) -> Iterator[dict[str, str]]:
    """Compare one link of four processes. least: how much faster steps and whole run are to be, None: no aim."""
    name, cores = link["link"], f"on {place['cores']} core{'s' * (place['cores'] > 1)}"
    costs = fitted["links"][model.name_of(place, link)]

    def entry(target: str, measured: str, met: bool) -> dict[str, str]:
        where = f"4 processes, {model.name_of(place, link)}"
        return {"target": f"{where}: {target}", "measured": measured, "met": "yes" if met else "no"}

    dense, shrunk = step_of(link, "dense"), step_of(link, "shrunk")
    by_model = [
        model.compute_seconds(fitted["compute"], s["macs"], s["rows"], s["parameters"])
        + model.sum_seconds(costs, 4, s["payload"])
        for s in (dense, shrunk)
    ]
    if least is not None:
        what = "as one process alone" if name == "1000 Mbit/s" else "where communication bounds"
        ratio, whole = dense["seconds"] / shrunk["seconds"], link["run"]["speed_up"]
        own = f"{by_model[0] / by_model[1]:.1f}x by the model with a core for each"
        yield entry(f"steps after apoptosis at least {least[0]:.1f}x faster, {what}",
                   f"{ratio:.1f}x {cores}; {own}", ratio >= least[0])  # fmt: skip
        yield entry(f"the whole run at least {least[1]:.1f}x faster",
                   f"{whole:.1f}x at the measured steps", whole >= least[1])  # fmt: skip
    event = link["event"]
    if event is not None:
        sent = (event["bytes_on_link"] or 0.0) * costs["beta"]
        own = f"{(event['cpu_seconds'] / 4 + sent) / by_model[0]:.1f} by the model with a core for each"
        yield entry("an event under 10 dense steps of the same layout",
                   f"{event['dense_steps']:.1f} {cores}, with the watching before it; {own}",
                   event["dense_steps"] < 10)  # fmt: skip


def followed(result: Record) -> Record:
    """Add all that follows from the measured worlds."""
    worlds = result["worlds"]
    for place in worlds:  # of results from before there was MPI
        place.setdefault("backend", result.get("backend", "gloo"))
        place.setdefault("how", result["how"])
    with_runs(worlds, committed_run())
    fitted = fit(worlds)
    first = [model.BACKENDS[backend] for backend in backends_of(worlds)][:1]
    link = next((fitted["links"].get(f"{name}, 1000 Mbit/s") for name in first), None)
    slow = {} if link is None else {"1000 Mbit/s": link, "10 Gbit/s, assumed": link | {"beta": link["beta"] / 10}}
    left = tasks()
    projection = model.project(fitted["compute"], slow, ratios(left))
    more = {"tasks": left, "backends": backends_of(worlds), "why_no_mpi": result.get("why_no_mpi", "not asked for")}
    return result | more | {"model": fitted, "targets": targets(worlds, fitted), "projection": projection}


def measured(args: argparse.Namespace) -> Record:
    """Run all worlds and say all that follows."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    reason = why_not() if args.how == "namespaces" else "not asked for"
    how = {"gloo": "hook" if reason else "namespaces"}
    no_links = reason or (why_no_links_for_mpi() if "mpi" in args.backend else "")
    how["mpi"] = "hook" if no_links else "namespaces"
    with tempfile.TemporaryDirectory() as folder:
        start = f"{folder}/start.pt"
        worlds = [world(1, "gloo", how["gloo"], args, cores, start)]
        for backend in args.backend:
            worlds += [world(size, backend, how[backend], args, cores, start) for size in args.sizes if size > 1]
    found = shared.result(
        "scaling",
        seed=args.seed,
        backends=args.backend,
        why_no_mpi=args.why_no_mpi,
        how=how[args.backend[0]],
        why_no_namespaces=reason,
        why_no_namespaces_for_mpi=no_links if "mpi" in args.backend else "",
        batch=BATCH,
        data="mnist" if args.data_dir else "synthetic",
        worlds=worlds,
    )
    return found | {"machine": found["machine"] | {"cores": cores, "load_before": load}}


def choose_backends(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Put the backends in order: what was asked for, or all that are there and why MPI is not."""
    asked, given.why_no_mpi = given.backend, ""
    given.backend = list(model.BACKENDS) if asked is None else list(dict.fromkeys(asked.split(",")))
    if unknown := [backend for backend in given.backend if backend not in model.BACKENDS]:
        parser.error(f"--backend: {unknown[0]!r} is unknown; there are {', '.join(model.BACKENDS)}.")
    if "mpi" not in given.backend:
        given.why_no_mpi = "not asked for"
    elif reason := why_no_mpi():
        remedy = "install both with: pip install 'torch-apoptosis[mpi]'"
        if asked is not None:
            parser.error(f"--backend mpi: {reason}; {remedy}.")
        given.backend.remove("mpi")
        given.why_no_mpi = reason
        print(f"gloo alone: {reason}; {remedy}.")


def main() -> int:
    parser = shared.parser(__doc__)
    parser.add_argument("--sizes", type=lambda s: [int(n) for n in s.split(",")], help="processes: 1,2,4,8")
    parser.add_argument("--backend", help="gloo, mpi or gloo,mpi; without: both where there is an MPI")
    parser.add_argument(
        "--how", default="namespaces", choices=("namespaces", "hook"), help="where there are none: hook"
    )
    parser.add_argument("--data-dir", help="where mnist lies; numbers of its shape are drawn without")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--refit", action="store_true", help="measure nothing: fit the model again, from the JSON's worlds"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--whole", action="store_true", help="whole runs on gloo, dense and with apoptosis")
    parser.add_argument("--epochs", type=int, help="of whole runs; those of the committed run without")
    parser.add_argument("--rate", type=float, default=1e9, help="of the link of whole runs, in bits per second")
    parser.add_argument("--json", type=Path, help="benchmarks/results/scaling.json or scaling-whole.json without")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # ranks end with this process then
    given.json = given.json or shared.RESULTS / ("scaling-whole.json" if given.whole else "scaling.json")
    given.sizes = sorted(given.sizes or ([2] if given.quick else [whole.SIZE] if given.whole else [2, 4, 8]))
    if given.whole:
        shared.write(given.json, whole.measured(given))
        return 0
    if given.refit:
        result = json.loads(given.json.read_text(encoding="utf-8"))
    else:
        choose_backends(parser, given)
        result = measured(given)
    shared.write(given.json, followed(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
