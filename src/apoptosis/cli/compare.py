"""`apoptosis compare`: the same network with and without apoptosis, side by side.

Lives here: arguments to run, and the table. Does not live here: the run (recipes.compare).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from apoptosis.cli import options as o
from apoptosis.cli.display import console, display, metric_words
from apoptosis.cli.train import default_folder
from apoptosis.errors import ArgumentError
from apoptosis.recipes.compare import compare as run_compare
from apoptosis.recipes.folder import RunFolder, write_json

D = o.DEFAULTS


def compare(
    ctx: typer.Context,
    data: o.Data = D.data,
    data_dir: o.DataDir = None,
    train_rows: o.TrainRows = None,
    test_rows: o.TestRows = None,
    validation: o.Validation = D.validation,
    network: o.Network = D.network,
    widths: o.Widths = None,
    activation: o.Activation = D.activation,
    dropout: o.Dropout = D.dropout,
    epochs: o.Epochs = D.epochs,
    batch: o.Batch = D.batch,
    optimizer: o.OptimizerName = D.optimizer,
    lr: o.Lr = D.lr,
    weight_decay: o.WeightDecay = D.weight_decay,
    schedule: o.Schedule = D.schedule,
    seeds: Annotated[str, typer.Option(help="Seeds, 0,1,2: one pair of twins each.")] = "0",
    device: o.Device = D.device,
    precision: o.Precision = D.precision,
    threads: o.Threads = None,
    tolerance: o.Tolerance = None,
    criterion: o.Criterion = D.criterion,
    budget: o.Budget = None,
    probe_rows: o.ProbeRows = D.probe_rows,
    align: o.Align = D.align,
    exclude: o.Exclude = None,
    tensorboard: o.TensorBoard = False,
    out: o.Out = None,
    json_file: o.JsonFile = None,
    quiet: o.Quiet = False,
) -> None:
    """Train twins, with and without apoptosis, epoch by epoch in turn; print and write what differs."""
    config = o.to_config(ctx)
    numbers = o.integers("--seeds", seeds)
    if min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise ArgumentError(f"--seeds: '{seeds}' must be different whole numbers, 0 or more.")
    if json_file is not None and not json_file.parent.is_dir():
        raise ArgumentError(f"--json: there is no folder '{json_file.parent}'.")
    path = out or default_folder(config)
    shown = console()
    with RunFolder(path) as folder, display(shown, quiet) as watch:
        summary = run_compare(folder, config, numbers, watch=watch)
    if json_file is not None:
        write_json(json_file, summary)
    show(shown, summary)
    shown.print(f"run folder: {path}", soft_wrap=True, markup=False)


def show(out: Console, summary: Mapping[str, Any]) -> None:
    """Print the table of a compare summary, its ledgers, and the time to the dense network's metric."""
    runs, total = summary["runs"], summary["overall"]
    name = runs[0]["dense"]["metric_name"]
    table = Table(box=box.SIMPLE, pad_edge=False)
    heads = ("seed", "ms/step", "run, s", "faster", f"test {name}", "diff.", "parameters", "fewer", "MACs", "share")
    for head in heads:
        table.add_column(head, justify="right")
    for run in runs:
        dense, slim = run["dense"], run["apoptosis"]
        numbers = [dense["step_seconds"], slim["step_seconds"], dense["seconds_run"], slim["seconds_run"]]
        numbers += [run["speedup_run"], dense["test_metric"], slim["test_metric"], run["test_metric_difference"]]
        numbers += [dense["parameters"], slim["parameters"], run["parameters_ratio"], run["macs_ratio"]]
        table.add_row(str(run["seed"]), *_cells(name, [*numbers, run["apoptosis_share"]]))
    if len(runs) > 1:
        table.add_section()
        numbers = [total["step_seconds_dense"], total["step_seconds_apoptosis"]]
        numbers += [sum(run[side]["seconds_run"] for run in runs) / len(runs) for side in ("dense", "apoptosis")]
        numbers += [total["speedup_run"], total["test_metric_dense"], total["test_metric_apoptosis"]]
        numbers += [total["test_metric_difference"], total["parameters_dense"], total["parameters_apoptosis"]]
        numbers += [total["parameters_ratio"], total["macs_ratio"], total["apoptosis_share"]]
        table.add_row("all", *_cells(name, numbers))
    out.print(table)
    out.print("Pairs read: without -> with apoptosis. share: of the run's time, spent on apoptosis.", markup=False)
    for run in runs:
        out.print(_seed_words(run), soft_wrap=True, markup=False)


def _cells(name: str, numbers: list[float]) -> list[str]:
    step0, step1, run0, run1, faster, metric0, metric1, diff, size0, size1, fewer, macs, share = numbers
    difference = f"{100 * diff:+.2f} pts" if name == "accuracy" else f"{diff:+.4f}"
    return [
        f"{1000 * step0:.2f} -> {1000 * step1:.2f}",
        f"{run0:.1f} -> {run1:.1f}",
        f"{faster:.2f}x",
        f"{metric_words(name, metric0)} -> {metric_words(name, metric1)}",
        difference,
        f"{size0:,.0f} -> {size1:,.0f}",
        f"{fewer:.1f}x",
        f"{macs:.1f}x",
        f"{100 * share:.1f} %",
    ]


def _seed_words(run: Mapping[str, Any]) -> str:
    widths = "-".join(str(width) for width in run["apoptosis"]["widths"].values())
    seconds, dense = run["seconds_to_dense_metric"], run["dense"]["seconds_training"]
    reached = "validation metric of the dense network not reached"
    if run["dense"]["validation_metric"] is None:
        reached = "no validation rows, so no time to the dense network's metric"
    elif seconds is not None:
        reached = f"dense network's validation metric reached after {seconds:.1f} s of training, dense {dense:.1f} s"
    return f"seed {run['seed']}: widths {widths}; {reached}\n{run['ledger_text']}"
