"""HIGGS: one comma-separated, gzipped file of a label and 28 features per row, 11 million rows as published.

Holds: its conversion, once and in bounded memory, to a float32 array that is mapped from disk; its test split.
Elsewhere: batches. Reference: Baldi, Sadowski, Whiteson, Nature Communications 5, 4308 (2014).
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch

from apoptosis.errors import DataError
from apoptosis.storage.files import check_regular, reason, replacing
from apoptosis.tools.recipes.datasets.fetch import Source, cache_dir, obtain
from apoptosis.tools.recipes.datasets.parts import Part, Recipe

SOURCE = Source(
    filename="HIGGS.csv.gz",
    url="https://archive.ics.uci.edu/ml/machine-learning-databases/00280/HIGGS.csv.gz",
    checksum="sha256:ea302c18164d4e3d916a1e2e83a9a8d07069fa6ebc7771e4c0540d54e593b698",
)
NUM_COLUMNS = 29
FULL_TEST_ROWS = 500_000
SMALL_TEST_ROWS = 10_000
SMALL_FILE_ROWS = 1_000_000
_CHUNK_BYTES = 8 * 2**20


def convert(source: Path, target: Path) -> None:
    """Write the rows of a HIGGS.csv.gz as one float32 .npy array (rows, 29), label first.

    Memory is bounded by one chunk of text (8 MiB), whatever the file's size. The target appears whole or not at all.

    Raises: DataError: cut off, not gzip, a row with another number of columns, a value that is no finite number,
        a label other than 0 and 1, or no row at all; the message names the line.
    """
    try:
        with replacing(target) as partial, partial.open("wb") as out:
            num_rows = 0
            _write_header(out, num_rows)
            length = out.tell()
            with gzip.open(source, "rb") as stream:
                while lines := stream.readlines(_CHUNK_BYTES):
                    rows = _parse(lines, source, num_rows)
                    out.write(rows.tobytes())
                    num_rows += len(rows)
            if num_rows == 0:
                raise DataError(f"'{source}' holds no row.")
            out.seek(0)
            _write_header(out, num_rows)
            if out.tell() != length:
                raise DataError(f"'{target}': numpy changed the length of its header; please report this.")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"'{source}' is cut off or not a gzip file ({error}). Fetch it again.") from error


def load_higgs(data_dir: Path, test_rows: int | None = None) -> tuple[Part, Part]:
    """Training and test part from DIR/higgs/HIGGS.csv.gz or DIR/HIGGS.csv.gz; the last `test_rows` rows are the test.

    Args:
        data_dir: where the file lies or is downloaded to. The converted array goes into the same folder, or where that
            is not writable into the user's cache folder.
        test_rows: None for the publisher's 500,000, or 10,000 where the file has fewer than a million rows.

    Raises: DataError: as `convert`; or fewer rows than test_rows + 1.
    """
    source = obtain(SOURCE, (data_dir / "higgs", data_dir))
    target = _array_path(source)
    if not target.exists():
        convert(source, target)
    table = _mapped(target)
    num_rows = len(table)
    if test_rows is None:
        test_rows = FULL_TEST_ROWS if num_rows >= SMALL_FILE_ROWS else SMALL_TEST_ROWS
    if not 0 < test_rows < num_rows:
        raise DataError(
            f"'{source}' holds {num_rows} rows; {test_rows} of them cannot be the test set: see --test-rows."
        )
    rows = torch.from_numpy(table)
    part = Part(inputs=rows[:, 1:], labels=rows[:, 0].to(torch.int64))
    return part.rows(0, num_rows - test_rows), part.rows(num_rows - test_rows, num_rows)


def _mapped(path: Path) -> npt.NDArray[np.float32]:
    """Map a converted array from disk.

    Raises: DataError: it is none.
    """
    try:
        check_regular(path)
        # Copy-on-write: torch wants a writable array, the file must stay as it is.
        table: npt.NDArray[np.float32] = np.load(path, mmap_mode="c", allow_pickle=False)
        if table.ndim != 2 or table.shape[1] != NUM_COLUMNS or table.dtype != np.float32:
            raise ValueError(f"an array of {table.dtype} {table.shape}")
    except Exception as error:  # numpy reads the header as a Python literal, and what that raises may be anything
        raise DataError(f"'{path}' is damaged ({reason(error)[:120]}). Remove it to have it made again.") from error
    return table


def _array_path(source: Path) -> Path:
    """Where the array of this very file lies: a gzip file ends with the checksum of its contents, so that names it."""
    with source.open("rb") as stream:
        stream.seek(max(0, source.stat().st_size - 8))
        trailer = stream.read(8).hex()
    name = f"HIGGS-{trailer}.npy"
    if (source.parent / name).exists() or _writable(source.parent):
        return source.parent / name
    cache = cache_dir() / "higgs"
    cache.mkdir(parents=True, exist_ok=True)
    return cache / name


def _writable(folder: Path) -> bool:
    # The superuser may write anywhere; a folder without write permission for anyone is left as it is all the same.
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


def _write_header(out: IO[bytes], num_rows: int) -> None:
    # numpy pads the header so that the first dimension may grow in place.
    np.lib.format.write_array_header_1_0(
        out, {"shape": (num_rows, NUM_COLUMNS), "fortran_order": False, "descr": "<f4"}
    )


def _parse(lines: list[bytes], source: Path, first_row: int) -> npt.NDArray[np.float32]:
    """One chunk of text as an array (rows, 29); the numbers are checked here."""
    try:
        rows = np.loadtxt(io.BytesIO(b"".join(lines)), dtype=np.float32, delimiter=",", comments=None, ndmin=2)
    except ValueError as error:
        raise DataError(f"'{source}', {_first_bad_line(lines, first_row)}.") from error
    if len(rows) != len(lines) or rows.shape[1] != NUM_COLUMNS:
        raise DataError(f"'{source}', {_first_bad_line(lines, first_row)}.")
    good = np.isfinite(rows).all(1) & ((rows[:, 0] == 0) | (rows[:, 0] == 1))
    if not good.all():
        line = int(np.argmin(good))
        what = "a label other than 0 and 1" if np.isfinite(rows[line]).all() else "a value that is not finite"
        raise DataError(f"'{source}', line {first_row + line + 1}: {what}.")
    return rows


def _first_bad_line(lines: list[bytes], first_row: int) -> str:
    for number, line in enumerate(lines, first_row + 1):
        fields = line.strip().split(b",")
        if len(fields) != NUM_COLUMNS:
            return f"line {number}: {len(fields) if line.strip() else 0} columns, not {NUM_COLUMNS}"
        for field in fields:
            try:
                float(field)
            except ValueError:
                return f"line {number}: {field[:20].decode('latin-1')!r} is not a number"
    return f"lines {first_row + 1} to {first_row + len(lines)}: not a table of numbers"


RECIPE = Recipe(name="higgs", read=load_higgs, num_classes=2, metric="auc", sources=(SOURCE,), takes_test_rows=True)
