"""`apoptosis plan`: what apoptosis would remove from the network of a checkpoint now, or what to expect of a new one.

Holds: the dry run. It shrinks a copy in memory, measures what that does, and writes nothing.
Elsewhere: planning and surgery (the library), networks that were not trained yet (expect).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from apoptosis import shrink_
from apoptosis.checkpoint import load
from apoptosis.criteria import get_criterion
from apoptosis.errors import ArgumentError, CheckpointError
from apoptosis.tools.cli.display import console
from apoptosis.tools.cli.expect import expect
from apoptosis.tools.cli.inspect import DTYPES
from apoptosis.tools.cli.options import JsonFile, check_json_file, option_name, path_of, with_run_options
from apoptosis.tools.cli.rank_errors import refuse_several
from apoptosis.tools.recipes.config import RunConfig
from apoptosis.tools.recipes.datasets import Dataset
from apoptosis.tools.recipes.fitting import placed_on, probe_of
from apoptosis.tools.recipes.folder import CHECKPOINT, CONFIG, write_json
from apoptosis.tools.recipes.loop import make_network
from apoptosis.tools.recipes.own import is_factory
from apoptosis.tools.recipes.own_network import probe_limit
from apoptosis.tools.recipes.train import prepare
from apoptosis.tools.report.run import NOTHING_SAID, says_nothing

BOUNDS = {
    "empirical": "relative error of what layer '{}' reads",
    "worst_case": "largest possible error of what layer '{}' reads",
    "accuracy": "share of the predictions that may change",
}


OF_A_RUN = ("tolerance", "target", "criterion", "data_dir", "device")
OF_A_NETWORK = (
    "model", "kwargs", "loss", "data", "label", "drop", "task", "size", "network", "widths", "activation", "dropout",
    "batch", "optimizer", "align", "exclude", "threads",
)  # fmt: skip


@with_run_options(fields=(*OF_A_RUN, *OF_A_NETWORK))
def plan(
    typed: Mapping[str, Any],
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="Run folder, or one checkpoint file in it; or package.module:factory, a network that was not trained "
            "yet, as --model.",
            parser=path_of,
        ),
    ] = None,
    input_shape: Annotated[
        list[str] | None,
        typer.Option(help="Shape of one example of a new network, 3,32,32, where no --data are named."),
    ] = None,
    input_dtype: Annotated[str, typer.Option(help=f"Of the inputs of that shape: {', '.join(DTYPES)}.")] = "float32",
    json_file: JsonFile = None,
) -> None:
    """Say what would be removed from the network of a checkpoint now, or what to expect of a new network."""
    refuse_several("plan")
    check_json_file(json_file)
    if checkpoint is None or (is_factory(str(checkpoint)) and not checkpoint.exists()):
        expect(typed, None if checkpoint is None else str(checkpoint), tuple(input_shape or ()), input_dtype, json_file)
        return
    foreign = [name for name in OF_A_NETWORK if name in typed] + (["input_shape"] if input_shape else [])
    if foreign:
        raise ArgumentError(
            f"{option_name(foreign[0])} is for a network that was not trained yet, and '{checkpoint}' is to be a run: "
            "leave one of them out."
        )
    _dry_run(typed, checkpoint, json_file)


def _dry_run(typed: Mapping[str, Any], checkpoint: Path, json_file: Path | None) -> None:
    """Shrink the network of a checkpoint in memory, and print what that does."""
    path, config = find_checkpoint(checkpoint)
    config = RunConfig.checked(**{**config.model_dump(), **typed})
    data, place = prepare(config)
    model = make_network(config, data, place)
    load(path, model)
    example = placed_on(data.train.between(0, 2)[0], place)
    rows = min(config.probe_rows, len(data.validation), probe_limit(example))
    event = shrink_(
        model,
        example,
        _batches(data, min(config.batch, len(data.train)), place),
        tolerance=_tolerance(config),
        target=config.target,
        criterion=config.criterion,
        probe=probe_of(data, 0, rows, place, labelled=config.loss is None) if rows else None,
        align=config.align,
        exclude=config.exclude,
    )
    shown = console()
    asked = f"tolerance {event.tolerance:g}" if config.target is None else f"target {config.target}"
    shown.print(f"dry run of '{path}' at {asked}; nothing is written", markup=False)
    for name, (before, after) in event.groups.items():
        shown.print(f"  {name}: {before} -> {after} channels", markup=False)
    for certificate in event.certificates:
        what = "  " + BOUNDS[certificate.kind].format(certificate.subject.partition(":")[0])
        bound = f" <= {certificate.value:.3g} ({certificate.rows} rows)"
        if says_nothing(asdict(certificate)):
            bound = f": no bound, {NOTHING_SAID[certificate.kind]} ({certificate.rows} rows)"
        shown.print(what + bound, soft_wrap=True, markup=False)
    shown.print(str(event), soft_wrap=True, markup=False)
    if json_file is not None:
        write_json(json_file, {"checkpoint": str(path), **event.as_dict()})


def _tolerance(config: RunConfig) -> float | None:
    if config.target is not None:
        return None
    return get_criterion(config.criterion).tolerance if config.tolerance is None else config.tolerance


def find_checkpoint(given: Path) -> tuple[Path, RunConfig]:
    """Find the checkpoint and the configuration of a run folder, or of a file in one."""
    if not given.exists():
        raise ArgumentError(f"'{given}' does not exist: give a run folder, or a checkpoint file in one.")
    folder = given if given.is_dir() else given.parent
    config = RunConfig.read(folder / CONFIG)
    if given.is_file():
        return given, config
    if (given / CHECKPOINT).exists():
        return given / CHECKPOINT, config
    others = sorted(path.name for path in given.glob("*.safetensors"))
    hint = f"; name one of {', '.join(others)}" if others else ""
    raise CheckpointError(f"'{given}' holds no {CHECKPOINT}{hint}.")


def _batches(data: Dataset, batch: int, device: torch.device) -> Iterator[Any]:
    """Yield training inputs in order; the library stops when it has seen enough."""
    for inputs, labels in data.train.slices(batch):
        if len(labels) == batch:
            yield placed_on(inputs, device)
