"""The tables of docs/scaling.md, made from benchmarks/results/scaling.json.

Holds: JSON to Markdown. Elsewhere: measuring, the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.cluster.model import BACKENDS
from benchmarks.paper.summary import table as markdown

Record = Mapping[str, Any]
EMPTY = "No results are committed yet; `python -m benchmarks.scaling` (`--whole` for whole runs) makes them."
NONE = "–"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"


def _mb(num_bytes: float | None) -> str:
    return NONE if num_bytes is None else f"{num_bytes / 1e6:.2f} MB"


def _links(result: Record) -> Iterator[tuple[Record, Record]]:
    for world in result["worlds"]:
        for link in world["links"]:
            yield world, link


def busy(result: Record) -> bool:
    """Whether other programs ran meanwhile."""
    return bool(result["machine"]["load_before"] > 0.5 * result["machine"]["cores"])


def crowded(world: Record) -> bool:
    """Whether the processes of a world share cores, so that wall time says nothing of as many machines."""
    return bool(world["size"] * world["threads"] > world["cores"])


def backend(world: Record) -> str:
    """What sums over the processes of a world, and whether a link was only acted."""
    if world["size"] == 1:
        return NONE
    name = BACKENDS[world["backend"]]
    return name if world["how"] == "namespaces" else f"{name}, hook"


def pairs(link: Record) -> Iterator[tuple[Record, Record]]:
    """Steps of the dense and of the shrunk network at the same batch."""
    for dense in (s for s in link["steps"] if s["layout"] == "dense"):
        yield dense, next(s for s in link["steps"] if s["layout"] == "shrunk" and s["rows"] == dense["rows"])


def setting(result: Record) -> str:
    """Say in one sentence what the figures were taken on, other programs at work included."""
    where, load = result["machine"], result["machine"]["load_before"]
    several = [world for world in result["worlds"] if world["size"] > 1]
    sums = " and ".join(dict.fromkeys(world.get("transport") or world["backend"] for world in several))
    if result["why_no_mpi"]:
        sums += f" (MPI: {result['why_no_mpi']})"
    bounded = [world["backend"] for world in several if world["how"] == "namespaces"]
    acted = [world["backend"] for world in several if world["how"] != "namespaces"]
    links = (
        "links bounded by tc in network namespaces" if bounded else "links acted by a communication hook that sleeps"
    )
    if bounded and acted:
        links += f" (those of {BACKENDS[acted[0]]} acted by a communication hook that sleeps)"
    shared = f"Nothing else ran on it (load {load:.1f} before the start)."
    if busy(result):
        shared = (
            f"**The machine was shared with other programs** (load {load:.1f} before the start): wall times are upper "
            "limits, bytes and processor time are not touched by that."
        )
    return (
        f"Measured on {where['cpu']}, {where['cores']} of its cores, torch {result['versions']['torch']}, "
        f"{sums}, {links}, seed {result['seed']}. {shared}"
    )


def steps(result: Record) -> str:
    """Step time, bytes and processor time before and after apoptosis."""
    rows = []
    for world, link in _links(result):
        for dense, shrunk in pairs(link):
            hidden = crowded(world) or busy(result)
            ratio = NONE if hidden else f"{dense['seconds'] / shrunk['seconds']:.2f}x"
            rows.append(
                (
                    str(world["size"]),
                    backend(world),
                    NONE if world["size"] == 1 else link["link"],
                    str(dense["rows"]),
                    f"{_mb(dense['bytes_on_link'])} → {_mb(shrunk['bytes_on_link'])}" if world["size"] > 1 else NONE,
                    f"{_ms(dense['seconds'])} → {_ms(shrunk['seconds'])}",
                    f"{_ms(dense['cpu_seconds'])} → {_ms(shrunk['cpu_seconds'])}",
                    ratio,
                )
            )
    head = ("processes", "sums by", "link", "batch of each", "bytes that each sends per step", "step",
            "processor time, all", "faster")  # fmt: skip
    return markdown(head, rows)


def scaling(result: Record) -> str:
    """Weak and strong scaling where every process has a core."""
    one = {(s["layout"], s["rows"]): s["seconds"] for s in result["worlds"][0]["links"][0]["steps"]}
    rows = []
    for world, link in _links(result):
        if world["size"] == 1 or crowded(world) or busy(result):
            continue
        for step in link["steps"]:
            weak = step["rows"] == result["batch"]
            alone = one[step["layout"], result["batch"]]
            gain = alone / step["seconds"] * (world["size"] if weak else 1)
            rows.append((str(world["size"]), backend(world), link["link"], step["layout"], "weak" if weak else "strong",
                         _ms(step["seconds"]), f"{gain:.2f}x", f"{100 * gain / world['size']:.0f} %"))  # fmt: skip
    head = (
        "processes",
        "sums by",
        "link",
        "network",
        "scaling",
        "step",
        "examples per second, of one process",
        "efficiency",
    )
    return markdown(head, rows) if rows else "No run had a core for every process and no other program."


def events(result: Record) -> str:
    """What the first event takes, in seconds, bytes and dense steps of the same layout."""
    rows = []
    for world, link in _links(result):
        event = link["event"]
        if event is None:
            continue
        run = link["run"]
        rows.append((str(world["size"]), backend(world), NONE if world["size"] == 1 else link["link"],
                     _ms(event["seconds"]), _ms(event["hook_seconds"]), _mb(event["bytes_on_link"]),
                     f"{event['dense_steps']:.1f}", _ms(event["cpu_seconds"]),
                     f"{100 * run['event_share']:.1f} %"))  # fmt: skip
    head = ("processes", "sums by", "link", "first event", "watching before it", "bytes that each sends",
            "both in dense steps", "processor time, all",
            "share of a run's time in events")  # fmt: skip
    return markdown(head, rows)


def targets(result: Record) -> str:
    """What was aimed at and what came out."""
    return markdown(("target", "measured", "met"), [(t["target"], t["measured"], t["met"]) for t in result["targets"]])


def _rate(unit: float, seconds: float) -> str:
    """Return a rate, or that noise hides it: a fit of few noisy points may come to nothing for a share."""
    if seconds <= 0:
        return "unknown"
    return f"{unit / seconds:,.{1 if unit / seconds < 100 else 0}f}"


def model(result: Record) -> str:
    """Fitted constants and the error on the measured steps."""
    found, rows = result["model"], []
    c = found["compute"]
    for name, error in found["errors"].items():
        link = found["links"].get(name)
        words = (
            f"{1e3 * c['c0']:.2f} ms + {_rate(1e-9, c['c1'])} GMAC/s + {1e9 * c['c2']:.2f} ns per parameter"
            if link is None
            else f"alpha {1e6 * link['alpha']:.0f} µs, {_rate(8e-6, link['beta'])} Mbit/s"
        )
        rows.append(
            (name, words, str(error["points"]), f"{100 * error['median']:.0f} %", f"{100 * error['worst']:+.0f} %")
        )
    return markdown(("steps of", "fitted", "measured points", "median error", "worst error"), rows)


def projection(result: Record) -> str:
    """Steps of larger networks on more nodes, as the model says."""
    rows = []
    for p in result["projection"]:
        waits = "{:.0f} % → {:.0f} %".format(*(100 * p[k]["waiting"] / p[k]["seconds"] for k in ("before", "after")))
        rows.append((p["network"], p["link"], f"{p['nodes']:,}", f"{_mb(p['bytes_before'])} → {_mb(p['bytes_after'])}",
                     f"{_ms(p['before']['seconds'])} → {_ms(p['after']['seconds'])}", waits,
                     f"{p['speed_up']:.2f}x"))  # fmt: skip
    head = (
        "network",
        "link",
        "nodes",
        "bytes that each sends per step",
        "step",
        "of it waiting for the link",
        "faster",
    )
    return f"{left_of(result)}\n\n{markdown(head, rows)}"


def left_of(result: Record) -> str:
    """Whose ratios the projection takes, and what accuracy they were had at."""
    rows = []
    for network, task in {p["network"]: p["ratios_of"] for p in result["projection"]}.items():
        one = result["tasks"][task]
        shares = (f"{100 * one[key]:.1f} %" for key in ("parameters", "macs"))
        tests = (f"{100 * one[key]:.1f} %" for key in ("dense", "apoptosis"))
        rows.append((network, f"{one['network']}; {one['epochs']} epochs of {one['rows']:,} images", *shares, *tests))
    head = ("network", "what is left is that of", "parameters left", "multiply-adds left", "its test accuracy, dense",
            "with apoptosis")  # fmt: skip
    return markdown(head, rows)


def whole(result: Record) -> str:
    """Whole runs, dense and with apoptosis."""
    where, rows = result["machine"], []
    for size in dict.fromkeys(r["size"] for r in result["runs"]):
        dense = next(r for r in result["runs"] if r["size"] == size and r["method"] == "dense")
        for one in (r for r in result["runs"] if r["size"] == size):
            link = NONE if size == 1 else result["link"] + (", hook" if result["how"] == "hook" else "")
            faster = NONE if one is dense else f"{dense['seconds'] / one['seconds']:.2f}x"
            rows.append((str(size), link, one["method"], f"{one['seconds']:,.0f} s", faster,
                         f"{one['cpu_seconds']:,.0f} s",
                         NONE if one["bytes_on_link"] is None else f"{one['bytes_on_link'] / 1e9:.2f} GB",
                         f"{100 * one['test']:.2f} %", f"{one['parameters']:,}", str(len(one["events"]))))  # fmt: skip
    head = ("processes", "link", "network", "whole run", "faster", "processor time, all", "each sends", "test accuracy",
            "parameters at the end", "events")  # fmt: skip
    shared = "shared with other programs" if busy(result) else "with nothing else on it"
    first = result["runs"][0]
    return (
        f"{result['network']} on {result['task']}, {result['epochs']} epochs, {first['steps']:,} steps of "
        f"{result['batch']} examples in all, seed {result['seed']}; {where['cpu']}, {where['cores']} of its cores, "
        f"{shared} (load {where['load_before']:.1f} before the start).\n\n{markdown(head, rows)}"
    )


def of(make: Callable[[Record], str], name: str = "scaling") -> Callable[[Mapping[str, Record]], str]:
    """Return a table of scaling.json, or of another by name, as one of all results."""
    return lambda results: make(results[name]) if name in results else EMPTY


TABLES: dict[str, Callable[[Mapping[str, Record]], str]] = {
    "scaling-setting": of(setting),
    "scaling-targets": of(targets),
    "scaling-steps": of(steps),
    "scaling-efficiency": of(scaling),
    "scaling-events": of(events),
    "scaling-model": of(model),
    "scaling-projection": of(projection),
    "scaling-whole": of(whole, "scaling-whole"),
}
