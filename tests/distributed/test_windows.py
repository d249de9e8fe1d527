"""Runs that are broken off while a window is open go on to the same bits: real torchrun, Ctrl-C and SIGKILL."""

import os
import signal
import time
from pathlib import Path

import pytest

from distributed.launched import Launched
from distributed.test_launch import SMALL, STOPS, TRAIN, records, same_bits

# Windows are open after the steps 19 to 26, 29 to 36, 44 to 51 and 64 to 71; epochs end after 23, 46, 69 and 92.
FOUR = ("--epochs", "4")
SAVES = str(Path(__file__).with_name("saves.py"))


def finished(*program, cwd):
    run = Launched("torchrun", 2, *program, cwd=cwd)
    assert run.wait() == 0, run.told()
    return run


@pytest.mark.parametrize("validation", ["0.1", "0"])
def test_interrupted_and_killed_in_windows_it_comes_to_the_same_bits(tmp_path, validation):
    """The interrupt and the checkpoint of an epoch's end wait for the end of the window that they fall into."""
    more = [*FOUR, "--validation", validation]
    stopped = Launched("torchrun", 2, *STOPS, *more, "--out", "run", cwd=tmp_path, STOPS="21", STOP_PAUSE="0.05")
    assert stopped.until(21)
    stopped.interrupt()
    assert stopped.wait() != 0
    assert stopped.told().count("apoptosis: warning: interrupted while a window is open") == 1, stopped.told()
    assert len(stopped.lines()) == 1
    # On from step 27: killed in a window that an epoch's end lies in, started anew, killed when it is over
    again = Launched("torchrun", 2, "--max-restarts", "2", STOPS[0], "train", "--resume", "run", cwd=tmp_path,
                     STOPS="22;27", STOP_RANK="1")  # fmt: skip
    assert again.until(49 - 27)
    os.kill(again.stands, signal.SIGKILL)
    assert not again.until(54 - 27)
    os.kill(again.stands, signal.SIGKILL)
    assert again.wait() == 0, again.told()
    assert [run.get("resumed_at_step") for run in records(tmp_path / "run", "run")] == [None, 27, 27, 52]
    finished(*TRAIN, *more, "--out", "whole", cwd=tmp_path)
    same_bits(tmp_path / "run", tmp_path / "whole")
    events = [{e["step"]: e["groups"] for e in records(tmp_path / name, "event")} for name in ("run", "whole")]
    assert events[0] == events[1]
    assert len(events[0]) > 3


def test_a_second_interrupt_does_not_wait_for_the_window(tmp_path):
    """It saves where it stands; the window is opened anew."""
    stopped = Launched("torchrun", 2, *STOPS, *FOUR, "--out", "run", cwd=tmp_path, STOPS="21,24")
    assert stopped.until(21)
    stopped.interrupt()
    assert stopped.until(24)  # all have agreed on the first one at the end of the epoch
    time.sleep(2.5)  # sooner it would be taken for the first one, passed on by the launcher
    stopped.interrupt()
    assert stopped.wait() != 0
    assert len(stopped.lines()) == 1, stopped.told()
    finished("-m", "apoptosis.cli", "train", "--resume", "run", cwd=tmp_path)
    assert [run.get("resumed_at_step") for run in records(tmp_path / "run", "run")] == [None, 24]


def saved(folder, longest):
    """(step, epochs done, whether a window is open) of every checkpoint, where epochs have 5 steps and windows 8."""
    folder.mkdir()
    program = [SAVES, longest, "train", *SMALL, "--train-rows", "320", "--epochs", "20", "--quiet", "--out", "run"]
    told = finished(*program, cwd=folder).out.read_text().splitlines()
    return [(int(w[1]), int(w[2]), w[3] == "True") for line in told if (w := line.split())[0] == "saved"]


def test_a_checkpoint_is_put_off_over_several_epochs_but_not_for_ever(tmp_path):
    waits, hurries = saved(tmp_path / "waits", "600"), saved(tmp_path / "hurries", "0")
    assert not any(watching for _, _, watching in waits)
    assert waits[-1][:2] == hurries[-1][:2] == (100, 20)
    assert any(step % 5 for step, _, _ in waits)  # as soon as the window is over
    assert all(done == step // 5 for step, done, _ in (*waits, *hurries))
    assert len({step // 5 for step, _, _ in waits}) < 20
    late = [step for step, _, watching in hurries if watching]
    assert late
    assert not any(step % 5 for step in late)
