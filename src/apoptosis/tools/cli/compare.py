"""`apoptosis compare`: the same network with and without apoptosis, side by side.

Holds: from options to runs, and the tables. Elsewhere: the run (recipes.compare).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from apoptosis.errors import ArgumentError
from apoptosis.tools.cli.display import console, display
from apoptosis.tools.cli.options import JsonFile, Out, Quiet, check_json_file, integers, with_run_options
from apoptosis.tools.cli.rank_errors import refuse_several
from apoptosis.tools.cli.train import default_folder
from apoptosis.tools.recipes.compare import compare as run_compare
from apoptosis.tools.recipes.config import RunConfig
from apoptosis.tools.recipes.folder import RunFolder, write_json
from apoptosis.tools.report.words import metric_value


@with_run_options(instead={"seed": "seeds", "apoptosis": None})
def compare(
    typed: Mapping[str, Any],
    seeds: Annotated[str, typer.Option(help="Seeds, 0,1,2: one pair of runs each.")] = "0",
    out: Out = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Train the same network with and without apoptosis, epoch by epoch in turn; print and write the differences."""
    refuse_several("compare")
    config = RunConfig.checked(**typed)
    numbers = integers("--seeds", seeds)
    if min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise ArgumentError(f"--seeds: '{seeds}' must be different whole numbers, 0 or more.")
    check_json_file(json_file)
    path = out or default_folder(config)
    shown = console()
    with RunFolder(path) as folder, display(shown, quiet) as watch:
        summary = run_compare(folder, config, numbers, watch=watch)
    if json_file is not None:
        write_json(json_file, summary)
    show(shown, summary)
    shown.print(f"run folder: {path}", soft_wrap=True, markup=False)


def show(out: Console, summary: Mapping[str, Any]) -> None:
    """Print the tables of a compare summary, its ledgers, and the time to the dense network's metric."""
    runs = summary["runs"]
    out.print(_overall_table(summary))
    if len(runs) > 1:
        out.print(_seeds_table(summary))
    for run in runs:
        out.print(_seed_text(run), soft_wrap=True, markup=False)


def _overall_table(summary: Mapping[str, Any]) -> Table:
    """Both runs side by side, means over the seeds."""
    total, runs = summary["overall"], summary["runs"]
    name = runs[0]["dense"]["metric_name"]
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("mean of seeds" if len(runs) > 1 else f"seed {runs[0]['seed']}")
    for head in ("without", "with apoptosis", "ratio"):
        table.add_column(head, justify="right")

    def pair(key: str) -> list[float]:
        return [sum(run[side][key] for run in runs) / len(runs) for side in ("dense", "apoptosis")]

    seconds, training, steps = pair("seconds_run"), pair("seconds_training"), pair("step_seconds")
    faster = f"{total['speedup_run']:.2f}x", f"{total['speedup_training']:.2f}x"
    table.add_row("whole run, s", *(f"{value:.1f}" for value in seconds), faster[0])
    table.add_row("training alone, s", *(f"{value:.1f}" for value in training), faster[1])
    table.add_row("one step, ms", *(f"{1000 * value:.2f}" for value in steps), f"{steps[0] / steps[1]:.2f}x")
    metrics = pair("test_metric")
    words = (metric_value(name, value) for value in metrics)
    table.add_row(f"test {name}", *words, _difference(name, total["test_metric_difference"]))
    for key in ("parameters", "macs"):
        sizes = (f"{value:,.0f}" for value in pair(key))
        label = "parameters" if key == "parameters" else "MACs per example"
        table.add_row(label, *sizes, f"{total[f'{key}_ratio']:.1f}x")
    table.add_row("time in apoptosis", "", f"{100 * total['apoptosis_share']:.1f} %", "of its run")
    return table


def _seeds_table(summary: Mapping[str, Any]) -> Table:
    name = summary["runs"][0]["dense"]["metric_name"]
    table = Table(box=box.SIMPLE, pad_edge=False)
    for head in ("seed", "faster", f"test {name}", "difference", "parameters", "MACs", "share"):
        table.add_column(head, justify="right")
    for run in summary["runs"]:
        metrics = (metric_value(name, run[side]["test_metric"]) for side in ("dense", "apoptosis"))
        table.add_row(
            str(run["seed"]),
            f"{run['speedup_run']:.2f}x",
            " -> ".join(metrics),
            _difference(name, run["test_metric_difference"]),
            f"{run['parameters_ratio']:.1f}x",
            f"{run['macs_ratio']:.1f}x",
            f"{100 * run['apoptosis_share']:.1f} %",
        )
    return table


def _difference(name: str, value: float) -> str:
    return f"{100 * value:+.2f} points" if name == "accuracy" else f"{value:+.4f}"


def _seed_text(run: Mapping[str, Any]) -> str:
    widths = "-".join(str(width) for width in run["apoptosis"]["widths"].values())
    seconds, dense = run["seconds_to_dense_metric"], run["dense"]["seconds_training"]
    reached = "validation metric of the dense network not reached"
    if run["dense"]["validation_metric"] is None:
        reached = "no validation rows, so no time to the dense network's metric"
    elif seconds is not None:
        reached = f"dense network's validation metric reached after {seconds:.1f} s of training, dense {dense:.1f} s"
    return f"seed {run['seed']}: widths {widths}; {reached}\n{run['ledger_text']}"
