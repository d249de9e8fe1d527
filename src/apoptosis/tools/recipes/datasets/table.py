"""A table of the user's own, `--data csv:FILE`: numbers, categories and dates, one column of which is predicted.

Holds: reading the file, and the three parts. Elsewhere: what kind a column is and what becomes of it (columns).
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from apoptosis.errors import ArgumentError, DataError
from apoptosis.storage.files import check_regular, reason
from apoptosis.tools.recipes.datasets.columns import Column, Encoder, column_of, is_missing
from apoptosis.tools.recipes.datasets.parts import Dataset, Kind, Part, first_rows, split_rows
from apoptosis.tools.recipes.memory import check_memory

Task = Literal["auto", "classification", "regression"]
DELIMITERS = ",;\t|"
FEW_NUMBERS = 20  # whole numbers of at most so many values are classes
MOST_CLASSES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A file's columns as text. lines: where in the file every row begins."""

    path: Path
    columns: dict[str, list[str]]
    lines: list[int]
    delimiter: str
    fingerprint: str


def load_table(
    path: Path,
    label: str | None,
    *,
    drop: Sequence[str] = (),
    task: Task = "auto",
    validation: float = 0.1,
    train_rows: int | None = None,
) -> Dataset:
    """Read a CSV file with a header, split it, and turn its columns into numbers by statistics of the training rows.

    Args:
        path: the file, UTF-8, may be gzipped; separated by commas, semicolons, tabs or bars, quoted where needed.
        label: the column to predict.
        drop: columns to leave out.
        task: "auto": text and few whole numbers are classes, other numbers are values.
        validation: share of the training rows that is held out.
        train_rows: how many of the others train; None: all.

    Raises: ArgumentError: no such column. DataError: the file is damaged or empty, a column is neither numbers nor
        categories, or there is nothing to learn; the message names column and line.
    """
    table = read_table(path)
    label = _known_label(table, label)
    notes: list[str] = []
    dropped = {_known(table, name, "--drop") for name in drop}
    if label in dropped:
        raise ArgumentError(f"--drop: '{label}' is the column that is to be predicted.")
    labelled = [row for row, text in enumerate(table.columns[label]) if not is_missing(text)]
    if len(labelled) < len(table.lines):
        notes.append(f"{len(table.lines) - len(labelled)} rows without a value in '{label}' are left out")
    kind, values, classes = _labels(table, label, labelled, task, notes)
    kept = [(name, [texts[row] for row in labelled]) for name, texts in table.columns.items()
            if name != label and name not in dropped]  # fmt: skip
    where = [table.lines[row] for row in labelled]
    columns = [column_of(str(path), name, texts, where, table.delimiter) for name, texts in kept]
    train, held_out, test = split_rows(values if kind == "classes" else None, len(labelled), validation)
    train = first_rows(train, train_rows)
    encoder = Encoder(columns, train, notes)
    if not encoder.num_features:
        raise DataError(f"'{path}': no column is left to predict '{label}' from: {'; '.join(notes)}.")
    check_memory(len(labelled) * encoder.num_features * 4, f"'{path}' as numbers ({encoder.num_features} features)")
    about: dict[str, Any] = {"label": label, "kind": kind, "classes": classes, "columns": encoder.about()}
    if kind == "values":
        values, spread = _standardised(values, train)
        about |= spread
    parts = [Part(inputs=encoder.encoded(rows), labels=values[rows]) for rows in (train, held_out, test)]
    return Dataset(
        name=path.name,
        shape=(encoder.num_features,),
        num_classes=len(classes) or 1,
        metric="accuracy" if kind == "classes" else "r2",
        train=parts[0],
        validation=parts[1],
        test=parts[2],
        kind=kind,
        notes=tuple(notes),
        fingerprint=table.fingerprint,
        about=about,
    )


def read_table(path: Path) -> Table:
    """Read a CSV file as text.

    Raises: DataError: missing, no UTF-8, no header, a row of another length; the message names the line.
    """
    raw = _bytes_of(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"'{path}', line {line}: not UTF-8; save the file as UTF-8.") from error
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(DELIMITERS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    begins = 1
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                if rows and len(row) != len(rows[0]):
                    raise DataError(
                        f"'{path}', line {begins}: {len(row)} values, and the header names {len(rows[0])} columns."
                    )
                rows.append([cell.strip() for cell in row])
                lines.append(begins)
            begins = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"'{path}', line {begins}: {error}.") from error
    if len(rows) < 2:
        raise DataError(f"'{path}' holds {'a header and no rows' if rows else 'nothing'}.")
    names = _header(path, rows[0])
    return Table(
        path=path,
        columns=dict(zip(names, map(list, zip(*rows[1:], strict=True)), strict=True)),
        lines=lines[1:],
        delimiter=delimiter,
        fingerprint=f"sha256:{hashlib.sha256(raw).hexdigest()}",
    )


def _bytes_of(path: Path) -> bytes:
    try:
        check_regular(path)
        check_memory(path.stat().st_size * 8, f"'{path}'")
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except FileNotFoundError as error:
        raise DataError(f"'{path}' does not exist: --data csv:FILE names a file, from '{Path.cwd()}'.") from error
    except (OSError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"'{path}' cannot be read: {reason(error)}.") from error


def _header(path: Path, names: list[str]) -> list[str]:
    """Return the names of all columns; one without is called by its number."""
    found = [name or f"column {number}" for number, name in enumerate(names, start=1)]
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise DataError(f"'{path}': the header names '{twice[0]}' more than once: give every column a name of its own.")
    if len(found) < 2:
        raise DataError(
            f"'{path}' has one column, '{found[0][:60]}': values are to be separated by commas, semicolons, tabs or |."
        )
    return found


def _known(table: Table, name: str, option: str) -> str:
    """Return the name of a column that was asked for.

    Raises: ArgumentError: there is none; names those that there are.
    """
    if name in table.columns:
        return name
    near = difflib.get_close_matches(name, table.columns, n=1)
    there = ", ".join(list(table.columns)[:20]) + (", ..." if len(table.columns) > 20 else "")
    meant = f"; did you mean '{near[0]}'?" if near else ""
    raise ArgumentError(f"{option}: '{table.path}' has no column '{name}'; there are {there}{meant}")


def _known_label(table: Table, label: str | None) -> str:
    if label is None:
        there = ", ".join(list(table.columns)[:20])
        raise ArgumentError(f"--label: say which column of '{table.path}' is to be predicted; there are {there}")
    return _known(table, label, "--label")


def _labels(
    table: Table, label: str, labelled: list[int], task: Task, notes: list[str]
) -> tuple[Kind, Tensor, list[str]]:
    """Return what the labels are, as numbers: (rows,), and the names of classes."""
    texts, where = [table.columns[label][row] for row in labelled], [table.lines[row] for row in labelled]
    name = f"'{table.path}': column '{label}'"
    if not texts:
        raise DataError(f"{name} has no values to learn from.")
    numbers: Column | None = None
    try:
        numbers = column_of(str(table.path), label, texts, where, table.delimiter)
    except DataError:
        if task == "regression":
            raise
    if numbers is not None and numbers.kind == "date":
        raise DataError(f"{name} holds dates, which are not predicted: give a number in their place.")
    numeric = numbers is not None and numbers.kind == "number" and numbers.numbers is not None
    distinct = sorted(set(texts))
    if task == "regression" and not numeric:
        raise DataError(f"{name} holds texts such as '{distinct[0][:40]}': regression predicts numbers.")
    if numeric and numbers is not None and numbers.numbers is not None:
        found = numbers.numbers
        whole = bool((found == found.round()).all())
        distinct = [f"{value:g}" for value in torch.unique(found).tolist()]
        few = whole and len(distinct) <= FEW_NUMBERS and len(texts) >= 5 * len(distinct)
        if task == "regression" or (task == "auto" and not few):
            if len(distinct) < 2:
                raise DataError(f"{name} has one value in all rows, {distinct[0]}: there is nothing to learn.")
            notes.append(f"'{label}' holds numbers, which are predicted as values (--task classification: as classes)")
            return "values", found, []
        labels = torch.unique(found, return_inverse=True)[1]
    else:
        number = {text: index for index, text in enumerate(distinct)}
        labels = torch.tensor([number[text] for text in texts], dtype=torch.int64, device="cpu")
    _check_classes(name, distinct, len(texts))
    shown = ", ".join(distinct[:8]) + (", ..." if len(distinct) > 8 else "")
    instead = " (--task regression: as values)" if numeric else ""
    notes.append(f"'{label}' is predicted as one of {len(distinct)} classes: {shown}{instead}")
    return "classes", labels, distinct


def _check_classes(name: str, distinct: Sequence[str], num_rows: int) -> None:
    if len(distinct) < 2:
        raise DataError(f"{name} has one class, '{distinct[0]}': there is nothing to learn.")
    if len(distinct) > MOST_CLASSES or len(distinct) > num_rows // 2:
        raise DataError(
            f"{name} holds {len(distinct)} different values in {num_rows} rows, too many for classes: name another "
            "column with --label, or --task regression where they are numbers."
        )


def _standardised(values: Tensor, train: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Return values with mean 0 and deviation 1 over the training rows, and these two."""
    own = values[train].to(torch.float64)
    mean, deviation = float(own.mean()), float(own.std(correction=0))
    deviation = deviation or 1.0
    return ((values - mean) / deviation).to(torch.float32), {"mean": mean, "deviation": deviation}
