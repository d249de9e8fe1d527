"""What a checkpoint's manifest has to look like, whatever its checksum says.

Holds: its text with a checksum, the types of its entries, the tensors that it names, and one wording for all that
fails. Elsewhere: whether it is of the given model and optimizer (save_load.py, tensors.py, optimizer_state.py).

A right checksum says that nothing was damaged on the way, not that a program wrote what this library would write.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from safetensors import SafetensorError

from apoptosis.checkpoint.tensors import PREFIX
from apoptosis.checkpoint.tree import named_tensors
from apoptosis.errors import CheckpointError
from apoptosis.storage.files import reason
from apoptosis.storage.plain_json import check_depth, parse

FORMAT = "torch-apoptosis"
_LARGEST = 2**62
_DAMAGES = (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError, RecursionError)
Shapes = Mapping[str, Sequence[int]]


@contextmanager
def loading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let errors inside say in one line which checkpoint cannot be loaded, and why. Raises: CheckpointError."""
    try:
        yield
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"checkpoint '{path}' cannot be loaded: {reason(error)}") from error
    except (SafetensorError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"checkpoint '{path}' cannot be loaded: it is no safetensors file, or it is damaged or cut off: "
            f"{reason(error)}"
        ) from error
    except _DAMAGES as error:
        raise CheckpointError(
            f"checkpoint '{path}' is damaged: its manifest lacks or misstates {reason(error)[:200]}."
        ) from error


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let errors inside say in one line which checkpoint cannot be written, and why. Raises: CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"checkpoint '{path}' cannot be written: {reason(error)}") from error


def to_text(manifest: Mapping[str, Any], format_version: int) -> str:
    """Return a manifest as JSON behind its checksum."""
    try:
        library = version(FORMAT)
    except PackageNotFoundError:
        library = "unknown"
    full = {"format": FORMAT, "version": format_version, "library": library, **manifest}
    text = json.dumps(full, allow_nan=False, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x} {text}"


def from_text(entry: bytes, format_version: int, *, signed: bool = True) -> dict[str, Any]:
    """Read what `to_text` wrote, of this format version or an older one.

    Args: signed: False for text without a checksum.

    Raises: CheckpointError: it is damaged, or of a newer version.
    """
    checksum, _, text = entry.partition(b" ") if signed else (b"", b"", entry)
    if signed and checksum != f"{zlib.crc32(text):08x}".encode():
        raise CheckpointError("it is damaged: its manifest does not match its checksum.")
    try:
        found: dict[str, Any] = dict(parse(text))
        there, library = int(found["version"]), found.get("library")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"it is damaged: its manifest cannot be read ({reason(error)}).") from error
    if not 1 <= there <= format_version:
        raise CheckpointError(
            f"it has format version {str(there)[:40]} (written by {FORMAT} {str(library)[:40]}); this release reads "
            f"up to {format_version}. Update {FORMAT}."
        )
    return found


def check_manifest(manifest: Mapping[str, Any], names: frozenset[str]) -> None:
    """Check the part of a manifest that `packed` wrote.

    Args:
        manifest: as read.
        names: of the tensors that the checkpoint holds.

    Raises: CheckpointError: an entry is missing, or is not what it has to be; or tensors are there that nothing names.
    """
    model = _entry(manifest, "model", dict)
    for key in ("names", "optional"):
        _strings(_entry(model, key, list, "model"), f"model.{key}")
    for name, shape in _entry(model, "full", dict, "model").items():
        check_shape(shape, f"model.full.{name}")
    for key in ("attributes", "states"):
        _entry(model, key, dict, "model")
    used = [PREFIX + name for name in model["names"]]
    if len(set(used)) < len(used):
        _bad("model.names", "names a tensor twice")
    for place, skeleton in _skeletons(manifest, model):
        used += named_tensors(skeleton, place)
    lost, idle = set(used) - names, names - set(used)
    if lost:
        _bad("manifest", f"names the tensor '{min(lost)}', which is not there")
    if idle:
        _bad("manifest", f"names nothing that the tensor '{min(idle)}' would be part of")


def check_saved(manifest: Mapping[str, Any]) -> None:
    """Refuse to write what could not be read again.

    Raises: CheckpointError: values are nested too deeply.
    """
    try:
        check_depth(manifest)
    except ValueError as error:
        raise CheckpointError(f"what is to be saved is {error}: give flatter values.") from error


def check_shape(value: object, place: str) -> tuple[int, ...]:
    """Return a shape: a list of sizes, none of them negative.

    Raises: CheckpointError: it is none.
    """
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < _LARGEST for n in value):
        _bad(place, f"is {str(value)[:60]}, not the shape of a tensor")
    return tuple(value)


def _skeletons(manifest: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (place, skeleton) of all that `unpack` is going to read, checking what is around it."""
    for name, attributes in model["attributes"].items():
        if not isinstance(attributes, dict):
            _bad(f"model.attributes.{name}", "is no table of attributes")
    yield "model.attributes", model["attributes"]
    yield "model.states", model["states"]
    for i, optimizer in enumerate(_entry(manifest, "optimizers", list, optional=True) or ()):
        yield from _of_optimizer(optimizer, f"optimizers.{i}")
        for j, inner in enumerate(_entry(optimizer, "wrapped", list) if "wrapped" in optimizer else ()):
            yield from _of_optimizer(inner, f"optimizers.{i}.wrapped.{j}")
    apoptosis = _entry(manifest, "apoptosis", dict, optional=True)
    if apoptosis is not None:
        yield "apoptosis", _entry(apoptosis, "state", dict, "apoptosis")
    yield "extra", _entry(manifest, "extra", dict)


def _of_optimizer(optimizer: object, place: str) -> Iterator[tuple[str, Any]]:
    _entry(optimizer, "class", str, place)
    for j, group in enumerate(_entry(optimizer, "groups", list, place)):
        _strings(_entry(group, "parameters", list, f"{place}.groups.{j}"), f"{place}.groups.{j}.parameters")
        yield f"{place}.groups.{j}.settings", _entry(group, "settings", dict, f"{place}.groups.{j}")
    for name, state in _entry(optimizer, "state", dict, place).items():
        if not isinstance(state, dict):
            _bad(f"{place}.state.{name}", "is no table of state")
        yield f"{place}.state.{name}", state


def _entry(values: object, key: str, kind: type[Any], place: str = "", *, optional: bool = False) -> Any:
    """Return an entry of the right type; None where it may be null."""
    where = f"{place}.{key}".lstrip(".")
    if not isinstance(values, dict):
        _bad(place or "manifest", "is no table of entries")
    if key not in values:
        _bad(where, "is missing")
    found = values[key]
    if not (isinstance(found, kind) or (optional and found is None)):
        _bad(where, f"is {str(found)[:60]}, not of type {kind.__name__}")
    return found


def _strings(values: list[Any], place: str) -> None:
    if not all(isinstance(value, str) for value in values):
        _bad(place, "holds something else than names")


def _bad(place: str, what: str) -> NoReturn:
    raise CheckpointError(f"its manifest is damaged: {' '.join(place.split())[:120]} {' '.join(what.split())[:160]}.")


Check = Callable[[Mapping[str, Any], Shapes], None]
"""What a reader calls with the manifest and the shapes by name, before it reads a tensor."""
