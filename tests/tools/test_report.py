"""The report of synthetic runs: every figure of the page is the log's, and the page needs nothing else."""

import re
import struct
from html.parser import HTMLParser

import matplotlib as mpl
import pytest

from apoptosis.decide.log import EventLog, read_events
from apoptosis.display.text import short_number
from apoptosis.errors import ApoptosisError, DataError
from apoptosis.tools.report import read_run, write_report
from apoptosis.tools.report.words import metric_value, rounded
from distributed.launched import ran

PLOTS = ("widths", "size", "learning", "certificates", "time")
VOID = {"meta", "br", "link", "img", "hr", "input"}
STEPS = 100


class Page(HTMLParser):
    """Checks that tags nest and collects what the tests ask about."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.references, self.tags, self.labels, self.words = [], [], [], [], {}, []
        self.sections = {}
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs, closed=False):
        given = dict(attrs)
        self.tags.append(tag)
        if "id" in given:
            self.ids.append(given["id"])
        self.references += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "xlink:href", "action")]
        if tag == "svg":  # what stands around it has its words
            assert given["aria-hidden"] == "true"
        if given.get("role") == "img":
            self.labels[self.section] = given["aria-label"]
        if tag == "section":
            self.section = given["aria-labelledby"].removeprefix("h-")
            self.sections[self.section] = []
        if tag not in VOID and not closed:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs, closed=True)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)
            if self.sections and "section" in self.open:
                self.sections[self.section].append(data)

    def text(self, section=None):
        return " ".join(" ".join(self.sections[section] if section else self.words).split())


def epoch(log, method, number, width, *, seed=0, slower=1.0, **more):
    fields = {
        "method": method,
        "seed": seed,
        "epoch": number,
        "step": number * STEPS,
        "seconds": 2.5 * number * slower,
        "loss": 1.0 / number,
        "metric": 0.9 + 0.01 * number,
        "metric_name": "accuracy",
        "parameters": 10_000 * width,
        "macs": 9_000.0 * width,
        "widths": {"fc1": width, "fc2": 32},
    }
    log.append("epoch", **fields | more)


def event(log, step, before, after, *, seed=0, **more):
    fields = {
        "seed": seed,
        "step": step,
        "groups": {"fc1": (before, after)},
        "parameters": (10_000 * before, 10_000 * after),
        "macs": (9_000.0 * before, 9_000.0 * after),
        "seconds": 0.125,
        "certificates": [
            {
                "kind": "empirical",
                "subject": "fc2",
                "value": 0.0291,
                "rows": 900,
                "confidence": 1.0,
                "population": False,
            },
            {"kind": "accuracy", "subject": "outputs", "value": 0.00137, "confidence": 0.97, "population": True},
        ],
        "measured": {"output_rms": 0.0113, "flips": 0.000241, "margin_share": 0.0042},
        "measured_on": "on 4096 held-out probe rows",
        "rolled_back": False,
        "reason": "",
    }
    log.append("event", **fields | more)


def whole_run(folder, seeds=(0,), *, dense=True):
    folder.mkdir(exist_ok=True)
    with EventLog(folder / "events.jsonl") as log:
        config = {"data": "digits", "network": "mlp", "note": "<script>alert(1)</script>"}
        log.append("run", config=config, versions={"torch": "2.x"}, machine={"cores": 2})
        for seed in seeds:
            for number, width in ((1, 64), (2, 48), (3, 48)):
                if dense:
                    epoch(log, "dense", number, 64, seed=seed, slower=2.0)
                if number == 2:
                    event(log, 150, 64, 48, seed=seed)
                if number == 3:
                    event(log, 250, 48, 24, seed=seed, rolled_back=True, reason="beyond the budget")
                epoch(log, "apoptosis", number, width, seed=seed)
            log.append("attempt", seed=seed, step=300, outcome="nothing", cause="rows", reason="too few rows")
            log.append(
                "ledger", seed=seed, events=1, attempts=2, rolled_back=1, accuracy_cost=0.00731, site_cost={"fc2": 0.03}
            )
        log.append("summary", speed_up=2.0)
    return folder


def page_of(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return whole_run(tmp_path_factory.mktemp("runs") / "first run & <more>")


@pytest.fixture(scope="module")
def page(run):
    return page_of(run)


def test_all_figures_and_sections_are_there(page):
    assert list(page.labels) == list(PLOTS)
    assert list(page.sections) == [*PLOTS, "ledger", "events", "epochs", "config", "summary"]
    assert all(len(alt) > 40 for alt in page.labels.values())
    assert page.tags.count("figcaption") == len(PLOTS)
    assert page.tags.count("h1") == 1


def test_the_page_needs_nothing_else(run, page):
    text = (run / "report.html").read_text(encoding="utf-8")
    assert all(reference.startswith("#") for reference in page.references)
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
    assert "script" not in page.tags
    assert "first run &amp; &lt;more&gt;" in text


def test_ids_are_unique_and_every_reference_has_its_target(run, page):
    text = (run / "report.html").read_text(encoding="utf-8")
    assert len(page.ids) == len(set(page.ids))
    targets = {r.removeprefix("#") for r in page.references}
    targets |= set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'aria-labelledby="([^"]+)"', text))
    assert targets <= set(page.ids)


def test_plots_follow_the_theme_and_light_and_dark_are_defined(run):
    text = (run / "report.html").read_text(encoding="utf-8")
    used, (light, dark) = set(re.findall(r"var\(--([\w-]+)\)", text)), text.split("prefers-color-scheme:dark", 1)
    assert {"ink", "grid", "s0", "s1"} <= used
    for name in used:
        assert f"--{name}:" in light
        assert f"--{name}:" in dark
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        assert set(re.findall(r"(?:fill|stroke): (#\w+)", svg)) <= {"#ffffff"}


def test_tiles_tell_the_logs_figures(page):
    text = page.text()
    assert "2x faster" in text  # 15 s without, 7.5 s with
    assert "15 s without, 7.5 s with" in text
    assert "1.33x fewer" in text  # 64 to 48 channels
    assert "640k to 480k" in text
    assert "validation accuracy, with apoptosis 93.00 %" in text
    assert "1 event removed channels" in text
    assert "1 attempt was rolled back" in text


def test_tables_tell_the_logs_figures(run, page):
    for record in read_events(run / "events.jsonl"):
        if record["kind"] == "epoch":
            for key in ("step", "seconds", "loss", "parameters", "macs"):
                assert rounded(record[key]) in page.text("epochs")
            assert metric_value("accuracy", record["metric"]) in page.text("epochs")
        if record["kind"] == "event":
            assert all(rounded(v) in page.text("events") for v in record["measured"].values())
            assert all(rounded(c["value"]) in page.text("events") for c in record["certificates"])
            assert "fc1 {}→{}".format(*record["groups"]["fc1"]) in page.text("events")
            assert " → ".join(rounded(v) for v in record["parameters"]) in page.text("events")
    assert "rolled back: beyond the budget" in page.text("events")
    assert "nothing removed: too few rows" in page.text("events")
    assert "0.00731" in page.text("ledger")
    assert "<script>alert(1)</script>" in page.text("config")
    assert "speed_up" in page.text("summary")


def test_alt_texts_tell_ends_and_bounds(page):
    assert "fc1 from 64 to 48" in page.labels["widths"]
    assert "with apoptosis, parameters: from 640k to 480k" in page.labels["size"]
    assert "without, parameters: from 640k to 640k" in page.labels["size"]
    assert "accuracy: 2 certified, 2 measured, 2 of these at or below their bound" in page.labels["certificates"]
    assert "seed 0: 15 s without, 7.5 s with apoptosis" in page.labels["time"]


def test_png_files_are_images_of_a_size_to_read(run, page):
    assert sorted(p.name for p in (run / "plots").iterdir()) == sorted(f"{key}.png" for key in PLOTS)
    for path in (run / "plots").iterdir():
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", data[16:24])
        assert (width, height) > (1000, 400)
        assert len(data) > 8000


def test_an_event_falls_at_its_place_in_time(run):
    seconds, parameters = read_run(run).size_over_time("apoptosis", 0, "parameters")
    falls = [(t, a, b) for t, a, b in zip(seconds[1:], parameters, parameters[1:], strict=False) if a != b]
    assert falls == [(3.75, 640_000.0, 480_000.0)]  # step 150 of 100 steps in 2.5 s
    assert read_run(run).width_steps(0)["fc1"] == [(0.0, 64.0), (150.0, 48.0), (300.0, 48.0)]


def test_macs_of_events_are_counted_per_example_like_those_of_epochs(tmp_path):
    with EventLog(tmp_path / "events.jsonl") as log:
        epoch(log, "apoptosis", 1, 64)
        event(log, 150, 64, 48, macs=(4 * 9_000.0 * 64, 4 * 9_000.0 * 48))
        epoch(log, "apoptosis", 2, 48)
    _, macs = read_run(tmp_path).size_over_time("apoptosis", 0, "macs")
    assert sorted(set(macs)) == [9_000.0 * 48, 9_000.0 * 64]


def test_the_test_metric_is_the_summarys(tmp_path):
    folder = whole_run(tmp_path / "run")
    assert "validation accuracy, with apoptosis" in page_of(folder).text()
    with EventLog(folder / "events.jsonl") as log:
        overall = {"test_metric_dense": 0.98764, "test_metric_apoptosis": 0.98654, "speedup_run": 1.75}
        log.append("summary", overall=overall, runs=[{"events": ["shown above"], "macs_ratio": 3.5}])
    page = page_of(folder)
    assert "test accuracy, with apoptosis 98.65 %" in page.text()
    assert "test accuracy, without 98.76 %" in page.text()
    assert "1.75x faster" in page.text()
    assert "shown above" not in page.text("summary")
    assert "macs_ratio" in page.text("summary")


def test_an_unfinished_comparison_counts_the_epochs_that_both_have(tmp_path):
    folder = whole_run(tmp_path / "run")
    with EventLog(folder / "events.jsonl") as log:
        epoch(log, "dense", 4, 64, slower=99.0)
    assert "15 s without, 7.5 s with" in page_of(folder).text()


def test_a_dense_run_is_called_one(tmp_path):
    with EventLog(tmp_path / "events.jsonl") as log:
        epoch(log, "dense", 1, 64, widths={})
        log.append("ledger", seed=0, ledger={"events": 3}, text="first line\nsecond < line")
    page = page_of(tmp_path)
    assert "trained without apoptosis" in page.text()
    assert "first line second < line" in page.text("ledger")
    assert "no widths yet" in page.text("widths")


def test_several_seeds_are_averaged_and_named(tmp_path):
    page = page_of(whole_run(tmp_path / "run", seeds=(3, 4)))
    assert "over 2 seeds" in page.text()
    assert "2 events removed" in page.text()
    assert "seed 4: 15 s without" in page.labels["time"]
    assert "Shown is seed 3, one of 2." in page.text("widths")
    assert "Seed 4" in page.text("ledger")
    assert page.text("events").count("committed") == 2


def test_without_a_paired_run_the_page_says_so(tmp_path):
    page = page_of(whole_run(tmp_path / "run", dense=False))
    assert "time" not in page.labels
    assert "no paired run" in page.text("time")
    assert "faster" not in page.text()
    assert "1.33x fewer" in page.text()
    assert not (tmp_path / "run" / "plots" / "time.png").exists()
    assert (tmp_path / "run" / "plots" / "learning.png").exists()


def test_without_events_certificates_are_a_sentence(tmp_path):
    with EventLog(tmp_path / "events.jsonl") as log:
        log.append("run", config={"data": "digits"})
        epoch(log, "apoptosis", 1, 64)
    page = page_of(tmp_path)
    assert "There has been no event yet." in page.text("certificates")
    assert "There has been no event." in page.text("events")
    assert "no ledger" in page.text("ledger")
    assert "fc1 from 64 to 64" in page.labels["widths"]


def test_an_empty_log_is_a_page_of_sentences(tmp_path):
    EventLog(tmp_path / "events.jsonl").close()
    page = page_of(tmp_path)
    assert "The log is empty" in page.text()
    assert page.labels == {}
    assert all(page.text(section) for section in page.sections)
    assert list((tmp_path / "plots").iterdir()) == []


def test_odd_records_do_not_stop_the_page(tmp_path):
    with EventLog(tmp_path / "events.jsonl") as log:
        log.append("run")
        log.append("epoch", method="apoptosis", epoch=1, step=10, seconds=1.0, loss=float("nan"), metric=None)
        event(log, 5, 8, 4, certificates=None, measured=None, parameters=None, macs=None)
        event(log, 7, 4, 2, certificates=[{"kind": "empirical", "subject": "x", "value": float("inf")}], parameters=7)
        log.append("something-new", a=1)
    page = page_of(tmp_path)
    assert "fc1 from 8 to 2" in page.labels["widths"]
    assert "No event carries a certificate." in page.text("certificates")
    assert "–" in page.text("epochs")


def test_a_cut_off_last_line_is_left_out(tmp_path):
    folder = whole_run(tmp_path / "run")
    log = folder / "events.jsonl"
    log.write_bytes(log.read_bytes()[:-9])
    assert read_run(folder).summary is None
    page_of(folder)


def test_a_resumed_run_supersedes_what_it_repeats(tmp_path):
    with EventLog(tmp_path / "events.jsonl") as log:
        log.append("run", config={})
        epoch(log, "apoptosis", 1, 64)
        event(log, 150, 64, 48)
        epoch(log, "apoptosis", 2, 48, metric=0.1)
        event(log, 250, 48, 40)
        log.append("run", config={}, resumed=True)
        event(log, 150, 64, 48)
        epoch(log, "apoptosis", 2, 48, metric=0.2)
    run = read_run(tmp_path)
    assert [e["metric"] for e in run.curve("apoptosis").epochs] == [0.91, 0.2]
    assert [e["step"] for e in run.events[0]] == [150]


def test_a_run_resumed_at_a_step_keeps_what_came_before_it(tmp_path):
    with EventLog(tmp_path / "events.jsonl") as log:
        log.append("run", config={})
        event(log, 150, 64, 48)
        epoch(log, "apoptosis", 2, 48, metric=0.1)
        event(log, 250, 48, 40)
        event(log, 270, 40, 32)
        log.append("run", config={}, resumed_at_step=260)
        epoch(log, "apoptosis", 3, 32, metric=0.2)
    run = read_run(tmp_path)
    assert [e["step"] for e in run.events[0]] == [150, 250]
    assert [e["metric"] for e in run.curve("apoptosis").epochs] == [0.1, 0.2]


def test_page_and_plots_can_go_elsewhere_and_a_second_report_replaces_the_first(tmp_path):
    folder = whole_run(tmp_path / "run")
    out = write_report(folder, tmp_path / "page.html")
    assert out == tmp_path / "page.html"
    first = out.read_bytes()
    assert write_report(str(folder), str(out)).read_bytes() == first
    assert not (folder / "report.html").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"run", "page.html"}


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")])
def test_what_is_no_run_folder_is_one_line(tmp_path, make):
    make(tmp_path / "run")
    with pytest.raises(DataError, match="is not a run folder") as caught:
        write_report(tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_an_unwritable_page_is_one_line_and_leaves_nothing(tmp_path):
    folder = whole_run(tmp_path / "run")
    with pytest.raises(ApoptosisError, match="cannot be written"):
        write_report(folder, tmp_path / "no" / "such" / "folder.html")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ApoptosisError, match="cannot be written"):
        write_report(folder, tmp_path / "taken")
    assert {p.name for p in tmp_path.iterdir()} == {"run", "taken"}


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    before = dict(mpl.rcParams)
    write_report(whole_run(tmp_path / "run"))
    assert dict(mpl.rcParams) == before
    code = "import sys, apoptosis.tools.report as r; r.write_report(sys.argv[1]); "
    code += "sys.exit('matplotlib.pyplot' in sys.modules)"
    done = ran(code, str(tmp_path / "run"), cwd=tmp_path)
    assert done.wait() == 0, done.told()


def test_bounds_that_say_nothing_are_left_out_with_the_reason(tmp_path):
    nothing = [
        {"kind": "accuracy", "subject": "outputs", "value": 1.06, "confidence": 0.97, "population": True},
        {"kind": "empirical", "subject": "fc2", "value": 1.2, "rows": 9},
    ]
    with EventLog(tmp_path / "events.jsonl") as log:
        epoch(log, "apoptosis", 1, 64)
        event(log, 150, 64, 48, certificates=nothing)
        event(log, 160, 48, 40)
        sites = {"fc2:fc2.weight:1": 0.01, "q:w:0": 0.02, "q:v:0": 0.03}
        more = {"confidence": 0.95, "population": True, "goal": "", "notes": [], "site_cost": sites}
        log.append("ledger", seed=0, ledger={"events": 2, "accuracy_cost": 1.0, **more})
    page = page_of(tmp_path)
    assert "1.06" not in page.text()
    assert "no bound, too few probe rows" in page.text("events")
    assert "no bound at fc2" in page.text("events")
    assert "Left out are bounds that say nothing: 1 of kind accuracy (too few probe rows" in page.text("certificates")
    assert "accuracy: 1 certified, 1 measured" in page.labels["certificates"]
    assert "none can be given: too few probe rows" in page.text("ledger")
    for empty in ("confidence", "population", "size asked for", "notes"):
        assert empty not in page.text("ledger")
    assert "fc2: 0.01 q:w:0: 0.02 q:v:0: 0.03" in page.text("ledger")
    (tmp_path / "alone").mkdir()
    with EventLog(tmp_path / "alone" / "events.jsonl") as log:
        event(log, 150, 64, 48, certificates=nothing, measured={})
    page = page_of(tmp_path / "alone")
    assert "certificates" not in page.labels
    assert page.text("certificates").endswith("as large as the output itself).")


def test_units_are_per_example_in_older_logs_too(tmp_path):
    with EventLog(tmp_path / "events.jsonl") as log:
        epoch(log, "apoptosis", 1, 64)
        event(log, 150, 64, 48, macs=(4 * 9_000.0 * 64, 4 * 9_000.0 * 48))
        epoch(log, "apoptosis", 2, 48)
    assert "576,000 → 432,000" in page_of(tmp_path).text("events")
    assert "multiply-adds per example" in page_of(tmp_path).text("events")
    assert "example input" not in page_of(tmp_path).text()


def test_numbers_have_three_significant_digits(tmp_path):
    with EventLog(tmp_path / "events.jsonl") as log:
        epoch(log, "apoptosis", 1, 64, seconds=1234.5678, loss=0.123456)
        event(log, 150, 64, 48, seconds=0.0123456, measured={"output_rms": 0.0113777, "flips": 2.41234e-4})
    text = page_of(tmp_path).text()
    assert {"1,235", "0.123", "0.0123", "0.0114", "0.000241"} <= set(text.split())
    assert not re.search(r"[1-9]\d*\.\d{4}|\b0\.0*[1-9]\d{3}", text)
    assert "640,000 → 480,000" in text  # counts are counts


def test_validation_stands_beside_test_and_a_disagreement_is_said(tmp_path):
    folder = whole_run(tmp_path / "run")
    with EventLog(folder / "events.jsonl") as log:
        epoch(log, "dense", 4, 64, slower=2.0, metric=0.95)
        epoch(log, "apoptosis", 4, 48, metric=0.94)
        log.append("summary", overall={"test_metric_dense": 0.92, "test_metric_apoptosis": 0.93})
    text = page_of(folder).text()
    assert "test accuracy, with apoptosis 93.00 % validation 94.00 %, after the last epoch" in text
    assert "Test and validation disagree: accuracy is better with apoptosis on the test part" in text
    assert "worse with apoptosis on the validation part (94.00 % against 95.00 %)" in text
    with EventLog(folder / "events.jsonl") as log:
        log.append("summary", overall={"test_metric_dense": 0.93, "test_metric_apoptosis": 0.92})
    assert "disagree" not in page_of(folder).text()


@pytest.mark.parametrize(("value", "text"), [(0.97, "0.97"), (9999, "9999"), (10_000, "10k"), (2_913_290, "2.91M")])
def test_short_numbers(value, text):
    assert short_number(value) == text
