"""One safetensors file with a JSON manifest in its header: written atomically, read with every byte checked.

Holds: the file. Elsewhere: what is in it (checkpoint/save_load.py). There is no pickle on either side.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from apoptosis.checkpoint.manifest import FORMAT, Check, check_shape, from_text, loading, to_text, writing
from apoptosis.errors import CheckpointError
from apoptosis.storage.files import check_regular, replacing

_VERSION = 1
_OTHERS = "it is damaged: its tensors are not those that were saved."


def write_file(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write tensors and manifest; an old file of that name is replaced only when the new one is complete on disk.

    Raises: CheckpointError: the file cannot be written; the old one is as it was.
    """
    dense = _dense(tensors)
    listed = {name: [str(t.dtype), list(t.shape), _checksum(t)] for name, t in dense.items()}
    text = to_text({"tensors": listed, **manifest}, _VERSION)
    with writing(path), replacing(path) as partial:
        save_file(dense, partial, metadata={FORMAT: text})


def read_file(path: str | os.PathLike[str], check: Check | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check a file.

    Args:
        path: the file.
        check: called with the manifest and the shapes of its tensors before one of them is read into memory; a file
            that claims tensors as large as it likes must not cost more than a look at its header.

    Returns: the manifest, and the tensors on the CPU.

    Raises: CheckpointError: no such file, no safetensors file, cut off, damaged, foreign, or of a newer format; or what
        `check` raises.
    """
    with loading(path):
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if FORMAT not in metadata:
                raise CheckpointError(f"it is a safetensors file, but not a checkpoint of {FORMAT}.")
            manifest = from_text(metadata[FORMAT].encode(), _VERSION)
            listed = _listed(manifest)
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            if shapes != {name: shape for name, (_, shape, _) in listed.items()}:
                raise CheckpointError(_OTHERS)
            if check is not None:
                check(manifest, shapes)
            # The file's pages are mapped: a checksum takes no memory, and what is wrong is never copied.
            return manifest, {name: _checked(file.get_tensor(name), listed[name]) for name in shapes}


def _listed(manifest: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Return (dtype, shape, checksum) of every tensor, as the manifest lists them."""
    listed = manifest.get("tensors")
    if not isinstance(listed, dict):
        raise CheckpointError("it is damaged: its manifest lists no tensors.")
    found = {}
    for name, entry in listed.items():
        if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str) and type(entry[2]) is int):
            raise CheckpointError(f"it is damaged: its manifest misstates the tensor '{name[:120]}'.")
        found[name] = (entry[0], check_shape(entry[1], f"tensors.{name}"), entry[2])
    return found


def _checked(tensor: Tensor, listed: tuple[str, tuple[int, ...], int]) -> Tensor:
    if (str(tensor.dtype), tuple(tensor.shape), _checksum(tensor)) != listed:
        raise CheckpointError(_OTHERS)
    return tensor.clone()


def _dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU that share no memory, as the format wants them."""
    dense: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
        if copy.untyped_storage().data_ptr() in storages:
            copy = copy.clone()
        storages.add(copy.untyped_storage().data_ptr())
        dense[name] = copy
    return dense


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else 0
