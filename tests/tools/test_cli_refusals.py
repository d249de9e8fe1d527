"""Bad input, too little of the machine, and output that is closed: one line, and nothing lost."""

import json
import os
import resource
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from apoptosis.storage.plain_json import MAX_DEPTH
from apoptosis.tools.cli.app import run
from distributed.launched import ran

TINY = ["--train-rows", "1500", "--widths", "16,16", "--batch", "32", "--epochs", "1", "--no-apoptosis", "--quiet"]


NUMBERS = {
    "--train-rows": int,
    "--test-rows": int,
    "--validation": float,
    "--dropout": float,
    "--epochs": int,
    "--batch": int,
    "--lr": float,
    "--weight-decay": float,
    "--seed": int,
    "--threads": int,
    "--tolerance": float,
    "--budget": float,
    "--probe-rows": int,
    "--align": int,
    "--calibration": float,
}


@pytest.mark.parametrize("option", NUMBERS)
def test_numbers_out_of_range(here, refusal, option):
    bad = ["-1", "x", ""] if NUMBERS[option] is int else ["nan", "inf", "-inf", "-1", "1e400", "x", ""]
    if NUMBERS[option] is int:
        bad += ["1.5", "nan", str(10**30)]
    for value in bad:
        refusal(["train", option, value], option)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--widths", "999999999,999999999"], " GiB at once, or a limit (ulimit -v, -u) forbids more: lower --widths"),
        (["--widths", str(10**30)], "--widths"),
        (["--threads", "100000"], "--threads"),
        (["--out", ""], "--out"),
        (["--out", "  "], "names no file or folder"),
        (["--out", "a\0b"], "names no file or folder"),
        (["--resume", ""], "--resume"),
        (["--data", "fashion-mnst"], "did you mean fashion-mnist?"),
        (["--network", "mpl"], "did you mean mlp?"),
        (["--data", "x" * 5000], "--data"),
        (["--data", "mnist", "--data-dir", "file"], "file"),
    ],
)
def test_train_says_what_is_wrong_in_one_line(here, refusal, arguments, what):
    (here / "file").write_text("")
    refusal(["train", *arguments], what)
    assert [p.name for p in here.iterdir() if p.name != "runs"] == ["file"]
    assert not (here / "runs").exists() or not list((here / "runs").iterdir())


def test_resume_and_out_together(here, refusal):
    refusal(["train", "--resume", "one", "--out", "two"], "continues in its own folder, 'one'; leave --out out")


@pytest.mark.parametrize("kind", ["deep", "list", "text", "binary", "pipe", "folder", "number", "empty"])
def test_configurations_that_are_none(here, refusal, kind):
    folder = here / "run"
    folder.mkdir()
    path = folder / "config.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        deep = "[" * 100_000 + "]" * 100_000
        texts = {"deep": deep, "list": "[1]", "text": "hello", "number": '{"lr": 1e999}', "empty": ""}
        path.write_bytes(b"\xff\x00\xfe" if kind == "binary" else texts[kind].encode())
    for command in (["train", "--resume", "run"], ["plan", "run"]):
        refusal(command, "config.json" if kind != "number" else "--lr")
    assert [p.name for p in folder.iterdir()] == ["config.json"]


def test_a_run_without_a_first_checkpoint_is_resumed_or_taken_anew(here, capsys, refusal):
    assert run(["train", *TINY, "--out", "one"]) == 0
    for name in ("last.safetensors", "summary.json"):
        (here / "one" / name).unlink()
    log = (here / "one" / "events.jsonl").read_text()
    capsys.readouterr()
    assert run(["train", "--resume", "one", "--quiet"]) == 0
    assert "'one' holds no checkpoint yet: the run starts again" in capsys.readouterr().out
    assert (here / "one" / "events.jsonl").read_text().startswith(log)  # what was logged stays
    refusal(["train", *TINY, "--out", "one"], "'one' holds a run already")
    for name in ("last.safetensors", "summary.json"):
        (here / "one" / name).unlink()
    assert run(["train", *TINY, "--seed", "1", "--out", "one"]) == 0
    assert json.loads((here / "one" / "config.json").read_text())["seed"] == 1
    (here / "one" / "config.json").chmod(0o600)
    assert run(["train", "--resume", "one", "--quiet"]) == 0
    assert (here / "one" / "config.json").stat().st_mode & 0o777 == 0o600
    assert run(["report", "one"]) == 0
    capsys.readouterr()
    assert not [p for p in (here / "one").rglob("*") if p.suffix == ".tmp"]


def test_two_processes_do_not_write_one_run(here, capsys, refusal):
    assert run(["train", *TINY, "--out", "one"]) == 0
    fcntl = pytest.importorskip("fcntl")
    capsys.readouterr()
    with (here / "one" / "events.jsonl").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refusal(["train", "--resume", "one", "--quiet"], "'one' is being written by another process")
    assert run(["train", "--resume", "one", "--quiet"]) == 0


def test_result_files_that_could_not_be_written_are_refused_before_anything_runs(here, refusal):
    os.mkfifo(here / "pipe")
    (here / "folder").mkdir()
    for command in (["compare", *TINY[:-2]], ["plan", "folder"], ["inspect", "a:b"]):
        for path, what in (
            ("pipe", "named pipe"),
            ("folder", "folder"),
            ("no/such.json", "there is no folder"),
            ("", ""),
        ):
            refusal([*command, "--json", path], what)
    assert {p.name for p in here.iterdir()} == {"pipe", "folder"}


def test_json_of_inspect_that_is_too_deep(here, refusal):
    deep = '{"a":' * 5000 + "1" + "}" * 5000
    refusal(["inspect", "json:dumps", "--kwargs", deep], f"deeper than {MAX_DEPTH}")


@contextmanager
def small_files(size):
    """No file may grow beyond so many bytes: a disk that is full. pytest's own output may be a file, so not longer."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_full_disk_is_one_line_and_what_was_there_stays(here, capsys, size, refusal):
    assert run(["train", *TINY, "--out", "one"]) == 0
    before = (here / "one" / "last.safetensors").read_bytes()
    capsys.readouterr()
    with small_files(size):
        refusal(["train", *TINY, "--out", "two"], "two")
        refusal(["train", "--resume", "one", "--quiet"], "one")
        refusal(["report", "one"], "one")
    assert (here / "one" / "last.safetensors").read_bytes() == before
    assert not [p for p in here.rglob("*.tmp")]


def test_output_that_nobody_reads_ends_the_run_with_a_line_of_its_own(here, capfd, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        status = run(["train", *TINY[:-1], "--epochs", "2", "--out", "one"])
        monkeypatch.undo()
    assert status == 141
    err = capfd.readouterr().err
    assert err.startswith("apoptosis: error: the output was closed")
    assert err.count("\n") == 1
    os.chdir(here)
    assert (here / "one" / "config.json").exists()


LIMITED = """
import resource, sys
from apoptosis.tools.cli.app import run
limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(run(sys.argv[2:]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_limit_on_memory_is_one_line(here):
    done = ran(LIMITED, "60", "train", *TINY, "--widths", "4000,4000", "--out", "one", cwd=here)
    assert done.wait() == 2, done.told()
    assert done.told().startswith("apoptosis: error: "), done.told()
    assert done.told().count("\n") == 1, done.told()
    assert "memory" in done.told()


def test_threads_that_cannot_be_started_are_one_line(here, refusal, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    refusal(["train", *TINY, "--tensorboard", "--out", "one"], "ulimit -v, -u")


BEGUN = """
import os, signal, sys
class Meets:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Meets())
from apoptosis.tools.cli import main
main(["--help"])
"""
SMALL = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]) * 2**20,) * 2); "
SMALL += "from apoptosis.tools.cli import main; main(['--help'])"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and signals of Linux")
@pytest.mark.parametrize(
    ("code", "arguments", "status", "text"),
    [
        (BEGUN, [], 130, "interrupted while the libraries were loaded"),
        (SMALL, ["150"], 2, "there is not enough memory to load the libraries"),  # too little for numpy
        (
            SMALL,
            ["400"],
            2,
            "there is not enough memory to load the libraries",
        ),  # torch would end the process by itself
        (SMALL, ["600"], 2, "there is not enough memory to load the libraries"),  # too little for torch
    ],
)
def test_what_keeps_torch_from_being_loaded_is_one_line(here, code, arguments, status, text):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    given = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(given, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert done.returncode == status, done.stderr
    assert done.stderr == f"apoptosis: error: {text}{done.stderr.partition(text)[2]}"
    assert done.stderr.count("\n") == 1
