"""Options that several commands share, and how they become a RunConfig.

Holds: names, help texts, parsing. Elsewhere: defaults and limits (RunConfig).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from apoptosis.errors import ArgumentError
from apoptosis.storage.files import check_regular
from apoptosis.tools.recipes.config import RunConfig
from apoptosis.tools.recipes.datasets import DATASETS
from apoptosis.tools.recipes.networks import ACTIVATIONS, NETWORKS

DEFAULTS = RunConfig()


def _option(help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text)


Data = Annotated[str, _option(f"Data set: {', '.join(DATASETS)}.", "--data")]
DataDir = Annotated[
    str | None, _option("Where the publisher's files lie or are downloaded to. Default: $APOPTOSIS_DATA or the cache.")
]
TrainRows = Annotated[int | None, _option("Use only so many training rows (digits: enlarge to so many).")]
TestRows = Annotated[int | None, _option("higgs: rows at the end of the file that are the test split.")]
Validation = Annotated[float, _option("Share of the training rows held out for validation and certificates.")]
Network = Annotated[str, _option(f"Network: {', '.join(NETWORKS)}.", "--network")]
Widths = Annotated[
    str | None, _option("Widths of hidden layers or stages, 1024,1024,1024. Default: the network's own.")
]
Activation = Annotated[str, _option(f"Activation: {', '.join(ACTIVATIONS)}.")]
Dropout = Annotated[float, _option("Dropout after every hidden linear layer.")]
Epochs = Annotated[int, _option("Passes over the training rows.")]
Batch = Annotated[int, _option("Rows per step.")]
OptimizerName = Annotated[str, _option("Optimizer: adam, adamw, sgd.", "--optimizer")]
Lr = Annotated[float, _option("Largest learning rate of the schedule.")]
WeightDecay = Annotated[float, _option("Weight decay.")]
Schedule = Annotated[str, _option("Learning rate over time: one-cycle, cosine, constant.")]
Device = Annotated[str, _option("auto, cpu, cuda, cuda:1 ...")]
Precision = Annotated[str, _option("fp32, or bf16 (autocast).")]
Threads = Annotated[int | None, _option("Threads of one operator. Default: torch's own choice.")]
Tolerance = Annotated[
    float | None,
    _option("Cap per consumer site and event on the relative rms change. Default: the library's schedule."),
]
Criterion = Annotated[
    str,
    _option(
        "interpolative, reconstruction, greedy, pairwise, constant, duplicate, magnitude or random: how to choose."
    ),
]
Budget = Annotated[
    float | None, _option("What all removals may cost in accuracy, a share (0.002 is 0.2 points), on validation rows.")
]
ProbeRows = Annotated[int, _option("Validation rows that an event is measured on (with --budget: all of them).")]
Align = Annotated[int, _option("Widths are rounded up to a multiple of this.")]
Exclude = Annotated[list[str] | None, _option("Group to leave alone, by name or wildcard; may be repeated.")]
Calibration = Annotated[
    float | None,
    typer.Option(help="Fixed cost of an event in MACs, from an earlier run's summary. Default: measured once."),
]
TensorBoard = Annotated[bool, _option("Write TensorBoard scalars into the run folder.", "--tensorboard")]
Launcher = Annotated[
    str,
    _option(
        "Who starts the processes of one run: auto, none, torchrun, mpi or slurm; auto looks at the environment. "
        "Under mpi gradients and moments are summed by MPI.",
        "--launcher",
    ),
]
Quiet = Annotated[bool, _option("Print nothing but the result.", "--quiet", "-q")]


def path_of(text: str) -> Path:
    """Take a path that was typed; an empty one would be the folder one is in.

    Raises: ArgumentError: it is empty, or holds a character that no name can.
    """
    if not text.strip() or "\0" in text:
        raise ArgumentError(f"{text!r} names no file or folder: leave the option out, or name one.")
    return Path(text)


Out = Annotated[Path | None, typer.Option(help="Run folder. Default: runs/DATA-NETWORK-TIME.", parser=path_of)]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the result to this file.", parser=path_of, metavar="FILE")
]


def given(ctx: typer.Context) -> dict[str, Any]:
    """Return the options that were typed on the command line, by RunConfig field, parsed."""
    names = [name for name in ctx.params if name in RunConfig.model_fields]
    typed = {}
    for name in names:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            typed[name] = _parse(name, ctx.params[name])
    return typed


def to_config(ctx: typer.Context, **more: Any) -> RunConfig:
    """Make the configuration of what was typed; everything else keeps RunConfig's default.

    Raises: ArgumentError: the first thing that is wrong, as one line.
    """
    return RunConfig.checked(**{**given(ctx), **more})


def same_config(stored: RunConfig, typed: Mapping[str, Any], run: Path) -> RunConfig:
    """Return the stored configuration of a run to resume, if nothing typed contradicts it.

    Raises: ArgumentError: names the option that differs.
    """
    asked = RunConfig.checked(**{**stored.model_dump(), **typed})
    for name in typed:
        if getattr(asked, name) != getattr(stored, name):
            option = "--" + name.replace("_", "-")
            raise ArgumentError(
                f"{option}: the run in '{run}' has {getattr(stored, name)}, not {getattr(asked, name)}; a resumed run "
                "keeps its configuration."
            )
    return stored


def check_json_file(path: Path | None) -> None:
    """Refuse, before anything runs, a result file that could not be written in the end.

    Raises: ArgumentError: no such folder, or something there that is no file.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise ArgumentError(f"--json: there is no folder '{path.parent}'.")
    try:
        check_regular(path)
    except OSError as error:
        raise ArgumentError(f"--json: {error}.") from error


def integers(option: str, text: str) -> tuple[int, ...]:
    """Parse "64,128".

    Raises: ArgumentError: not whole numbers separated by commas.

    Example:
        >>> integers("--widths", "64,128")
        (64, 128)
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ArgumentError(f"{option}: '{text}' is not whole numbers separated by commas.") from error


def _parse(name: str, value: Any) -> Any:
    if name == "widths" and isinstance(value, str):
        return integers("--widths", value)
    if name == "exclude":
        return tuple(value or ())
    return value
