"""Where a publisher's file lies, and how it gets there.

Holds: addresses, published checksums, downloads. Elsewhere: file formats.
A file that is there already is used whatever its checksum (people re-pack); only downloads are checked.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apoptosis.errors import DataError
from apoptosis.storage.files import check_regular, reason, replacing


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file of a publisher. checksum: "md5:..." or "sha256:..." of the file as published."""

    filename: str
    url: str
    checksum: str


def default_data_dir() -> Path:
    """Where data lie when `--data-dir` is not given: $APOPTOSIS_DATA, else the user's cache folder."""
    given = os.environ.get("APOPTOSIS_DATA")
    return Path(given) if given else cache_dir()


def cache_dir() -> Path:
    """Return the user's cache folder for data: below $XDG_CACHE_HOME or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "torch-apoptosis"


def find(name: str, folders: Sequence[Path]) -> Path | None:
    """Return the path of `name` in the first of `folders` that holds it; None where none does."""
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def obtain(source: Source, folders: Sequence[Path]) -> Path:
    """Return the path of a source file: where it lies among `folders`, else downloaded into the first of them.

    Raises: DataError: it is nowhere and the download failed or arrived with another checksum.
    """
    path = find(source.filename, folders) or download(source, folders[0])
    try:
        check_regular(path)
    except OSError as error:
        raise DataError(reason(error)) from error
    return path


def download(source: Source, folder: Path) -> Path:
    """Download one file into `folder`, checked against the published checksum; nothing is left behind on failure.

    Several processes may do so at once: each has a file of its own until it is whole.

    Raises: DataError: no connection, an error of the server, a full disk, or another checksum.
    """
    import pooch

    kind, _, expected = source.checksum.partition(":")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / source.filename) as partial:
            pooch.HTTPDownloader(timeout=30)(source.url, str(partial), None)
            found = pooch.file_hash(str(partial), alg=kind)
            if found != expected:
                raise ValueError(f"what came has another hash, {kind}:{found}, than {source.checksum}")
    except (OSError, ValueError) as error:
        raise DataError(
            f"'{source.filename}' is not in '{folder}' and could not be downloaded from {source.url}: "
            f"{reason(error)[:200]}. Place the publisher's file there, or name its folder with --data-dir."
        ) from error
    return folder / source.filename
