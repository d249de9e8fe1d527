"""Logs that no run would write: a page or one line of an error, and no script in it."""

import copy
import json
import os
import random

import pytest

from apoptosis.decide.log import EventLog
from apoptosis.errors import ApoptosisError, DataError
from apoptosis.tools.cli.app import run as command
from apoptosis.tools.report import figures, write_report
from apoptosis.tools.report.figures import shown_name
from tools.test_report import Page, whole_run

HEADER = b'{"kind": "schema", "format": "apoptosis-events", "version": 1}\n'
NAMES = (
    "$$", "$x_$", "\\frac", "%s %d", "_stem", "__", "<script>alert(1)</script>", "two\nlines", "x" * 5000,
    "\u202eabc", "\u05d0\u05d1", "\u4e2d\u6587", "\U0001f389" * 30, "\ud800", "\x00\x1b[31m", "", "a & b \"c\" 'd'",
)  # fmt: skip
VALUES = (
    None, -1, 0, 10**400, 1e308, -1e308, 1e-320, 1e999, "x", [], {}, True, [[1]], [None, None], ["a", "b"], [1, 2, 3],
    {"a": {"b": [1]}}, [{"value": "x"}], [{"value": 1}], {"x": 1e300}, 3.5, [1e308, -5], *NAMES,
)  # fmt: skip


def write(folder, lines):
    folder.mkdir(exist_ok=True)
    text = "\n".join(json.dumps(line) for line in lines) + "\n"
    (folder / "events.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    folder = whole_run(tmp_path_factory.mktemp("runs") / "base", (0, 1))
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_groups_of_any_name_are_drawn_and_escaped(lines, tmp_path):
    named = copy.deepcopy(lines)
    for line in named:
        if line["kind"] == "epoch":
            line["widths"] = dict.fromkeys(NAMES, 4)
            line["metric_name"] = "$$<script>"
        if line["kind"] == "event":
            line["groups"] = {name: [8, 4] for name in NAMES}
            line["reason"] = line["measured_on"] = "<script>$$"
            line["certificates"][0]["subject"] = "$$<script>"
    page = write_report(write(tmp_path / "$$ <script> \u05d0", named)).read_text(encoding="utf-8")
    assert "<script" not in page.lower()
    found = Page(page)
    assert len(found.labels) == 5
    assert "$x_$" in found.text("events")
    assert (tmp_path / "$$ <script> \u05d0" / "plots" / "widths.png").stat().st_size > 1000


@pytest.mark.parametrize("name", NAMES)
def test_names_in_plots_are_one_short_line_that_is_not_left_out(name):
    shown = shown_name(name)
    assert len(shown) <= 41
    assert shown.isprintable()
    assert not shown.startswith("_")


def places(value, path=()):
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


def altered(lines, rng, where):
    found = copy.deepcopy(lines)
    for _ in range(rng.choice((1, 3, 6))):
        *path, last = rng.choice(where)
        at = found
        try:
            for key in path:
                at = at[key]
            kind = rng.random()
            if kind < 0.15:
                del at[last]
            elif kind < 0.3 and isinstance(at, dict):
                at[rng.choice(NAMES)] = at.pop(last)
            else:
                at[last] = rng.choice(VALUES)
        except (KeyError, IndexError, TypeError):  # gone with an earlier change
            continue
    if rng.random() < 0.1:
        found[1:] = rng.sample(found[1:], len(found) - 1)
    return found


def test_any_place_of_a_log_may_hold_anything(lines, tmp_path, monkeypatch):
    """Everything but the rendering of the canvas, which takes most of the time and sees numbers and names alone."""

    monkeypatch.setattr(figures, "rendered", lambda _figures, _key: (b"x", ('<svg aria-hidden="true"></svg>',), ()))
    rng, pages = random.Random(0), 0
    where = [path for path in places(lines) if path[0] > 0]
    for _ in range(25):
        folder = write(tmp_path / "run", altered(lines, rng, where))
        try:
            page = write_report(folder).read_text(encoding="utf-8")
        except ApoptosisError as error:
            text = str(error)
        else:
            text = ""
            pages += 1
            assert "<script" not in page.lower()
            Page(page)
        assert "\n" not in text
    assert pages > 8


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\x7fELF\x00\x01\x02" * 100, "not an apoptosis event log|not a JSON object"),
        (b"\xff\xfe{\x00", "not"),
        (b'{"kind": "schema", "format": "apoptosis-events", "version": 99}\n', "update the library"),
        (b'{"kind": "schema", "format": "apoptosis-events", "version": "1"}\n', "damaged"),
        (HEADER + b"[" * 100_000 + b"\n{}\n", "deeper than"),
        (HEADER + b'{"kind": {}}\n', "without a proper 'kind'"),
        (HEADER + b"[1]\n", "a list"),
        (HEADER + b'{"kind": "epoch", "n": ' + b"9" * 9999 + b"}\n", "4300"),
    ],
)  # fmt: skip
def test_files_that_are_no_logs(tmp_path, capsys, content, text):
    (tmp_path / "events.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=text) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert command(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["events.jsonl"]


def test_a_pipe_in_the_place_of_the_log_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "events.jsonl")
    with pytest.raises(DataError, match="named pipe"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="named pipe"):
        EventLog(tmp_path / "events.jsonl")


def test_a_page_keeps_its_permissions(lines, tmp_path):
    folder = write(tmp_path / "run", lines[:2])
    page = write_report(folder)
    page.chmod(0o600)
    assert write_report(folder).stat().st_mode & 0o777 == 0o600
    assert not list(folder.rglob("*.tmp"))
