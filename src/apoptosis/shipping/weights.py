"""Weights and widths as plain files.

Holds: a state_dict as safetensors, tied tensors once. Elsewhere: checkpoints to train on from (checkpoint).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apoptosis.checkpoint.widths import current_widths
from apoptosis.shipping.records import WEIGHTS, WIDTHS, ShippedFile


def write_weights(model: nn.Module, folder: Path) -> ShippedFile:
    """Write the state_dict of a network; a tensor of several names is stored once, as safetensors' load_model wants."""
    path = folder / WEIGHTS
    state = {name: x for name, x in model.state_dict().items() if isinstance(x, Tensor)}
    stored, same = _once(state)
    dense = {name: x.detach().cpu().contiguous().clone() for name, x in stored.items()}
    save_file(dense, path, metadata={"format": "pt", **same})
    read = load_file(path)
    if not all(torch.equal(_bits(x), _bits(read[name])) for name, x in dense.items()):
        raise OSError(f"'{path}' was not written as it should have been: its tensors read back are others.")
    return ShippedFile(name=WEIGHTS, bytes=path.stat().st_size, checked="read back, the same bit for bit")


def _bits(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


def _once(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors that are stored, and name -> name of the stored one for those that are the same."""
    stored: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    names: dict[object, str] = {}
    for name, x in state.items():
        key = (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, x.device) if x.numel() else name
        if key in names:
            same[name] = names[key]
        else:
            names[key] = name
            stored[name] = x
    return stored, same


def write_widths(model: nn.Module, folder: Path) -> ShippedFile:
    """Write the widths, as `set_widths_` takes them."""
    path = folder / WIDTHS
    path.write_text(json.dumps(current_widths(model), indent=1) + "\n")
    return ShippedFile(name=WIDTHS, bytes=path.stat().st_size)
