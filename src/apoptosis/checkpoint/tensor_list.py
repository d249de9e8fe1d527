"""The list of tensors that torch.distributed.checkpoint keeps in its folder, read as data.

Holds: reading that pickle without running anything, checking it against the files, and building torch's records
again. Elsewhere: the folder and its manifest (checkpoint/sharded.py).

The file `.metadata` is a pickle, which could call any function. Here every name in it is looked up in a short table
of plain records; torch then gets records of its own classes, built from numbers and names that were checked.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from apoptosis.errors import CheckpointError

_METADATA, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_LARGEST = 2**62


class _Holder:
    """Keeps what a pickle says of one record, as it stands."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, key: str) -> Any:
        """Return a field. Raises: KeyError, TypeError: there is none."""
        return self.state[key]


class _Tensor(_Holder):
    pass


_NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    **{(_METADATA, name): _Holder for name in ("Metadata", "BytesStorageMetadata", "ChunkStorageMetadata")},
    **{(_METADATA, name): _Holder for name in ("TensorProperties", "MetadataIndex", "StorageMeta")},
    (_METADATA, "TensorStorageMetadata"): _Tensor,
    (_METADATA, "_MEM_FORMAT_ENCODING"): int,
    (_FILES, "_StorageInfo"): _Holder,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _NAMES.get((module, name))
        if found is None and module.partition(".")[0] == "pathlib":
            return lambda *parts: "/".join(map(str, parts))
        if found is None and module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if found is None:
            raise CheckpointError(f"its list of tensors asks for {module[:80]}.{name[:80]}, which is no part of one")
        return found


class Tensors:
    """Sizes and types of the tensors of a folder, and torch's own record of where they lie.

    Attributes: shapes, dtypes: by name. metadata: for a reader of torch.distributed.checkpoint.
    """

    def __init__(self, raw: bytes, files: Mapping[str, int]) -> None:
        """Read the list.

        Args:
            raw: content of `.metadata`.
            files: sizes in bytes of the folder's files.

        Raises: CheckpointError: it is no such list, or contradicts itself or the files.
        """
        try:
            read = _Restricted(io.BytesIO(raw)).load()
            if not isinstance(read, _Holder):
                raise TypeError(f"it holds a {type(read).__name__}")
            entries, places = read.get("state_dict_metadata"), read.get("storage_data")
            self.shapes: dict[str, tuple[int, ...]] = {}
            self.dtypes: dict[str, torch.dtype] = {}
            self.metadata: Any = self._metadata(entries, places, files)
        except CheckpointError:
            raise
        except Exception as error:  # what a damaged pickle raises may be anything
            what = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise CheckpointError(f"its list of tensors cannot be read ({what})") from error

    def _metadata(self, entries: Any, places: Any, files: Mapping[str, int]) -> Any:
        from torch.distributed.checkpoint.metadata import (
            Metadata,
            StorageMeta,
            TensorProperties,
            TensorStorageMetadata,
        )

        stored = _places(places, files)
        listed: dict[str, Any] = {}
        for name, entry in entries.items():
            if not isinstance(name, str) or not isinstance(entry, _Tensor):
                raise CheckpointError(f"'{str(name)[:80]}' is no tensor in its list of tensors")
            properties = entry.get("properties").state
            dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"'{name}' has no type of numbers")
            size = _sizes(entry.get("size"))
            chunks = [_chunk(name, chunk, size, dtype, stored) for chunk in entry.get("chunks")]
            if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
                raise CheckpointError(f"the parts of '{name[:80]}' do not make up its shape {size}")
            self.shapes[name], self.dtypes[name] = size, dtype
            listed[name] = TensorStorageMetadata(
                properties=TensorProperties(dtype=dtype), size=torch.Size(size), chunks=chunks
            )
        return Metadata(
            state_dict_metadata=listed,
            planner_data={name: (name,) for name in listed},
            storage_data={index: info for index, info in stored.values()},
            storage_meta=StorageMeta(),
        )


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or not all(type(n) is int and 0 <= n < _LARGEST for n in value):
        raise TypeError(f"{str(value)[:60]} is no shape")
    return tuple(value)


def _places(places: Any, files: Mapping[str, int]) -> dict[tuple[str, tuple[int, ...]], tuple[Any, Any]]:
    """Return torch's records of where every part of a tensor lies, by (tensor, offset)."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import MetadataIndex

    found = {}
    for index, info in places.items():
        name, offset = index.get("fqn"), _sizes(index.get("offset"))
        path, start, length = (info.get(key) for key in ("relative_path", "offset", "length"))
        if not (isinstance(name, str) and isinstance(path, str) and type(start) is int and type(length) is int):
            raise TypeError("a part of a tensor lies nowhere")
        if info.state.get("transform_descriptors"):
            raise CheckpointError(f"a part of '{name[:80]}' is stored in a form that save_sharded does not write")
        if path not in files or start < 0 or length < 0 or start + length > files[path]:
            raise CheckpointError(
                f"a part of '{name[:80]}' lies outside of the file '{path[:80]}', which is cut off or gone"
            )
        found[name, offset] = (
            MetadataIndex(name, torch.Size(offset)),
            _StorageInfo(relative_path=path, offset=start, length=length),
        )
    return found


def _chunk(
    name: str, chunk: Any, size: Sequence[int], dtype: torch.dtype, stored: Mapping[Any, tuple[Any, Any]]
) -> Any:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    offsets, sizes = _sizes(chunk.get("offsets")), _sizes(chunk.get("sizes"))
    inside = len(offsets) == len(sizes) == len(size) and all(
        first + part <= whole for first, part, whole in zip(offsets, sizes, size, strict=True)
    )
    if not inside or (name, offsets) not in stored:
        raise CheckpointError(f"a part of '{name[:80]}' is missing or outside of its shape {tuple(size)}")
    if stored[name, offsets][1].length < math.prod(sizes) * dtype.itemsize:
        raise CheckpointError(f"'{name[:80]}' claims more numbers than its file holds")
    return ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
