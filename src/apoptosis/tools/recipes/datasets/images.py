"""Image files as their publishers lay them out: MNIST's idx format and the binary version of CIFAR.

Holds: reading and checking those formats. Elsewhere: splits, batches.
References: LeCun, Cortes, Burges, "The MNIST database of handwritten digits"; Xiao, Rasul, Vollgraf,
arXiv 1708.07747 (Fashion-MNIST); Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

from __future__ import annotations

import gzip
import math
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from apoptosis.errors import DataError
from apoptosis.storage.files import check_regular, placing_folder, reason
from apoptosis.tools.recipes.datasets.fetch import Source, find, obtain
from apoptosis.tools.recipes.datasets.parts import Part, Recipe

ByteArray = npt.NDArray[np.uint8]

_IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_PIXELS = 3 * 32 * 32
_MOST_BYTES = 2**31


def idx(name: str, url: str, *md5: str, num_classes: int = 10) -> Recipe:
    """Return a data set in MNIST's format.

    Args:
        name: of the data set, and of a folder in which its files may lie.
        url: of the folder that holds the four files.
        md5: their published checksums, in MNIST's order.
        num_classes: labels are below it.
    """
    sources = tuple(
        Source(filename=file, url=url + file, checksum=f"md5:{own}") for file, own in zip(_IDX_FILES, md5, strict=True)
    )

    def read(data_dir: Path, test_rows: int | None) -> tuple[Part, Part]:
        return load_idx(sources, num_classes, (data_dir / name, data_dir))

    return Recipe(name=name, read=read, num_classes=num_classes, sources=sources)


def cifar(
    name: str,
    folder: str,
    url: str,
    md5: str,
    *,
    files: Sequence[str],
    label_bytes: int = 1,
    num_classes: int = 10,
) -> Recipe:
    """Return a data set in the binary format of CIFAR.

    Args:
        name: of the data set.
        folder: in the publisher's archive.
        url: of the archive.
        md5: its published checksum.
        files: in the folder, the test split last.
        label_bytes: before each image, of which the last counts.
        num_classes: labels are below it.
    """
    source = Source(filename=url.rpartition("/")[2], url=url, checksum=f"md5:{md5}")

    def read(data_dir: Path, test_rows: int | None) -> tuple[Part, Part]:
        found = find(folder, (data_dir, data_dir / name))
        if found is None:
            found = _unpack(obtain(source, (data_dir, data_dir / name)), data_dir / folder, files)
        return load_cifar(found, files, label_bytes, num_classes)

    return Recipe(name=name, read=read, num_classes=num_classes, sources=(source,))


def read_idx(path: Path, num_dims: int) -> ByteArray:
    """Read one gzipped idx file of unsigned bytes.

    Args:
        path: the .gz file.
        num_dims: 3 for images, 1 for labels; must be what the file's magic number says.

    Returns: the array, of `num_dims` dimensions.
    Raises: DataError: cut off, not gzip, another magic number, or another number of bytes than its header says.
    """
    magic = bytes((0, 0, 8, num_dims))
    header = 4 + 4 * num_dims
    try:
        with gzip.open(path, "rb") as stream:
            raw = stream.read(header)
            shape = tuple(int.from_bytes(raw[4 * k : 4 * k + 4], "big") for k in range(1, num_dims + 1))
            expected = math.prod(shape)
            if len(raw) == header and raw[:4] == magic and expected <= _MOST_BYTES:
                raw += stream.read(expected + 1)  # a byte more than announced is enough to know
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"'{path}' is cut off or not a gzip file ({error}). Fetch it again.") from error
    if raw[:4] != magic or len(raw) < header:
        raise DataError(f"'{path}' is not an idx file: it begins with {raw[:4].hex() or 'nothing'}, not {magic.hex()}.")
    if expected > _MOST_BYTES:
        raise DataError(f"'{path}' announces images of shape {shape}, more than any data set of this kind holds.")
    if len(raw) - header != expected or expected == 0:
        held = len(raw) - header
        more = "more than " if held > expected else ""
        raise DataError(
            f"'{path}' holds {more}{min(held, expected)} bytes of data, its header {shape} announces {expected}."
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def load_idx(sources: Sequence[Source], num_classes: int, folders: Sequence[Path]) -> tuple[Part, Part]:
    """Training and test part from the files of MNIST's format, downloaded into the first folder when absent.

    Raises: DataError: a file is missing, damaged, or does not fit the others; the message names it.
    """
    paths = [obtain(source, folders) for source in sources]
    parts = []
    for images_path, labels_path in (paths[:2], paths[2:]):
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if len(images) != len(labels):
            raise DataError(f"'{images_path}' holds {len(images)} images, '{labels_path}' {len(labels)} labels.")
        parts.append(_part(images[:, None], labels, num_classes, labels_path))
    if parts[0].inputs.shape[1:] != parts[1].inputs.shape[1:]:
        raise DataError(f"'{paths[0]}' and '{paths[2]}' hold images of different sizes.")
    return parts[0], parts[1]


def read_cifar(path: Path, label_bytes: int, num_classes: int) -> Part:
    """Read one binary CIFAR file: per record, `label_bytes` labels (the last one counts), then 3072 pixels, RGB planes.

    Raises: DataError: not a whole number of records, or a label out of range.
    """
    try:
        check_regular(path)
    except OSError as error:
        raise DataError(reason(error)) from error
    raw = np.fromfile(path, np.uint8)
    record = label_bytes + _PIXELS
    if raw.size == 0 or raw.size % record:
        raise DataError(f"'{path}' holds {raw.size} bytes, not a whole number of records of {record}: it is cut off.")
    table = raw.reshape(-1, record)
    images = np.ascontiguousarray(table[:, label_bytes:]).reshape(-1, 3, 32, 32)
    return _part(images, table[:, label_bytes - 1], num_classes, path)


def load_cifar(folder: Path, files: Sequence[str], label_bytes: int, num_classes: int) -> tuple[Part, Part]:
    """Training and test part from a folder of CIFAR's binary files, the last of which is the test split.

    Raises: DataError: a file is missing, cut off, or holds a label out of range; the message names it.
    """
    for file in files:
        if not (folder / file).exists():
            raise DataError(f"'{folder / file}' is missing. Remove '{folder}' to have it fetched again.")
    parts = [read_cifar(folder / file, label_bytes, num_classes) for file in files]
    train = Part(
        inputs=torch.cat([part.inputs for part in parts[:-1]]), labels=torch.cat([part.labels for part in parts[:-1]])
    )
    return train, parts[-1]


def _unpack(archive: Path, folder: Path, files: Sequence[str]) -> Path:
    """Take the named files, and nothing else, out of a publisher's archive; the folder appears whole or not at all.

    Several processes may do so at once: each fills a folder of its own, and the first that is done is kept.
    """
    try:
        with placing_folder(folder) as partial, tarfile.open(archive, "r:gz") as tar:
            for file in files:
                stream = tar.extractfile(f"{folder.name}/{file}")
                if stream is None:
                    raise DataError(f"'{archive}': '{file}' is not a plain file.")
                with stream, (partial / file).open("wb") as out:
                    shutil.copyfileobj(stream, out)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, KeyError) as error:
        raise DataError(
            f"'{archive}' is cut off or not the binary version ({reason(error)}). Fetch it again."
        ) from error
    return folder


def _part(images: ByteArray, labels: ByteArray, num_classes: int, path: Path) -> Part:
    if labels.max() >= num_classes:
        raise DataError(f"'{path}' holds the label {labels.max()}; labels are 0 to {num_classes - 1}.")
    return Part(inputs=torch.from_numpy(images.copy()), labels=torch.from_numpy(labels.astype(np.int64)))
