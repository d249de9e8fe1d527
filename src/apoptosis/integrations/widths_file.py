"""The widths of a network as a file in the folder of a checkpoint that another library writes.

Holds: that file. Elsewhere: widths as a value (checkpoint.widths), when folders are written and read (the modules
beside).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from torch import nn

from apoptosis.checkpoint.tensors import tensors_of
from apoptosis.checkpoint.widths import Widths, record_of
from apoptosis.distributed.wrappers import unwrapped
from apoptosis.errors import CheckpointError
from apoptosis.model.built import built_shapes, is_known
from apoptosis.storage.files import replacing

WIDTHS_FILE = "apoptosis_widths.json"


def widths_now(model: nn.Module) -> Widths:
    """Return the widths that a network has now, with those that it was built with where they are known."""
    model = unwrapped(model)
    return record_of(model, {}, _built(model))


def has_shrunk(model: nn.Module) -> bool:
    """Whether a network lost channels or took over widths in this process."""
    model = unwrapped(model)
    tensors = tensors_of(model)
    now = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return any(shape != now.get(name, shape) for name, shape in _built(model).items()) or _is_emptied(model)


def _built(model: nn.Module) -> dict[str, tuple[int, ...]]:
    if not is_known(model):
        return {}
    return built_shapes(model, {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()})


def _is_emptied(model: nn.Module) -> bool:
    return is_known(model) and bool(record_of(model, {}, {})["emptied"])


def write_widths(model: nn.Module, folder: str | Path) -> None:
    """Write the widths that a network has now beside its weights; an old file is replaced whole."""
    with replacing(Path(folder) / WIDTHS_FILE) as partial:
        Path(partial).write_text(json.dumps(widths_now(model)), encoding="utf-8")


def read_widths(folder: str | Path) -> Widths | None:
    """Return the widths in a folder, None where it has no such file.

    Raises: CheckpointError: the file is no JSON.
    """
    path = Path(folder) / WIDTHS_FILE
    if not path.is_file():
        return None
    try:
        return cast(Widths, json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckpointError(f"'{path}' is damaged: {error}.") from error
