"""Make the tables of README.md and docs/results.md from benchmarks/results/*.json.

    python benchmarks/table.py --write      fill the text between the markers of both files
    python benchmarks/table.py --check      exit status 1 if a file does not say what the JSON says

Lives here: JSON to Markdown; no figure of a table is typed by hand. Does not live here: any measuring.
A marker pair is `<!-- NAME:begin -->` ... `<!-- NAME:end -->` with NAME one of the keys of TABLES.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
ORDER = ("mnist", "fashion-mnist", "higgs", "cifar10")

Record = Mapping[str, Any]
EMPTY = "No results are committed yet; `{command}` makes them."
FIGURES_COMMAND = "python benchmarks/run_figures.py && python benchmarks/table.py --write"


def read_results(folder: Path = RESULTS) -> dict[str, Record]:
    """File stem -> JSON, in the order of the tables."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    rank = {name: i for i, name in enumerate(ORDER)}
    return dict(sorted(found.items(), key=lambda item: (rank.get(item[0], len(rank)), item[0])))


def results_table(results: Mapping[str, Record]) -> str:
    """One row per comparison, all seeds together."""
    rows = [_result_row(name, r) for name, r in _of_kind(results, "compare")]
    head = ("run", "seeds", "whole run", "parameters", "multiply-adds", "test metric: without, with", "difference",
            "time in apoptosis")  # fmt: skip
    return _table(head, rows) if rows else EMPTY.format(command=FIGURES_COMMAND)


def seeds_table(results: Mapping[str, Record]) -> str:
    """One row per comparison and seed."""
    rows = []
    for name, result in _of_kind(results, "compare"):
        for run in result["runs"]:
            dense, slim = run["dense"], run["apoptosis"]
            reached = run["seconds_to_dense_metric"]
            rows.append(
                (
                    name,
                    str(run["seed"]),
                    f"{dense['seconds_run']:.1f} s, {slim['seconds_run']:.1f} s",
                    f"{1000 * dense['step_seconds']:.2f} ms, {1000 * slim['step_seconds']:.2f} ms",
                    f"{run['speedup_run']:.2f}x",
                    f"{dense['parameters']:,}, {slim['parameters']:,}",
                    "-".join(str(width) for width in slim["widths"].values()),
                    _metrics(dense["metric_name"], dense["test_metric"], slim["test_metric"]),
                    "not reached" if reached is None else f"{reached:.1f} s",
                    _cost(run["ledger"]),
                )
            )
    head = ("run", "seed", "whole run: without, with", "per step", "faster", "parameters", "final widths",
            "test metric: without, with", "time to the dense validation metric", "ledger")  # fmt: skip
    return _table(head, rows) if rows else EMPTY.format(command=FIGURES_COMMAND)


def rivals_table(results: Mapping[str, Record]) -> str:
    """The shrunk network against one trained from scratch at its final widths."""
    rows = []
    for name, result in _of_kind(results, "rivals"):
        for run in result["runs"]:
            dense, slim, rival = run["dense"], run["apoptosis"], run["rival"]
            metric = dense["metric_name"]
            rows.append(
                (
                    str(result.get("row", name)),
                    str(run["seed"]),
                    "-".join(str(width) for width in run["rival_widths"]),
                    *(
                        f"{_metric(metric, r['test_metric'])}, {r['seconds_training']:.1f} s"
                        for r in (dense, slim, rival)
                    ),
                )
            )
    head = ("run", "seed", "widths", "without", "with apoptosis", "these widths from scratch")
    return _table(head, rows) if rows else EMPTY.format(command="python benchmarks/rivals.py")


def overhead_table(results: Mapping[str, Record]) -> str:
    """Share of the training time that apoptosis takes: by its own clock, and against the same steps without it."""
    rows = []
    for name, result in _of_kind(results, "overhead"):
        for run in result["runs"]:
            rows.append(
                (
                    str(result.get("row", name)),
                    str(run["seed"]),
                    str(run["events"]),
                    f"{run['seconds_with']:.2f} s",
                    f"{run['seconds_without']:.2f} s",
                    f"{100 * run['share_by_difference']:.2f} %",
                    f"{100 * run['share_by_clock']:.2f} %",
                    f"{100 * run['hook_share']:.2f} %",
                )
            )
    head = ("run", "seed", "events", "training", "the same steps without", "share by difference",
            "share by its own clock", "of this, hooks")  # fmt: skip
    return _table(head, rows) if rows else EMPTY.format(command="python benchmarks/overhead.py")


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
    return _table(head, rows) if rows else EMPTY.format(command="python benchmarks/capture_cost.py")


def machines_table(results: Mapping[str, Record]) -> str:
    """What each result ran on."""
    rows = []
    for name, result in results.items():
        machine, versions = result.get("machine", {}), result.get("versions", {})
        where = machine.get("accelerator") or machine.get("cpu", "unknown")
        rows.append((name, str(where), f"{machine.get('cores')}, {machine.get('threads')}", str(versions.get("torch")),
                     str(versions.get("torch-apoptosis"))))  # fmt: skip
    return _table(("result", "machine", "cores, threads", "torch", "torch-apoptosis"), rows) if rows else ""


TABLES: dict[str, Callable[[Mapping[str, Record]], str]] = {
    "results": results_table,
    "seeds": seeds_table,
    "rivals": rivals_table,
    "overhead": overhead_table,
    "capture": capture_table,
    "machines": machines_table,
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


def _result_row(name: str, result: Record) -> tuple[str, ...]:
    total, config = result["overall"], result["config"]
    metric = result["runs"][0]["dense"]["metric_name"]
    difference = total["test_metric_difference"]
    widths = " " + ",".join(map(str, config["widths"])) if config.get("widths") else ""
    tolerance = "" if config.get("tolerance") is None else f", tolerance {config['tolerance']:g}"
    return (
        f"{config['data']}, {config['network']}{widths}, {config['epochs']} epochs{tolerance}",
        str(total["num_seeds"]),
        f"{total['speedup_run']:.2f}x faster",
        f"{total['parameters_ratio']:.1f}x fewer",
        f"{total['macs_ratio']:.1f}x fewer",
        _metrics(metric, total["test_metric_dense"], total["test_metric_apoptosis"]),
        f"{100 * difference:+.2f} points" if metric == "accuracy" else f"{difference:+.4f}",
        f"{100 * total['apoptosis_share']:.1f} %",
    )


def _metric(name: str, value: float) -> str:
    return f"{100 * value:.2f} %" if name == "accuracy" else f"{name.upper()} {value:.4f}"


def _metrics(name: str, dense: float, slim: float) -> str:
    return f"{_metric(name, dense)}, {_metric(name, slim)}"


def _cost(ledger: Record) -> str:
    cost = ledger.get("accuracy_cost")
    if cost is None:
        return "no classes to read"
    if ledger.get("population"):
        return f"at most {100 * cost:.2f} points ({100 * ledger['confidence']:.0f} %)"
    return f"{100 * cost:.2f} points on training inputs"


def _of_kind(results: Mapping[str, Record], kind: str) -> list[tuple[str, Record]]:
    return [(name, result) for name, result in results.items() if result.get("kind") == kind]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


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
        print(f"not what the JSON says: {', '.join(stale)}; run: python benchmarks/table.py --write", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
