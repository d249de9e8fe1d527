"""Checkpoints of sharded networks: a folder that all ranks write, and any number of ranks reads again.

Lives here: the folder (torch.distributed.checkpoint) and what of it a rank reads. Does not live here: what a checkpoint
holds and how it is taken over (checkpoint.py), which is the same as in one file.

Every rank writes its own shards. What is the same on all ranks (the manifest with its widths, buffers, the state of the
run) is rank 0's.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apoptosis.errors import CheckpointError
from apoptosis.ranks import Ranks, ranks_of
from apoptosis.sharded import at_rest, group_of, has_shards, is_sharded
from apoptosis.surgery.checkpoint import Resumable, packed, take_over
from apoptosis.surgery.checkpoint_tensors import PREFIX, check_names
from apoptosis.unwrap import bare, parallel_in

_MANIFEST = "manifest"
_OPTIMIZER = "optimizer."
_VERSION = 1


def save_sharded(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    apo: Resumable | None = None,
    **extra: object,
) -> None:
    """Save a (shrunk) network whose parameters are spread over processes; every rank calls it.

    The folder is written beside and put in place when it is complete, so that there is always a whole one: this one,
    or for a moment `<folder>.old`, which `load_sharded` knows.

    Args:
        folder: in a file system that all ranks share. An old checkpoint in it is replaced, other things are not.
        model: sharded or not; see `apoptosis.save`.
        optimizer: one or several; state is saved by parameter name.
        apo: the `Apoptosis` of the run.
        extra: see `apoptosis.save`; rank 0's is kept.

    Raises: CheckpointError: on all ranks where one fails; an old checkpoint is as it was.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with tempfile.TemporaryDirectory() as place:
        ...     save_sharded(f"{place}/net", net, epoch=3)
        ...     wide = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        ...     load_sharded(f"{place}/net", wide)
        {'epoch': 3}
        >>> wide[0].out_features
        3
    """
    target = Path(folder)
    whole, writing, old = bare(model), target.with_name(f"{target.name}.writing"), _old(target)
    group, ranks = _together(model)
    at_rest(whole)

    def prepare() -> dict[str, Tensor]:
        if target.exists() and not (target / ".metadata").exists():
            raise CheckpointError(f"'{target}' exists and is no checkpoint; it is left alone. Name another folder.")
        needed = not ranks.rank or has_shards(whole)  # of plain tensors rank 0's are kept, and it may alone hold them
        tensors, manifest = packed(whole, optimizer if needed else None, apo, extra)
        if ranks.rank:
            return {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}
        shutil.rmtree(writing, ignore_errors=True)
        text = json.dumps({"version": _VERSION, **manifest}).encode()
        return tensors | {_MANIFEST: torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    tensors = ranks.each(prepare)
    _call("written", target, "save", tensors, writing, group)

    def put_in_place() -> None:
        if ranks.rank:
            return
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        writing.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    ranks.each(put_in_place)


def load_sharded(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    apo: Resumable | None = None,
) -> dict[str, Any]:
    """Load what `save_sharded` wrote into a full-width model, sharded over any number of processes or not at all.

    Every rank calls it, and reads what it will hold. Parameters keep their identity; see `apoptosis.load`.

    Returns: the extras that were saved.

    Raises: CheckpointError: the folder is missing, damaged, of another network or other widths, or lacks what was asked
        for. Model and optimizer are as before the call.
    """
    target = Path(folder)
    if not target.exists() and _old(target).exists():
        target = _old(target)
    bare_model, (group, ranks) = bare(model), _together(model)
    at_rest(bare_model)
    known = ranks.each(lambda: _metadata(target))
    text = torch.empty(known[_MANIFEST].size, dtype=torch.uint8, device="cpu")
    _call("loaded", target, "load", {_MANIFEST: text}, target, group)

    def targets() -> tuple[dict[str, Any], dict[str, Tensor]]:
        manifest = _manifest(target, text)
        shapes = {name: tuple(entry.size) for name, entry in known.items()}
        try:
            check_names(bare_model, manifest["model"], shapes)
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint '{target}' cannot be loaded: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"checkpoint '{target}' is damaged: its manifest misstates {error}.") from error
        names = [name for name in known if name != _MANIFEST]
        if optimizer is None:
            names = [name for name in names if not name.startswith(_OPTIMIZER)]
        parameters = dict(bare_model.named_parameters())
        return manifest, {name: _room(name, known[name], parameters) for name in names}

    manifest, tensors = ranks.each(targets)
    _call("loaded", target, "load", tensors, target, group)
    return ranks.each(lambda: take_over(target, manifest, tensors, model, optimizer, apo))


def _old(target: Path) -> Path:
    return target.with_name(f"{target.name}.old")


def _together(model: nn.Module) -> tuple[Any, Ranks]:
    """Return the process group that a model is spread over, None for none or one process, and its ranks."""
    parallel: tuple[Any, ...] = parallel_in(model)
    group = parallel[0].process_group if parallel else group_of(bare(model))
    ranks = ranks_of(parallel, group, next(model.parameters()).device)
    return None if ranks.size == 1 else group, ranks


def _call(what: str, target: Path, name: str, tensors: dict[str, Tensor], folder: Path, group: Any) -> None:
    """Save or load by torch.distributed.checkpoint, whose errors derive from no Exception."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # alone, that is the intent
            getattr(dcp, name)(tensors, checkpoint_id=folder, process_group=group, no_dist=group is None)
    except (CheckpointException, OSError, RuntimeError, ValueError, KeyError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"checkpoint '{target}' cannot be {what}: {lines[-1]}") from error


def _metadata(target: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    if not (target / ".metadata").exists():
        raise CheckpointError(f"'{target}' is no checkpoint, or one that was not finished.")
    try:
        known = dict(FileSystemReader(target).read_metadata().state_dict_metadata)
    except Exception as error:  # what a damaged pickle raises may be anything
        raise CheckpointError(f"checkpoint '{target}' is damaged: {error}") from error
    if _MANIFEST not in known:
        raise CheckpointError(f"checkpoint '{target}' has no manifest of widths: save_sharded has not written it.")
    return known


def _manifest(target: Path, text: Tensor) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(bytes(text.tolist()))
        version = found["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint '{target}' is damaged: its manifest cannot be read ({error}).") from error
    if version != _VERSION:
        raise CheckpointError(f"checkpoint '{target}' has version {version!r}, this library reads {_VERSION}.")
    return found


def _room(name: str, entry: Any, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return an empty tensor for one that was stored: spread as the parameter that it is, or that it is state of, is.

    State is named optimizer.<number>.state.<parameter>.<key>.
    """
    own = name.removeprefix(PREFIX) if name.startswith(PREFIX) else ""
    if name.startswith(_OPTIMIZER) and ".state." in name:
        own = name.split(".state.", 1)[1].rpartition(".")[0]
    like: Any = parameters.get(own)
    dtype, size = entry.properties.dtype, tuple(entry.size)
    if like is None or not is_sharded(like) or len(size) != like.ndim:
        return torch.empty(size, dtype=dtype, device="cpu")
    from torch.distributed.tensor import empty

    found: Tensor = empty(size, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)
    return found
