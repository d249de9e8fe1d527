"""The event log: what is written is what is read, whatever happened in between."""

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apoptosis.decide.log import EventLog, read_events, to_json
from apoptosis.errors import ArgumentError, DataError
from distributed.launched import ran

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def null_for_not_finite(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [null_for_not_finite(v) for v in value]
    if isinstance(value, dict):
        return {k: null_for_not_finite(v) for k, v in value.items()}
    return value


@pytest.fixture
def path(tmp_path):
    return tmp_path / "events.jsonl"


@given(records=st.lists(JSON, max_size=5))
@settings(max_examples=60, deadline=None)
def test_what_is_appended_is_read_back(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    with EventLog(path) as log:
        for value in records:
            log.append("any", value=value)
    assert [r["value"] for r in read_events(path)] == [null_for_not_finite(v) for v in records]
    assert all(r["kind"] == "any" and r["time"] > 1e9 for r in read_events(path))


def test_first_line_names_format_and_version_and_every_line_is_strict_json(path):
    with EventLog(path) as log:
        log.append("epoch", loss=float("nan"), high=float("inf"), text="line\nbreak ü")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"kind": "schema", "format": "apoptosis-events", "version": 1}
    assert len(lines) == 2
    assert "NaN" not in lines[1]
    assert "Infinity" not in lines[1]
    (record,) = read_events(path)
    assert record["loss"] is None
    assert record["high"] is None
    assert record["text"] == "line\nbreak ü"


@dataclasses.dataclass(frozen=True)
class Sample:
    where: Path
    widths: tuple[int, ...]


def test_values_of_the_scientific_stack_have_a_json_form(path):
    with EventLog(path) as log:
        log.append(
            "event",
            a=np.float32(0.5),
            b=np.int64(3),
            c=torch.tensor(2),
            d=torch.tensor([1.0, float("nan")]),
            e=Sample(Path("x"), (4, 2)),
            f={1: np.bool_(True)},
            g={"b", "a"},
        )
    (r,) = read_events(path)
    assert (r["a"], r["b"], r["c"], r["d"]) == (0.5, 3, 2, [1.0, None])
    assert r["e"] == {"where": "x", "widths": [4, 2]}
    assert r["f"] == {"1": True}
    assert r["g"] == ["a", "b"]


@pytest.mark.parametrize(
    ("value", "named"),
    [({"a": [1, object()]}, r"value\.a\[1\]"), (b"bytes", "value"), ({(1, 2): 3}, "tuple"), (lambda: 0, "value")],
)
def test_what_has_no_json_form_is_refused_by_name_and_nothing_is_written(path, value, named):
    with EventLog(path) as log:
        log.append("run", a=1)
        size = path.stat().st_size
        with pytest.raises(ArgumentError, match=named):
            log.append("run", value=value)
    assert path.stat().st_size == size
    with pytest.raises(ArgumentError):
        to_json(value)


@pytest.mark.parametrize(("kind", "fields"), [("", {}), ("schema", {}), ("run", {"time": 1}), ("run", {"kind": "x"})])
def test_reserved_names_are_refused(path, kind, fields):
    with EventLog(path) as log, pytest.raises(ArgumentError, match="reserved"):
        log.append(kind, **fields)
    assert read_events(path) == []


def test_a_closed_log_refuses_and_closing_twice_is_fine(path):
    log = EventLog(path)
    log.close()
    log.close()
    with pytest.raises(ArgumentError, match="closed"):
        log.append("run")


def test_a_log_cut_at_any_byte_reads_as_its_whole_lines_and_can_be_continued(path, tmp_path):
    with EventLog(path) as log:
        for i in range(3):
            log.append("epoch", epoch=i, text="üé{}")
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        cut = tmp_path / "cut.jsonl"
        cut.write_bytes(whole[:size])
        # An object closes itself, so a line that lacks only its newline is whole.
        num_whole = sum(end - 1 <= size for end in ends)
        expected = list(range(max(num_whole - 1, 0)))
        assert [r["epoch"] for r in read_events(cut)] == expected
        with EventLog(cut) as log:
            log.append("epoch", epoch=99)
        assert [r["epoch"] for r in read_events(cut)] == [*expected, 99]
        assert cut.read_bytes().endswith(b"\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"kind": "epoch", "loss"', r":3: not a JSON object"),
        (b'{"kind": "epoch", "loss": NaN}', r":3: .*NaN"),
        (b"[1, 2]", r":3: .*list"),
        (b"", r":3: .*empty line"),
        (b'{"loss": 1}', r":3: .*'kind'"),
        (b'{"kind": 5}', r":3: .*'kind'"),
        (b'{"kind": "schema", "format": "apoptosis-events", "version": 1}', r":3: .*'kind'"),
        (b"\xff\xfe", r":3: not a JSON object"),
    ],
)
def test_damage_inside_the_log_is_one_error_with_its_line(path, line, message):
    with EventLog(path) as log:
        log.append("run", a=1)
    with path.open("ab") as file:
        file.write(line + b"\n" + b'{"kind": "run", "time": 1}\n')
    with pytest.raises(DataError, match=message) as caught:
        read_events(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "run"}\n', "no schema line"),
        ('{"kind": "schema", "format": "other", "version": 1}\n', "no schema line"),
        ('{"kind": "schema", "format": "apoptosis-events", "version": 2}\n', "update the library"),
        ('{"kind": "schema", "format": "apoptosis-events", "version": "1"}\n', "damaged"),
        ("dear diary\n", ":1: not a JSON object"),
    ],
)
def test_foreign_and_newer_files_are_refused_by_reader_and_writer_and_left_alone(path, text, message):
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_events(path)
    with pytest.raises(DataError, match=message):
        EventLog(path)
    assert path.read_text() == text


def test_a_foreign_file_without_a_newline_is_not_truncated(path):
    path.write_text("precious")
    with pytest.raises(DataError, match="not an apoptosis event log"):
        EventLog(path)
    assert path.read_text() == "precious"


def test_missing_log_and_folder_in_its_place(path):
    with pytest.raises(DataError, match="no event log"):
        read_events(path)
    path.mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_events(path)


def test_records_are_on_disk_when_append_returns(path, tmp_path):
    code = (
        "import os, sys; from apoptosis.decide.log import EventLog; "
        "log = EventLog(sys.argv[1]); log.append('epoch', epoch=7); os._exit(9)"
    )
    done = ran(code, os.fspath(path), cwd=tmp_path)
    assert done.wait() == 9, done.told()
    assert [r["epoch"] for r in read_events(path)] == [7]


def test_a_write_that_the_disk_cuts_short_is_taken_back(path, tmp_path):
    with EventLog(path) as log:
        log.append("epoch", epoch=1)
    code = (
        "import resource, sys; from apoptosis.decide.log import EventLog; log = EventLog(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))\n"
        "try: log.append('epoch', epoch=2)\n"
        "except OSError as error: sys.exit(7 if 'disk' in str(error) else 1)"
    )
    before = path.read_bytes()
    done = ran(code, os.fspath(path), str(len(before) + 10), cwd=tmp_path)
    assert done.wait() == 7, done.told()
    assert path.read_bytes() == before
