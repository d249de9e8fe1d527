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
DAMAGES = (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError, RecursionError)
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
    except DAMAGES as error:
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


_TREE, _SHAPE = object(), object()  # what tree.pack returns for a mapping; a list of sizes
# Types of entries. [x]: a list of x; {"*": x}: a table of x by name; a key that ends in "?": may be null or left out.
_OPTIMIZER: dict[str, Any] = {
    "class": str,
    "groups": [{"parameters": [str], "settings": _TREE}],
    "state": {"*": _TREE},
}
_MANIFEST = {
    "model": {
        "names": [str],
        "optional": [str],
        "full": {"*": _SHAPE},
        "attributes": {"*": _TREE},
        "states": _TREE,
        "emptied?": _TREE,
    },
    "optimizers?": [{**_OPTIMIZER, "wrapped?": [_OPTIMIZER]}],
    "apoptosis?": {"state": _TREE},
    "extra": _TREE,
}


def check_manifest(manifest: Mapping[str, Any], names: frozenset[str]) -> None:
    """Check the part of a manifest that `packed` wrote.

    Args:
        manifest: as read.
        names: of the tensors that the checkpoint holds.

    Raises: CheckpointError: an entry is missing, or is not what it has to be; or tensors are there that nothing names.
    """
    used = set(_checked(manifest, _MANIFEST, ""))
    own = [PREFIX + name for name in manifest["model"]["names"]]
    if len(set(own)) < len(own):
        _bad("model.names", "names a tensor twice")
    lost, idle = (used | set(own)) - names, names - used - set(own)
    if lost:
        _bad("manifest", f"names the tensor '{min(lost)}', which is not there")
    if idle:
        _bad("manifest", f"names nothing that the tensor '{min(idle)}' would be part of")


def check_schema(value: Any, expected: Any) -> None:
    """Check the types of entries against a table of them, see `_MANIFEST`. Raises: CheckpointError: one is another."""
    for _ in _checked(value, expected, ""):
        pass


def _checked(value: Any, expected: Any, place: str) -> Iterator[str]:
    """Check the type of an entry and of all in it; yield the names of the tensors in it."""
    if expected is _SHAPE:
        check_shape(value, place)
        return
    kind: Any = expected if isinstance(expected, type) else list if isinstance(expected, list) else dict
    if not isinstance(value, kind):
        _bad(place or "manifest", f"is {str(value)[:60]}, not of type {kind.__name__}")
    if expected is _TREE:
        yield from named_tensors(value, place)
    elif isinstance(expected, list):
        for i, item in enumerate(value):
            yield from _checked(item, expected[0], f"{place}.{i}")
    elif isinstance(expected, dict):
        for key, inner in (dict.fromkeys(value, expected["*"]) if "*" in expected else expected).items():
            name = key if "*" in expected else key.removesuffix("?")
            if name not in value and name == key:
                _bad(f"{place}.{name}".lstrip("."), "is missing")
            if name == key or value.get(name) is not None:
                yield from _checked(value[name], inner, f"{place}.{name}".lstrip("."))


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


def _bad(place: str, what: str) -> NoReturn:
    raise CheckpointError(f"its manifest is damaged: {' '.join(place.split())[:120]} {' '.join(what.split())[:160]}.")


Check = Callable[[Mapping[str, Any], Shapes], None]
"""What a reader calls with the manifest and the shapes by name, before it reads a tensor."""
