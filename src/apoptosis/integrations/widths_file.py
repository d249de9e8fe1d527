"""The widths of a network as a file in the folder of a checkpoint that another library writes.

Holds: that file. Elsewhere: widths as a value (checkpoint.widths), when folders are written and read (the modules
beside).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from torch import nn

from apoptosis.checkpoint.widths import Widths, current_widths
from apoptosis.errors import CheckpointError
from apoptosis.storage.files import replacing

WIDTHS_FILE = "apoptosis_widths.json"


def write_widths(model: nn.Module, folder: str | Path) -> None:
    """Write the widths that a network has now beside its weights; an old file is replaced whole."""
    with replacing(Path(folder) / WIDTHS_FILE) as partial:
        Path(partial).write_text(json.dumps(current_widths(model)), encoding="utf-8")


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
