"""Columns of a table as numbers: what kind a column is, and what becomes of its values.

Holds: numbers (missing ones become the mean, and a column of their own says so), dates as days, categories as one
column each. Statistics are those of the training rows. Elsewhere: reading the file (table).
"""

from __future__ import annotations

import datetime
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from apoptosis.errors import DataError

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "-"})
MOSTLY = 0.9  # of a column's values are numbers, or dates: then the others are mistakes
MOST_CATEGORIES = 100
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_COMMA = re.compile(r"[+-]?\d+,\d+")
_ISO = re.compile(r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?")
_DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}(?:[T ].*)?|\d{1,2}[ -][A-Za-z]{3,9}[ -]\d{2,4}")
_DAY = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Column:
    """A column as read. numbers: (rows,) float64, NaN where missing; None for categories, which texts holds.

    note: what the user should know of how it was read.
    """

    name: str
    kind: Literal["number", "date", "category"]
    texts: Sequence[str]
    numbers: Tensor | None = None
    note: str = ""


def is_missing(text: str) -> bool:
    """Whether a value stands for none.

    Example:
        >>> [is_missing(text) for text in ("", "NA", "?", "0", "no")]
        [True, True, True, False, False]
    """
    return text.lower() in MISSING


def column_of(path: str, name: str, texts: Sequence[str], lines: Sequence[int], delimiter: str = ",") -> Column:
    """Tell what kind a column is, by all of its values.

    Args: path, name: for messages. lines: of the file, for every value. delimiter: with semicolons, 1,5 is a number.

    Raises: DataError: almost all values are numbers, or dates, and some are not; dates are written in a form that may
        be read in two ways; the line is named.
    """
    there = [row for row, text in enumerate(texts) if not is_missing(text)]
    note = ""
    if there and delimiter != "," and all(_NUMBER.fullmatch(texts[r]) or _COMMA.fullmatch(texts[r]) for r in there):
        if any("," in texts[row] for row in there):
            note = f"in '{name}' the comma is the decimal sign"
            texts = [text.replace(",", ".") for text in texts]
    for kind, pattern in (("number", _NUMBER), ("date", _ISO)):
        bad = [row for row in there if not pattern.fullmatch(texts[row])]
        if there and not bad:
            return _of_numbers(path, name, kind, texts, lines, note)
        if len(bad) < (1 - MOSTLY) * len(there):
            what = "a number" if kind == "number" else "a date such as 2024-05-31"
            raise DataError(
                f"'{path}', line {lines[bad[0]]}: '{texts[bad[0]][:40]}' in column '{name}' is not {what}, as "
                f"{len(there) - len(bad)} other values are ({len(bad)} are not): mend or empty it, or leave the column "
                f"out with --drop '{name}'."
            )
    if there and sum(bool(_DATE.fullmatch(texts[row])) for row in there) >= MOSTLY * len(there):
        raise DataError(
            f"'{path}', line {lines[there[0]]}: column '{name}' holds dates such as '{texts[there[0]][:40]}', which "
            f"may be read in more than one way: write 2024-05-31, or leave the column out with --drop '{name}'."
        )
    return Column(name=name, kind="category", texts=texts)


def _of_numbers(path: str, name: str, kind: str, texts: Sequence[str], lines: Sequence[int], note: str) -> Column:
    values = []
    for text, line in zip(texts, lines, strict=True):
        try:
            values.append(math.nan if is_missing(text) else float(text) if kind == "number" else _days(text))
        except ValueError as error:
            raise DataError(f"'{path}', line {line}: '{text[:40]}' in column '{name}' is no date ({error}).") from error
        if math.isinf(values[-1]) or abs(values[-1]) > 1e30:
            raise DataError(f"'{path}', line {line}: '{text[:40]}' in column '{name}' is too large a number.")
    numbers = torch.tensor(values, dtype=torch.float64, device="cpu")
    if kind == "date":
        return Column(name=name, kind="date", texts=texts, numbers=numbers,
                      note=f"dates in '{name}' are taken as a number of days")  # fmt: skip
    return Column(name=name, kind="number", texts=texts, numbers=numbers, note=note)


def _days(text: str) -> float:
    found = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    return found.replace(tzinfo=found.tzinfo or datetime.UTC).timestamp() / _DAY


class Encoder:
    """Turns columns into features, by the statistics of the training rows.

    A number becomes one feature of mean 0 and deviation 1, 0 where it is missing, and a second one that says so, where
    any training row lacks it. A category becomes one feature for each of its values among the training rows (missing
    is one of them), 1 in the rows that have it; a value that no training row has is 0 in all of them.

    Args:
        columns: as `column_of` returns them. train: indices of the training rows.
        notes: what the user should know is added.
    """

    def __init__(self, columns: Sequence[Column], train: Tensor, notes: list[str]) -> None:
        self._parts: list[tuple[Column, dict[str, Any]]] = []
        rows = train.tolist()
        for column in columns:
            found, why = self._numbers(column, train) if column.numbers is not None else self._texts(column, rows)
            if why:
                notes.append(f"column '{column.name}' is left out: {why}")
                continue
            self._parts.append((column, found))
            if column.note:
                notes.append(column.note)
        self.num_features = sum(self._width(found) for _, found in self._parts)

    @staticmethod
    def _numbers(column: Column, train: Tensor) -> tuple[dict[str, Any], str]:
        assert column.numbers is not None
        own = column.numbers[train]
        there = own[~own.isnan()]
        if not len(there):
            return {}, "it has no values in the training rows"
        mean, deviation = float(there.mean()), float(there.std(correction=0))
        gaps = len(there) < len(own)
        if deviation <= 1e-12 * (1 + abs(mean)) and not gaps:
            return {}, "it has the same value in all training rows"
        steps = column.numbers.diff()
        if column.kind == "number" and len(steps) > 2 and bool((steps == 1).all()):
            return {}, "it numbers the rows"
        return {"kind": column.kind, "mean": mean, "deviation": deviation or 1.0, "missing": gaps}, ""

    @staticmethod
    def _texts(column: Column, rows: list[int]) -> tuple[dict[str, Any], str]:
        counts = Counter("" if is_missing(column.texts[row]) else column.texts[row] for row in rows)
        if not counts.keys() - {""}:
            return {}, "it has no values in the training rows"
        if len(counts) < 2:
            return {}, "it has the same value in all training rows"
        if len(counts) > MOST_CATEGORIES or (len(counts) > len(rows) // 2 and len(rows) > 20):
            return {}, f"{len(counts)} different texts in {len(rows)} training rows are no categories"
        return {"kind": "category", "values": sorted(counts)}, ""

    @staticmethod
    def _width(found: dict[str, Any]) -> int:
        return len(found["values"]) if "values" in found else 1 + found["missing"]

    def about(self) -> dict[str, Any]:
        """Return what every column becomes, in the order of the features, as plain values."""
        return {column.name: found for column, found in self._parts}

    def encoded(self, rows: Tensor) -> Tensor:
        """Return (rows, features) float32."""
        features: list[Tensor] = []
        for column, found in self._parts:
            if column.numbers is not None:
                own = column.numbers[rows]
                features.append(((own - found["mean"]) / found["deviation"]).nan_to_num(0.0))
                if found["missing"]:
                    features.append(own.isnan().to(torch.float64))
                continue
            place = {value: number for number, value in enumerate(found["values"])}
            texts = (column.texts[row] for row in rows.tolist())
            code = [place.get("" if is_missing(text) else text, -1) for text in texts]
            codes = torch.tensor(code, dtype=torch.int64, device="cpu")
            features += [(codes == number).to(torch.float64) for number in range(len(place))]
        return torch.stack(features, 1).to(torch.float32)
