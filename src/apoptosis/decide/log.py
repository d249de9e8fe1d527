"""The run's memory: an append-only JSONL log and its reader.

Holds: one line per record, written at once and read back strictly. Elsewhere: what the records mean
(`report` reads them, the command and the engine write them).

File format, version 1: the first line is `{"kind": "schema", "format": "apoptosis-events", "version": 1}`; every other
line is an object with `kind` (str), `time` (seconds since the epoch, UTC) and the fields of that kind.
JSON here is strict: NaN and the infinities, for which JSON has no spelling, are written as null and read as None.
A process that dies while it writes leaves at most one unfinished last line; the reader leaves it out and the next
writer removes it. Everything else that is not as described is one error with the line number.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from apoptosis.errors import ApoptosisError, ArgumentError, DataError
from apoptosis.storage.files import check_regular
from apoptosis.storage.plain_json import parse

FORMAT = "apoptosis-events"
VERSION = 1
RESERVED = frozenset({"kind", "time"})

_HEADER = json.dumps({"kind": "schema", "format": FORMAT, "version": VERSION}).encode() + b"\n"


class EventLog:
    """An append-only log; every `append` is one line, complete on disk or absent.

    Args:
        path: the file; created with its schema line when absent or empty, else checked and continued: an unfinished
            last line is removed, a log of another format or a newer version is refused.

    Raises: DataError: the file is not a log this version can continue. OSError: the file cannot be opened.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "events.jsonl"
        >>> with EventLog(path) as log:
        ...     log.append("epoch", epoch=1, loss=float("nan"))
        >>> [(r["kind"], r["epoch"], r["loss"]) for r in read_events(path)]
        [('epoch', 1, None)]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        tail = _unfinished(self.path)
        self._fd: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if tail.cut is not None:
            os.ftruncate(self._fd, tail.cut)
        if os.fstat(self._fd).st_size == 0:
            self._write(_HEADER)
        elif tail.newline_missing:
            self._write(b"\n")

    def append(self, kind: str, /, **fields: Any) -> None:
        """Write one record.

        Args:
            kind: what the record is ("run", "epoch", "event", "ledger", "summary" ...); not empty, not "schema".
            fields: JSON values; also mappings (keys become strings), sequences, dataclasses, paths, numpy scalars and
                arrays, and tensors (as nested lists). Not finite numbers become null.

        Raises: ArgumentError: a reserved name, or a value with no JSON form; the log is closed. Nothing is written.
        """
        if not kind or kind == "schema":
            raise ArgumentError(f"event log '{self.path}': kind {kind!r} is reserved; name the record's own kind")
        if clash := RESERVED & fields.keys():
            raise ArgumentError(f"event log '{self.path}': field {min(clash)!r} is reserved; rename it")
        record = {"kind": kind, "time": round(time.time(), 3)} | {k: to_json(v, k) for k, v in fields.items()}
        self._write(json.dumps(record, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _write(self, line: bytes) -> None:
        """One unbuffered write; a write cut short (disk full) is taken back, so that no half line is left inside."""
        if self._fd is None:
            raise ArgumentError(f"event log '{self.path}' is closed; open it again to append")
        before = os.fstat(self._fd).st_size
        try:
            written = os.write(self._fd, line)
        except OSError as error:
            raise OSError(f"event log '{self.path}': {error.strerror or error}; what was logged stays") from error
        if written != len(line):
            os.ftruncate(self._fd, before)
            raise OSError(f"event log '{self.path}': wrote {written} of {len(line)} bytes; is the disk full?")


def to_json(value: Any, name: str = "value") -> Any:
    """Turn a value into plain JSON types, strictly: not finite numbers become None.

    Args: value: see `EventLog.append`. name: how errors call it.
    Returns: None, bool, int, float, str, list or dict of these.
    Raises: ArgumentError: no JSON form; the message names the place inside the value.

    Example:
        >>> to_json({"widths": (4, 2), 7: float("inf"), "where": Path("a")})
        {'widths': [4, 2], '7': None, 'where': 'a'}
    """
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {_key(k, name): to_json(v, f"{name}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        return {k: to_json(getattr(value, k), f"{name}.{k}") for k in names}
    if hasattr(value, "tolist"):  # numpy scalars and arrays, tensors
        return to_json(value.tolist(), name)
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes | bytearray):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [to_json(v, f"{name}[{i}]") for i, v in enumerate(items)]
    raise ArgumentError(f"event log: {name} is a {type(value).__name__}, which has no JSON form; give plain values")


def read_events(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Every record of a log, in order, without the schema line.

    Args: path: the log. An empty file, or one with nothing but an unfinished line, is an empty log.
    Returns: one dict per record, with `kind` and `time` and the record's fields.
    Raises: DataError: missing or unreadable file, another format, a newer version, or a line (not the unfinished last
        one) that is not an object with a kind; the message has the line number.
    """
    records: list[dict[str, Any]] = []
    data = _bytes(Path(path))
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        last = number == len(lines)  # without its newline: unfinished unless it parses (or nothing at all)
        if last and not _is_object(line):
            if number == 1 and not _HEADER.startswith(line):
                raise DataError(f"{path}:1: not an apoptosis event log; choose another file")
            break
        record = _parse(line, f"{path}:{number}")
        if number == 1:
            _check_header(record, path)
        elif not isinstance(record.get("kind"), str) or record["kind"] == "schema":
            raise DataError(f"{path}:{number}: a record without a proper 'kind'; the log was edited or is damaged")
        else:
            records.append(record)
    return records


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Tail:
    """What a continued file needs: `cut`, the size to truncate to, or a newline."""

    cut: int | None = None
    newline_missing: bool = False


def _unfinished(path: Path) -> _Tail:
    if not path.exists():
        return _Tail()
    data = _bytes(path)
    head, newline, _ = data.partition(b"\n")
    if newline or _is_object(head):
        _check_header(_parse(head, f"{path}:1"), path)
    elif not _HEADER.startswith(head):  # an unfinished first line may be cut, but never somebody else's file
        raise DataError(f"{path}:1: not an apoptosis event log; choose another run folder")
    last = data[data.rfind(b"\n") + 1 :]
    if not last:
        return _Tail()
    return _Tail(newline_missing=True) if _is_object(last) else _Tail(cut=len(data) - len(last))


def _bytes(path: Path) -> bytes:
    try:
        check_regular(path)
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"'{path}': no event log there; give the folder of a run") from None
    except OSError as error:
        raise DataError(f"'{path}': the event log cannot be read ({error.strerror or error})") from None


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = parse(line)
    except ValueError as error:
        reason = "empty line" if not line.strip() else getattr(error, "msg", None) or str(error)
        raise DataError(f"{where}: not a JSON object ({reason}); the log is damaged") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: not a JSON object (a {type(record).__name__}); the log is damaged")
    return record


def _is_object(line: bytes) -> bool:
    """Whether a line is complete: an object closes itself, so no strict prefix of one parses."""
    try:
        _parse(line, "")
    except ApoptosisError:
        return False
    return True


def _check_header(record: dict[str, Any], path: str | os.PathLike[str]) -> None:
    if record.get("kind") != "schema" or record.get("format") != FORMAT:
        raise DataError(f"{path}:1: not an apoptosis event log (no schema line); choose another file")
    version = record.get("version")
    if not isinstance(version, int) or version < 1:
        raise DataError(f"{path}:1: schema version {version!r} is not a number from 1 on; the log is damaged")
    if version > VERSION:
        raise DataError(f"{path}:1: schema version {version}, this library reads up to {VERSION}; update the library")


def _key(key: object, name: str) -> str:
    if isinstance(key, str | int) and not isinstance(key, bool):
        return str(key)
    raise ArgumentError(f"event log: {name} has a key of type {type(key).__name__}; use strings")
