"""`apoptosis train`: one run in a folder.

Lives here: arguments to run and back to words. Does not live here: the run (recipes.train).
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from apoptosis.cli import options as o
from apoptosis.cli.display import console, display, metric_words, widths_words
from apoptosis.recipes.config import RunConfig
from apoptosis.recipes.folder import RunFolder
from apoptosis.recipes.train import train as run_train

D = o.DEFAULTS


def train(
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
    seed: Annotated[int, typer.Option(help="Decides initialisation, order of the rows, dropout.")] = D.seed,
    device: o.Device = D.device,
    precision: o.Precision = D.precision,
    threads: o.Threads = None,
    apoptosis: Annotated[bool, typer.Option("--apoptosis/--no-apoptosis", help="Shrink while training.")] = True,
    tolerance: o.Tolerance = None,
    criterion: o.Criterion = D.criterion,
    budget: o.Budget = None,
    probe_rows: o.ProbeRows = D.probe_rows,
    align: o.Align = D.align,
    exclude: o.Exclude = None,
    calibration: o.Calibration = None,
    tensorboard: o.TensorBoard = False,
    out: o.Out = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder exactly.")] = None,
    quiet: o.Quiet = False,
) -> None:
    """Train one network; with apoptosis unless told otherwise."""
    config = o.to_config(ctx) if resume is None else o.same_config(_stored(resume), o.given(ctx), resume)
    path = resume or out or default_folder(config)
    shown = console()
    with RunFolder(path, resume=resume is not None) as folder, display(shown, quiet) as watch:
        summary = run_train(folder, config, resume=resume is not None, watch=watch)
    shown.print(_words(summary), soft_wrap=True, markup=False)
    shown.print(f"run folder: {path}", soft_wrap=True, markup=False)


def default_folder(config: RunConfig) -> Path:
    """Name a folder after data, network and time; one that is not there yet."""
    name = f"{config.data}-{config.network}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    return next(path for path in (Path("runs") / name for name in names) if not path.exists())


def _stored(path: Path) -> RunConfig:
    return RunConfig.read(path / "config.json")


def _words(summary: dict[str, Any]) -> str:
    result = summary["result"]
    lines = [
        f"test {result.metric_name} {metric_words(result.metric_name, result.test_metric)}, "
        f"{result.parameters:,} parameters, {widths_words(result.widths)}{result.seconds_training:.1f} s of training "
        f"({1000 * result.step_seconds:.2f} ms per step), {result.seconds_run:.1f} s in all"
    ]
    return "\n".join([*lines, summary["ledger_text"]] if "ledger_text" in summary else lines)
