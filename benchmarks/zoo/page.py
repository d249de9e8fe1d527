"""The zoo's part of docs/coverage.md, from the JSON alone.

Holds: tables and the summary. Elsewhere: any measurement.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "zoo.json", ROOT / "docs" / "coverage.md"
BEGIN = "## Networks of timm and transformers\n"
CONVOLUTIONAL = 0.9  # share of the multiply-adds that convolutions do in what is counted as a convolutional network
HEAD = ("network", "captured", "multiply-adds that may shrink", "groups: may shrink, all",
        "pins: share of the multiply-adds, why", "seconds")  # fmt: skip
TEXT = f"""{BEGIN}
One network of each of timm's modules (and more of those that hold several kinds), and every model type of transformers
that can be built small from its configuration alone, with few layers and small widths, made from
[benchmarks/results/zoo.json](../benchmarks/results/zoo.json), which `python -m benchmarks.zoo` measures. It needs the
extra `zoo` (`pip install 'torch-apoptosis[zoo]'`: timm, torchvision, transformers). Where torchvision cannot be
imported beside the installed torch (PyPI's wheel beside the CPU build: "operator torchvision::nms does not exist"), the
benchmark puts an empty module in the place of `torchvision._meta_registrations`, which no network of timm needs.

- *Captured*: the structure was found, on fake tensors (shapes without numbers) or on *real* ones: networks of few
  parameters, and those whose own pass reads numbers off its values. A model type of which nothing could be built and
  run in this way is not listed.
- *Multiply-adds that may shrink*: of one training pass on two examples. The multiply-adds of an operator count by the
  largest share of any one axis of its weight or operands whose channels are in groups that may shrink, and they are
  divided by all multiply-adds: a product with a weight of which all rows or all columns may go counts in full.
- *Pins*: groups that may not shrink, by reason; each with the share of the multiply-adds that make and read its
  channels. A weight between two groups counts for both. Shares under 0.5 % are left out. "output": the network's
  outputs.
- *Seconds*: of one processor, for the capture alone.
- A network counts as *convolutional* where convolutions do at least {100 * CONVOLUTIONAL:.0f} % of its multiply-adds.

"""


def read() -> dict[str, Any]:
    """The committed figures."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def part(result: Mapping[str, Any]) -> str:
    """The zoo's part of the page."""
    made = "\n".join(f"- {line}" for line in _made(result))
    lines = "\n".join(f"- {line}" for line in summary(result).splitlines())
    tables = []
    for family, found in result["families"].items():
        rows = [_row(name, row) for name, row in found.items() if row["built"]]
        tables += [f"### {family}\n\n{_table([HEAD, *rows])}\n"] if rows else []
    return f"{TEXT}{lines}\n\nMade in:\n\n{made}\n\n" + "\n".join(tables)


def _made(result: Mapping[str, Any]) -> list[str]:
    """A line for every run that rows are of."""
    lines = []
    for number, run in enumerate(result["runs"]):
        rows = [row for found in result["families"].values() for row in found.values() if row["run"] == number]
        used = sum(row.get("seconds", 0.0) + row.get("seconds_build", 0.0) for row in rows)
        names = [name for name in ("torch", "timm", "torchvision", "transformers") if name in run["versions"]]
        of = ", ".join(f"{name} {run['versions'][name]}" for name in names)
        code = f"sources {run['code']}" if run["code"] else "sources of several states"
        number_of = f"{run['processes']} processes" if run["processes"] else "several processes"
        wall = f", {run['seconds']:.0f} seconds" if run["seconds"] else ""
        lines.append(
            f"{len(rows)} rows, which took {used:.0f} processor seconds{wall}: {code}, seed {run['seed']}, {of}, "
            f"{run['machine']['system']}, {number_of} of one thread each."
        )
    return lines


def summary(result: Mapping[str, Any]) -> str:
    """Counts and medians, a line each."""
    lines = []
    for family, found in result["families"].items():
        built = {name: row for name, row in found.items() if row["built"]}
        captured = {name: row for name, row in built.items() if row["captured"]}
        shares = {name: row["share"] for name, row in captured.items() if row["share"] is not None}
        if not built:
            continue
        convolutional = {n: s for n, s in shares.items() if captured[n]["convolutions"] >= CONVOLUTIONAL}
        lines.append(
            f"{family}: {len(found)} tried, {len(built)} built and run, {len(captured)} captured"
            + (f" (not: {', '.join(sorted(built.keys() - captured.keys()))})" if len(captured) < len(built) else "")
        )
        for kind, some in (("all", shares), ("convolutional", convolutional)):
            if some:
                zero = sorted(name for name, value in some.items() if value < 0.005)
                lines.append(
                    f"{family}, {kind}: {len(some)} networks, median {statistics.median(some.values()):.3f}, at least "
                    f"0.97 in {sum(value >= 0.97 for value in some.values())}, none in {len(zero)}"
                    + (f" ({', '.join(zero)})" if zero else "")
                )
    return "\n".join(lines)


def write_page() -> None:
    """Put the zoo's part at the end of the page."""
    before = PAGE.read_text(encoding="utf-8").partition(f"\n{BEGIN}")[0].rstrip("\n")
    PAGE.write_text(f"{before}\n\n{part(read())}", encoding="utf-8")


def _row(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    if not row["captured"]:
        return name, "no", "", "", row["error"], f"{row.get('seconds', 0.0):.1f}"
    pins = [f"{100 * pin['share']:.0f} %: {why}" for why, pin in row["pins"].items() if pin["share"] >= 0.005]
    share = "none counted" if row["share"] is None else f"{row['share']:.3f}"
    groups = f"{row['groups_free']}, {row['groups']}"
    return name, "fake" if row["fake"] else "real", share, groups, "; ".join(pins) or "none", f"{row['seconds']:.1f}"


def _table(lines: list[tuple[str, ...]]) -> str:
    every = [lines[0], ("---",) * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in every)
