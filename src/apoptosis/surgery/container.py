"""One safetensors file with a JSON manifest in its header: written atomically, read with every byte checked.

Lives here: the file. Does not live here: what is in it (checkpoint.py). There is no pickle on either side.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import zlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from apoptosis.errors import CheckpointError

FORMAT = "torch-apoptosis"
FORMAT_VERSION = 1


def write_file(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write tensors and manifest; an old file of that name is replaced only when the new one is complete on disk.

    Raises: CheckpointError: the file cannot be written; the old one is as it was.
    """
    dense = _dense(tensors)
    full = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "library": _library_version(),
        "tensors": {name: [str(t.dtype), list(t.shape), _checksum(t)] for name, t in dense.items()},
        **manifest,
    }
    text = json.dumps(full, allow_nan=False, separators=(",", ":"))
    target = Path(os.path.realpath(path))
    temp = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        temp.touch(exist_ok=False)
        mode = temp.stat().st_mode  # as the user's umask has it; the writer below makes its files private
        save_file(dense, temp, metadata={FORMAT: f"{zlib.crc32(text.encode()):08x} {text}"})
        temp.chmod(mode)
        _sync(temp)
        os.replace(temp, target)
        with contextlib.suppress(OSError):  # some file systems cannot sync a folder
            _sync(target.parent)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"cannot write checkpoint '{path}': {_one_line(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check a file.

    Returns: the manifest, and the tensors on the CPU.

    Raises: CheckpointError: no such file, no safetensors file, cut off, damaged, foreign, or of a newer format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if FORMAT not in metadata:
                raise CheckpointError(f"'{path}' is a safetensors file, but not a checkpoint of {FORMAT}.")
            manifest = _manifest(path, metadata[FORMAT])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint '{path}': {_one_line(error)}") from error
    except (SafetensorError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"'{path}' is not a safetensors file, or it is damaged or cut off: {_one_line(error)}"
        ) from error
    listed = manifest.get("tensors")
    found = {name: [str(t.dtype), list(t.shape), _checksum(t)] for name, t in tensors.items()}
    if listed != found:
        raise CheckpointError(f"'{path}' is damaged: its tensors are not those that were saved.")
    return manifest, tensors


def _manifest(path: str | os.PathLike[str], entry: str) -> dict[str, Any]:
    checksum, _, text = entry.partition(" ")
    if checksum != f"{zlib.crc32(text.encode()):08x}":
        raise CheckpointError(f"'{path}' is damaged: its manifest does not match its checksum.")
    try:
        manifest = json.loads(text)
        found = int(manifest["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{path}' is damaged: its manifest cannot be read.") from error
    if found != FORMAT_VERSION:
        raise CheckpointError(
            f"'{path}' has format version {found} (written by {FORMAT} {manifest.get('library')}); this version reads "
            f"{FORMAT_VERSION}. Update {FORMAT}."
        )
    return dict(manifest)


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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _library_version() -> str:
    try:
        return version(FORMAT)
    except PackageNotFoundError:
        return "unknown"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
