"""`apoptosis train`: one run in a folder.

Holds: from options to a run, and the result as text. Elsewhere: the run (recipes.train).
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from apoptosis.errors import ArgumentError
from apoptosis.tools.cli.display import console, display, widths_words
from apoptosis.tools.cli.options import Out, Quiet, path_of, same_config, with_run_options
from apoptosis.tools.cli.rank_errors import joined_group
from apoptosis.tools.launch import Group
from apoptosis.tools.recipes.config import CSV, IMAGES, RunConfig, resolve_device
from apoptosis.tools.recipes.folder import CHECKPOINT, CONFIG, RunFolder, has_results
from apoptosis.tools.recipes.train import train as run_train
from apoptosis.tools.report.words import metric_value


@with_run_options()
def train(
    typed: Mapping[str, Any],
    out: Out = None,
    launcher: Annotated[
        str,
        typer.Option(
            help="What starts the processes of one run: auto, none, torchrun, mpi or slurm; auto looks at the "
            "environment. Under mpi gradients and moments are summed by MPI."
        ),
    ] = "auto",
    resume: Annotated[
        Path | None, typer.Option(help="Continue the run in this folder exactly.", parser=path_of)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train one network, with apoptosis by default."""
    if resume is not None and out is not None:
        raise ArgumentError(f"--out: a resumed run continues in its own folder, '{resume}'; leave --out out.")
    config = RunConfig.checked(**typed) if resume is None else same_config(_stored(resume), typed, resume)
    if config.device not in ("auto", "cuda"):  # the launcher says which process has which
        resolve_device(config.device)
    with joined_group(launcher, config.device) as group:
        where = _where(group, config, out, resume)
        _run(group, config, *where, quiet=quiet)


def _run(group: Group, config: RunConfig, path: Path, resume: str, *, quiet: bool) -> None:
    first, shown = group.rank == 0, console()
    if first and resume == "folder":
        shown.print(
            f"'{path}' holds no checkpoint yet: the run starts again from its configuration",
            soft_wrap=True,
            markup=False,
        )
    opened = group.ranks.run_collectively(lambda: RunFolder(path, resume=resume != "", writes=first))
    with opened as folder, display(shown, quiet or not first) as watch:
        summary = run_train(folder, config, resume=resume == "checkpoint", watch=watch, group=group)
    if first:
        shown.print(_text(summary), soft_wrap=True, markup=False)
        shown.print(f"run folder: {path}", soft_wrap=True, markup=False)


def _where(group: Group, config: RunConfig, out: Path | None, resume: Path | None) -> tuple[Path, str]:
    """Return the run's folder, the same on all ranks, and what to continue from: "checkpoint", "folder" or "".

    Processes that torchrun restarted continue the run that they were started for.

    Raises: ArgumentError: they may be restarted, and would not find it. DataError: another run lies there.
    """
    if resume is not None:
        return resume, group.ranks.first("checkpoint" if has_results(resume) else "folder")
    if group.process.restartable and out is None:
        raise ArgumentError("torchrun --max-restarts needs --out: restarted processes continue the run in that folder.")
    path = group.ranks.first(out or default_folder(config))
    found = ""
    if group.rank == 0 and group.process.restarts and (path / CONFIG).is_file():
        if _stored(path) == config:
            found = "checkpoint" if (path / CHECKPOINT).exists() else "folder"
    return path, group.ranks.first(found)


def default_folder(config: RunConfig) -> Path:
    """Name a folder after data, network and time; one that is not there yet."""
    own = config.data.startswith((CSV, IMAGES))
    data = Path(config.data.partition(":")[2]).stem if own else config.data.rpartition(":")[2]
    data = re.sub(r"[^\w.-]+", "-", data).strip("-.") or "data"
    network = config.network if config.model is None else config.model.rpartition(":")[2]
    name = f"{data}-{network}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    return next(path for path in (Path("runs") / name for name in names) if not path.exists())


def _stored(path: Path) -> RunConfig:
    return RunConfig.read(path / "config.json")


def _text(summary: dict[str, Any]) -> str:
    result = summary["result"]
    lines = [
        f"test {result.metric_name} {metric_value(result.metric_name, result.test_metric)}, "
        f"{result.parameters:,} parameters, {widths_words(result.widths)}{result.seconds_training:.1f} s of training "
        f"({1000 * result.step_seconds:.2f} ms per step), {result.seconds_run:.1f} s in all"
    ]
    return "\n".join([*lines, summary["ledger_text"]] if "ledger_text" in summary else lines)
