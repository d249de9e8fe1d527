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
from apoptosis.tools.recipes.datasets.parts import Part

ByteArray = npt.NDArray[np.uint8]

_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# The publisher's own repository: its former address answers on http alone.
_FASHION_URL = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
_IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_IDX_MD5 = {
    "mnist": (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fashion-mnist": (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
}
IDX_SOURCES = {
    name: tuple(
        Source(
            filename=file,
            url=(_MNIST_URL if name == "mnist" else _FASHION_URL) + file,
            checksum=f"md5:{_IDX_MD5[name][i]}",
        )
        for i, file in enumerate(_IDX_FILES)
    )
    for name in _IDX_MD5
}
CIFAR_SOURCES = {
    "cifar10": Source(
        filename="cifar-10-binary.tar.gz",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        checksum="md5:c32a1d4ab5d03f1284b67883e8d87530",
    ),
    "cifar100": Source(
        filename="cifar-100-binary.tar.gz",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        checksum="md5:03b5dce01913d631647c71ecec9e9cb8",
    ),
}
_CIFAR_FOLDER = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
_CIFAR_TRAIN = {"cifar10": tuple(f"data_batch_{k}.bin" for k in range(1, 6)), "cifar100": ("train.bin",)}
_CIFAR_TEST = {"cifar10": "test_batch.bin", "cifar100": "test.bin"}
_PIXELS = 3 * 32 * 32
_MOST_BYTES = 2**31


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


def load_idx(name: str, data_dir: Path) -> tuple[Part, Part]:
    """Training and test part of "mnist" or "fashion-mnist" from DIR/name/*.gz or DIR/*.gz, downloaded when absent.

    Raises: DataError: a file is missing, damaged, or does not fit the others; the message names it.
    """
    paths = [obtain(source, (data_dir / name, data_dir)) for source in IDX_SOURCES[name]]
    parts = []
    for images_path, labels_path in (paths[:2], paths[2:]):
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if len(images) != len(labels):
            raise DataError(f"'{images_path}' holds {len(images)} images, '{labels_path}' {len(labels)} labels.")
        parts.append(_part(images[:, None], labels, 10, labels_path))
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


def load_cifar(name: str, data_dir: Path) -> tuple[Part, Part]:
    """Training and test part of "cifar10" or "cifar100", binary version, from its folder or its archive.

    Raises: DataError: a file is missing, cut off, or holds a label out of range; the message names it.
    """
    folder_name = _CIFAR_FOLDER[name]
    files = (*_CIFAR_TRAIN[name], _CIFAR_TEST[name])
    folder = find(folder_name, (data_dir, data_dir / name))
    if folder is None:
        archive = obtain(CIFAR_SOURCES[name], (data_dir, data_dir / name))
        folder = _unpack(archive, data_dir / folder_name, files)
    label_bytes, num_classes = (1, 10) if name == "cifar10" else (2, 100)
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
