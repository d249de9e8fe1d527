"""Make the tables of README.md and of the pages in docs from benchmarks/results/*.json,
and that of the command's options in docs/cli.md from its configuration model.

    python -m benchmarks.table --write      fill the text between the markers of these files
    python -m benchmarks.table --check      exit status 1 if a file does not say what the JSON says

Holds: JSON to Markdown; no figure of a table is typed by hand. Elsewhere: any measuring.
A marker pair is `<!-- NAME:begin -->` ... `<!-- NAME:end -->` with NAME one of the keys of TABLES.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import expected, residual_width
from benchmarks.aftermath import tables as aftermath
from benchmarks.cluster import tables as scaling
from benchmarks.paper import kinds, tables
from benchmarks.paper.summary import read_cells, read_frontiers
from benchmarks.paper.summary import table as markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAPER = RESULTS / "paper"
PAGES = tuple(
    ROOT / page
    for page in ("README.md", "docs/results.md", "docs/scaling.md", "docs/cli.md", "docs/method.md", "docs/research.md",
                 "docs/from-torch-pruning.md", *(f"docs/networks/{name}.md" for name in ("index", *expected.KINDS)))
)  # fmt: skip
Record = Mapping[str, Any]
EMPTY = "No results are committed yet; `{command}` makes them."


def read_results(folder: Path = RESULTS) -> dict[str, Record]:
    """File stem -> JSON."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def overhead_table(results: Mapping[str, Record]) -> str:
    """Share of the training time that apoptosis takes, by part, and what the policy took windows and events to cost."""
    rows = []
    for name, result in _of_kind(results, "overhead"):
        for run in result["runs"]:
            parts, attempts, plain = run["parts"], run["attempts"], run["seconds_without"] / run["steps"]
            ratios = [one["predicted_seconds"] / (one["seconds"] + one["event_seconds"]) for one in attempts]
            first = attempts[0] if attempts else None
            rows.append(
                (
                    str(result.get("network", name)),
                    f"{run['steps']:,} of {run['total_steps']:,}",
                    f"{1000 * plain:,.0f} ms",
                    f"{len(attempts)}, {run['events']}",
                    f"{run['seconds_with']:.1f} s",
                    f"{100 * run['share_by_difference']:.2f} %" if run["steps"] == run["total_steps"] else "",
                    *(f"{parts[part]:.2f} s" for part in ("construction", "windows", "events")),
                    "" if first is None else f"{first['seconds']:.2f} + {first['event_seconds']:.2f} s",
                    f"{min(ratios):.1f} to {max(ratios):.1f}" if ratios else "",
                )
            )
    head = ("network", "steps", "a step", "windows, events", "processor time", "own share", "construction", "windows",
            "events", "first window + event", "predicted / measured")  # fmt: skip
    return markdown(head, rows) if rows else EMPTY.format(command="python -m benchmarks.overhead")


def capture_table(results: Mapping[str, Record]) -> str:
    """What finding the structure of large networks takes."""
    rows = []
    for _, result in _of_kind(results, "capture"):
        for run in result["runs"]:
            limits = [f"{run['limit_seconds']:.0f} s"] if run["limit_seconds"] is not None else []
            limits += [f"{run['limit_bytes'] / 2**30:.0f} GiB"] if run["limit_bytes"] is not None else []
            rows.append(
                (
                    run["network"] + (", fake tensors" if run["fake"] else ""),
                    f"{run['parameters'] / 1e6:,.1f} million",
                    f"{run['weights']}",
                    f"{run['groups']}, {run['groups_free']}",
                    f"{run['seconds_first']:.2f} s",
                    f"{run['seconds_next']:.2f} s",
                    f"{run['processor_seconds_next']:.2f} s",
                    f"{run['bytes_beyond_weights'] / 2**20:.0f} MiB",
                    ", ".join(limits) or "none set",
                )
            )
    head = ("network", "parameters", "weights", "groups: all, may shrink", "first capture", "next captures",
            "processor time", "memory beyond the weights", "limits")  # fmt: skip
    return markdown(head, rows) if rows else EMPTY.format(command="python -m benchmarks.capture_cost")


def event_cost_table(results: Mapping[str, Record]) -> str:
    """What an event costs in memory and processor time."""
    rows = []
    for _, result in _of_kind(results, "event-cost"):
        for run in result["runs"]:
            layer = 4 * run["width"] ** 2
            rows.append(
                (
                    f"{run['width']:,}",
                    f"{layer / 1e6:.0f} MB",
                    f"{run['event_bytes'] / 1e6:.0f} MB",
                    f"{run['event_bytes'] / layer:.1f}",
                    f"{run['event_in_steps']:.1f}",
                    f"{run['watched_step_in_steps']:.2f}",
                    f"{run['shrink_bytes'] / 1e6:.0f} MB",
                    f"{run['shrink_bytes'] / layer:.1f}",
                    f"{run['shrink_seconds']:.1f} s",
                )
            )
    head = ("width", "largest layer", "first event: memory", "in largest layers", "in steps",
            "a watched step, in steps", "shrink_: memory", "in largest layers", "shrink_: processor time")  # fmt: skip
    return markdown(head, rows) if rows else EMPTY.format(command="python -m benchmarks.event_cost")


def step_time_table(results: Mapping[str, Record]) -> str:
    """How far predicted speed-ups of a training step are from measured ones."""
    rows = []
    for _, result in _of_kind(results, "step-time"):
        for run in result["runs"]:
            faster = sorted(sample["measured"] for sample in run["samples"])
            errors = [f"{run[key][which]:.1%}".replace("%", " %") for key in ("predicted_error", "by_macs_error")
                      for which in ("median", "worst")]  # fmt: skip
            times = f"{len(run['samples'])}, {faster[0]:.2f}x to {faster[-1]:.2f}x"
            rows.append((run["words"], times, *errors, f"{run['measuring_processor_seconds']:.1f} s"))
    head = ("network", "copies, faster by", "table: median error", "worst", "multiply-adds: median error", "worst",
            "measuring the table")  # fmt: skip
    return markdown(head, rows) if rows else EMPTY.format(command="python -m benchmarks.step_time")


def machines_table(results: Mapping[str, Record]) -> str:
    """What each result ran on."""
    rows = []
    for name, result in [*results.items(), *_one_of_each(read_cells(PAPER))]:
        run = result if "machine" in result else result["runs"][0]  # the zoo tells the machine of each run
        machine, versions = run["machine"], run["versions"]
        where = machine.get("accelerator") or machine.get("cpu", "unknown")
        rows.append((name, str(where), f"{machine.get('cores')}, {machine.get('threads')}", str(versions.get("torch")),
                     str(versions.get("torch-apoptosis"))))  # fmt: skip
    return markdown(("result", "machine", "cores, threads", "torch", "torch-apoptosis"), rows) if rows else ""


def options_table(results: Mapping[str, Record]) -> str:
    """The options of the command `train`, from the fields of its configuration and its own."""
    import typer

    from apoptosis.tools.cli.app import app

    rows = []
    for option in typer.main.get_command(app).commands["train"].params:
        names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts) if name.startswith("--"))
        default = "" if option.default is None or option.default is False else f"`{option.default}`"
        rows.append((names, option.help.replace("|", "\\|"), default))
    return markdown(("option", "meaning", "default"), rows)


def _one_of_each(cells: Sequence[Record]) -> list[tuple[str, Record]]:
    return list({f"{cell['task']} and its baselines": cell for cell in cells}.items())


def paper(make: Callable[[Sequence[Record], Sequence[Record]], str]) -> Callable[[Mapping[str, Record]], str]:
    """Return a table of the comparison's cells as a table of this page."""
    return lambda results: make(read_cells(PAPER), read_frontiers(PAPER))


TABLES: dict[str, Callable[[Mapping[str, Record]], str]] = {
    "results": paper(tables.overview),
    "methods": paper(tables.methods),
    "aims": paper(tables.aims),
    "seeds": paper(tables.seeds),
    "frontier": paper(tables.frontier),
    "by-kind": paper(kinds.by_kind),
    "by-kind-aims": paper(kinds.aims),
    "gains": paper(kinds.gains),
    "overhead": overhead_table,
    "capture": capture_table,
    "event-cost": event_cost_table,
    "step-time": step_time_table,
    "machines": machines_table,
    "options": options_table,
    "residual-width": residual_width.table,
    **scaling.TABLES,
    **aftermath.TABLES,
    **expected.tables(lambda: read_cells(PAPER)),
}


def fill(text: str, results: Mapping[str, Record]) -> str:
    """The page with every marked part replaced by its table; raises ValueError where a marker lacks its end."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin not in text:
            continue
        before, _, rest = text.partition(begin)
        if end not in rest:
            raise ValueError(f"{begin} has no {end} after it")
        text = f"{before}{begin}\n{make(results)}\n{end}{rest.partition(end)[2]}"
    return text


def _of_kind(results: Mapping[str, Record], kind: str) -> list[tuple[str, Record]]:
    return [(name, result) for name, result in results.items() if result.get("kind") == kind]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true")
    action.add_argument("--check", action="store_true")
    given = parser.parse_args()
    results = read_results()
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = fill(text, results)
        if given.write and filled != text:
            page.write_text(filled, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
        elif filled != text:
            stale.append(str(page.relative_to(ROOT)))
    if stale:
        print(f"not what the JSON says: {', '.join(stale)}; run: python -m benchmarks.table --write", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
