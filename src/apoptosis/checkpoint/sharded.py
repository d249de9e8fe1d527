"""Checkpoints of sharded networks: a folder that all ranks write, and any number of ranks reads again.

Holds: the folder (torch.distributed.checkpoint), its manifest with the checksums of all files, and what of it a
rank reads. Elsewhere: what a checkpoint holds and how it is taken over (checkpoint/save_load.py), which is the
same as in one file; torch's list of the tensors (tensor_list.py).

Every rank writes its own shards. What is the same on all ranks (the manifest with its widths, buffers, the state of the
run) is rank 0's.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import shutil
import stat
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apoptosis.checkpoint.arguments import Optimizers, check_given
from apoptosis.checkpoint.manifest import from_text, loading, to_text, writing
from apoptosis.checkpoint.save_load import Resumable, apply_checkpoint, check_shapes, packed
from apoptosis.checkpoint.tensor_list import Tensors
from apoptosis.checkpoint.tensors import PREFIX
from apoptosis.distributed.protocol import kind_of_tensor
from apoptosis.distributed.ranks import Ranks, ranks_of
from apoptosis.distributed.sharded import has_shards, is_sharded, reshard
from apoptosis.distributed.wrappers import group_of, unwrapped, wrappers_of
from apoptosis.errors import CheckpointError
from apoptosis.model.passes import check_not_inference
from apoptosis.storage.files import check_regular, replacing

_LIST = ".metadata"  # torch's own, of all tensors
_MANIFEST = "apoptosis.json"
_MANIFEST_OF_VERSION_1 = "manifest"  # a tensor among the others, without checksums
_OPTIMIZER = "optimizer."
_VERSION = 2
_CHUNK = 2**23  # bytes read at once for a checksum


def save_sharded(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizers = None,
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
    check_given("save_sharded", folder, model, optimizer, apo)
    target = Path(os.path.realpath(folder))
    inner, unfinished = unwrapped(model), target.with_name(f"{target.name}.writing")
    group, ranks = _together(model)
    reshard(inner)

    def prepare() -> tuple[dict[str, Tensor], dict[str, Any]]:
        if target.exists() and not (target / _LIST).exists():
            raise CheckpointError(f"'{target}' exists and is no checkpoint; it is left alone. Name another folder.")
        needed = not ranks.rank or has_shards(inner)  # of plain tensors rank 0's are kept, and it may alone hold them
        tensors, manifest = packed(inner, optimizer if needed else None, apo, extra)
        if ranks.rank:
            return {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}, manifest
        with writing(target):  # with the permissions of the folder that it replaces
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            if target.exists():
                unfinished.chmod(stat.S_IMODE(target.stat().st_mode))
        return tensors, manifest

    tensors, manifest = ranks.run_collectively(prepare)
    _call("written", target, "save", tensors, group, checkpoint_id=unfinished)
    sums = ranks.gathered(ranks.run_collectively(writing(target)(lambda: _checksums(unfinished, ranks))))
    files = {name: entry for found in sums for name, entry in found.items()}
    finish = writing(target)(lambda: None if ranks.rank else _finish(target, unfinished, files, manifest))
    ranks.run_collectively(finish)


def _checksums(unfinished: Path, ranks: Ranks) -> dict[str, tuple[int, int]]:
    """Return (bytes, checksum) of the files that this rank wrote; rank 0 looks after those of no rank.

    torch names them __<rank>_<number>.distcp.
    """
    found = {}
    for entry in os.scandir(unfinished):
        number = entry.name.removeprefix("__").split("_")[0]
        written = entry.name.startswith("__") and number.isdecimal() and int(number) < ranks.size
        if (int(number) if written else 0) == ranks.rank:
            found[entry.name] = _checksum(unfinished / entry.name)
    return found


def _checksum(path: Path) -> tuple[int, int]:
    check_regular(path)
    size = found = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, found = size + len(chunk), zlib.crc32(chunk, found)
    return size, found


def _finish(target: Path, unfinished: Path, files: Mapping[str, tuple[int, int]], manifest: Mapping[str, Any]) -> None:
    """Write the manifest, and put the folder in place."""
    old = _old(target)
    try:
        with replacing(unfinished / _MANIFEST) as partial:
            partial.write_text(to_text({"files": files, **manifest}, _VERSION), encoding="utf-8")
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        unfinished.rename(target)
    except OSError:
        if old.exists() and not target.exists():
            with contextlib.suppress(OSError):
                old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load_sharded(
    folder: str | os.PathLike[str], model: nn.Module, optimizer: Optimizers = None, apo: Resumable | None = None
) -> dict[str, Any]:
    """Load what `save_sharded` wrote into a full-width model, sharded over any number of processes or not at all.

    Every rank calls it, and reads what it will hold. Parameters keep their identity; see `apoptosis.load`.

    Returns: the extras that were saved.

    Raises: CheckpointError: the folder is missing, damaged, of another network or other widths, or lacks what was asked
        for. Model and optimizer are as before the call.
    """
    check_given("load_sharded", folder, model, optimizer, apo)
    target = Path(os.path.realpath(folder))
    if not target.exists() and _old(target).exists():
        target = _old(target)
    inner, (group, ranks) = unwrapped(model), _together(model)
    check_not_inference(inner, "loading")
    reshard(inner)
    manifest, known = ranks.run_collectively(loading(target)(lambda: _read_checked(target, ranks)))
    if manifest is None:
        manifest = _manifest_of_version_1(target, known, group, ranks)

    @loading(target)
    def empty() -> dict[str, Tensor]:
        check_shapes(manifest, known.shapes, inner, optimizer)
        names = [name for name in known.shapes if optimizer is not None or not name.startswith(_OPTIMIZER)]
        parameters = dict(inner.named_parameters())
        return {name: _empty(name, known, parameters) for name in names}

    tensors = ranks.run_collectively(empty)
    _call("loaded", target, "load", tensors, group, storage_reader=_reader(target, known))
    return ranks.run_collectively(lambda: apply_checkpoint(target, manifest, tensors, model, optimizer, apo))


def _old(target: Path) -> Path:
    return target.with_name(f"{target.name}.old")


def _together(model: nn.Module) -> tuple[Any, Ranks]:
    """Return the process group that a model is spread over, None for none or one process, and its ranks."""
    wrappers, inner = wrappers_of(model), unwrapped(model)
    ranks = ranks_of(wrappers, inner)
    return None if ranks.size == 1 else group_of(wrappers, inner), ranks


def _call(what: str, target: Path, name: str, tensors: dict[str, Tensor], group: Any, **place: Any) -> None:
    """Save or load by torch.distributed.checkpoint, whose errors derive from no Exception."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is ")  # alone, that is the intent
            warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # torch's own, of older versions
            getattr(dcp, name)(tensors, process_group=group, **_alone(group is None), **place)
    except (CheckpointException, OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"checkpoint '{target}' cannot be {what}: {lines[-1]}") from error


def _alone(alone: bool) -> dict[str, bool]:
    """Return the argument by which torch.distributed.checkpoint lets a process act alone; older releases have none."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    if "no_dist" in inspect.signature(vars(dcp)["save"]).parameters:
        return {"no_dist": alone}
    if alone and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            "with this version of torch all processes have to take part; a newer one lets a process act alone"
        )
    return {}


def _reader(target: Path, known: Tensors) -> Any:
    """Return torch's reader of the folder, which does not open the list of tensors again."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return known.metadata

    return Reader(target)


def _read_checked(target: Path, ranks: Ranks) -> tuple[dict[str, Any] | None, Tensors]:
    """Read the manifest, and the list of tensors once all files have their checksums; the ranks share these out.

    Returns: None for the manifest of a checkpoint of version 1, which is one of its tensors.
    """
    if not (target / _LIST).exists():
        raise CheckpointError("it is no checkpoint, or one that was not finished.")
    manifest = None
    if (target / _MANIFEST).exists():
        check_regular(target / _MANIFEST)
        manifest = from_text((target / _MANIFEST).read_bytes(), _VERSION)
        sizes = _check_files(target, manifest.pop("files", None), ranks)
    else:
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(target)}
    check_regular(target / _LIST)
    known = Tensors((target / _LIST).read_bytes(), sizes)
    if manifest is None and _MANIFEST_OF_VERSION_1 not in known.shapes:
        raise CheckpointError("it has no manifest of widths: save_sharded has not written it.")
    return manifest, known


def _check_files(target: Path, files: Any, ranks: Ranks) -> dict[str, int]:
    """Check the files that are this rank's to check; return the sizes of all."""
    if not isinstance(files, dict) or _LIST not in files:
        raise CheckpointError("it is damaged: its manifest lists no files.")
    for i, (name, entry) in enumerate(sorted(files.items())):
        if Path(name).name != name or not (isinstance(entry, list) and [type(n) for n in entry] == [int, int]):
            raise CheckpointError(f"it is damaged: its manifest misstates the file '{name[:80]}'.")
        if (i % ranks.size == ranks.rank or name == _LIST) and list(_checksum(target / name)) != entry:
            raise CheckpointError(f"it is damaged: the file '{name}' is not the one that was saved.")
    return {name: size for name, (size, _) in files.items()}


def _manifest_of_version_1(target: Path, known: Tensors, group: Any, ranks: Ranks) -> dict[str, Any]:
    text = torch.empty(known.shapes[_MANIFEST_OF_VERSION_1], dtype=torch.uint8, device="cpu")
    _call("loaded", target, "load", {_MANIFEST_OF_VERSION_1: text}, group, storage_reader=_reader(target, known))

    manifest = ranks.run_collectively(loading(target)(lambda: from_text(bytes(text.tolist()), _VERSION, signed=False)))
    if not ranks.rank:
        warnings.warn(
            f"checkpoint '{target}' was written without checksums, so that damage to its numbers would go unnoticed; "
            "save it again to have them.",
            UserWarning,
            stacklevel=3,
        )
    del known.shapes[_MANIFEST_OF_VERSION_1]
    return manifest


def _empty(name: str, known: Tensors, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return an empty tensor for one that was stored: spread as the parameter that it is, or that it is state of, is.

    State is named optimizer.<number>.state.<parameter>.<key>.
    """
    own = name.removeprefix(PREFIX) if name.startswith(PREFIX) else ""
    if name.startswith(_OPTIMIZER) and ".state." in name:
        own = name.split(".state.", 1)[1].rpartition(".")[0]
    size, like = known.shapes[name], parameters.get(own)
    kind = kind_of_tensor(like if like is not None and len(size) == like.ndim else None)
    return kind.empty_like(size, known.dtypes[name], like)
