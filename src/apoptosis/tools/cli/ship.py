"""`apoptosis ship`: the network of a run written so that it runs without this library.

Holds: the command. Elsewhere: what is written (apoptosis.shipping), finding the network of a run (plan).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from apoptosis import ship as write
from apoptosis.checkpoint import load
from apoptosis.tools.cli.display import console
from apoptosis.tools.cli.options import path_of, with_run_options
from apoptosis.tools.cli.plan import find_checkpoint
from apoptosis.tools.cli.rank_errors import refuse_several
from apoptosis.tools.recipes.config import RunConfig
from apoptosis.tools.recipes.fitting import placed_on
from apoptosis.tools.recipes.loop import make_network
from apoptosis.tools.recipes.train import prepare


@with_run_options(fields=("data_dir",))
def ship(
    typed: Mapping[str, Any],
    run: Annotated[Path, typer.Argument(help="Run folder, or one checkpoint file in it.", parser=path_of)],
    folder: Annotated[Path, typer.Argument(help="Where to write; an earlier shipment is replaced.", parser=path_of)],
    onnx: Annotated[
        bool | None, typer.Option("--onnx/--no-onnx", help="Write the ONNX file. Default: where its packages are.")
    ] = None,
) -> None:
    """Write the network of a run as plain weights, a torch.export program and an ONNX file, each checked."""
    refuse_several("ship")
    path, config = find_checkpoint(run)
    config = RunConfig.checked(**{**config.model_dump(), **typed, "device": "cpu"})
    data, place = prepare(config)
    model = make_network(config, data, place)
    load(path, model)
    example = placed_on(data.train.between(0, 2)[0], place)
    console().print(str(write(model, folder, example, onnx=onnx)), soft_wrap=True, markup=False)
