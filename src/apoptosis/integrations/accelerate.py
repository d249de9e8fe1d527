"""Accelerate: checkpoints of `save_state` that know their widths.

Holds: the hooks of an Accelerator. Elsewhere: the widths as a file (widths_file.py), the loop (engine).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from apoptosis.checkpoint.widths import has_shrunk, set_widths_
from apoptosis.distributed.wrappers import unwrapped
from apoptosis.engine import Apoptosis
from apoptosis.errors import ArgumentError, CheckpointError
from apoptosis.integrations.widths_file import WIDTHS_FILE, read_widths, write_widths


def register(accelerator: Accelerator, apo: Apoptosis) -> None:
    """Let `accelerator.save_state` keep the widths and the run, and `accelerator.load_state` bring them back.

    Args:
        accelerator: one that prepared the model of `apo`.
        apo: made of what `accelerator.prepare` returned.

    Raises: ArgumentError: the accelerator did not prepare that model.

    After it `load_state` gives the model the widths of the checkpoint, narrower or wider, before it loads weights and
    optimizer; the state of the run comes last. All processes call it, as they call `load_state`.
    """
    if not any(unwrapped(model) is apo.model for model in accelerator._models):
        raise ArgumentError(
            "register: the accelerator did not prepare this model. Call accelerator.prepare(model, optimizer, ...), "
            "and make Apoptosis of what it returns."
        )

    def write(models: list[nn.Module], weights: Any, folder: str) -> None:
        if accelerator.is_main_process:
            write_widths(apo.model, folder)

    def read(models: list[nn.Module], folder: str) -> None:
        widths = read_widths(folder)
        if widths is not None:
            model = next(one for one in models if unwrapped(one) is apo.model)
            ours = {id(parameter) for parameter in apo.model.parameters()}
            found = [getattr(one, "optimizer", one) for one in accelerator._optimizers]
            set_widths_(
                model, widths, [o for o in found if any(id(p) in ours for g in o.param_groups for p in g["params"])]
            )
        elif has_shrunk(apo.model):
            raise CheckpointError(
                f"'{Path(folder)}' has no {WIDTHS_FILE}, and the network has lost channels since: it was written "
                "before apoptosis.integrations.accelerate.register. Load it into a network that was built anew."
            )

    accelerator.register_save_state_pre_hook(write)
    accelerator.register_load_state_pre_hook(read)
    accelerator.register_for_checkpointing(apo)
