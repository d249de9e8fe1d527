"""Who started a process, read off the environment; and the command under the real torchrun."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apoptosis.distributed.ranks import Ranks
from apoptosis.errors import ArgumentError
from apoptosis.tools.cli.app import run
from apoptosis.tools.launch import LAUNCHERS, Group, ProcessInfo, detect_launcher, group, start_group
from apoptosis.tools.launch.detect import first_host
from apoptosis.tools.recipes.several import batch_share, probe_share
from distributed.launched import Launched, environment, mpirun

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "host",
            "MASTER_PORT": "29500"}  # fmt: skip
ELASTIC = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}
OPENMPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
           "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "6", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "3"}
SRUN = {"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "0",
        "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_NODEID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2,1"}  # fmt: skip


def told(place):
    return place.launcher, place.rank, place.size, place.local_rank, place.local_size


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, ("none", 0, 1, 0, 1)),
        (TORCHRUN, ("torchrun", 5, 8, 1, 4)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ("torchrun", 0, 1, 0, 1)),
        (OPENMPI, ("mpi", 3, 4, 1, 2)),
        (HYDRA, ("mpi", 1, 6, 1, 3)),
        (SRUN, ("slurm", 2, 3, 0, 1)),
        (SRUN | TORCHRUN | ELASTIC, ("torchrun", 5, 8, 1, 4)),  # srun started torchrun
        (SRUN | OPENMPI, ("mpi", 3, 4, 1, 2)),  # mpirun starts its daemons by srun
        (SRUN | {"PMI_RANK": "2", "PMI_SIZE": "3"}, ("slurm", 2, 3, 0, 1)),  # srun --mpi=pmi2
        (OPENMPI | TORCHRUN | {"RANK": "3", "WORLD_SIZE": "4"}, ("torchrun", 3, 4, 1, 4)),  # a script that translates
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, ("none", 0, 1, 0, 1)),  # a lone sbatch
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, ("none", 0, 1, 0, 1)),  # the shell of salloc
    ],
)
def test_environments_are_recognised(environ, place):
    assert told(detect_launcher("auto", environ)) == place
    assert detect_launcher("none", environ) == ProcessInfo()


def test_restarts_of_torchrun():
    assert detect_launcher("auto", TORCHRUN | ELASTIC).restarts == 2
    assert detect_launcher("auto", TORCHRUN | ELASTIC).restartable
    assert not detect_launcher("auto", TORCHRUN).restartable


def test_where_the_tasks_of_srun_meet():
    place = detect_launcher("slurm", SRUN)
    assert place.address == "gpu07"
    assert place.port == detect_launcher("slurm", SRUN | {"SLURM_PROCID": "0"}).port
    assert 1024 < place.port < 32768
    assert place.port != detect_launcher("slurm", SRUN | {"SLURM_STEP_ID": "2"}).port
    own = detect_launcher("slurm", SRUN | {"MASTER_ADDR": "here", "MASTER_PORT": "4000"})
    assert (own.address, own.port) == ("here", 4000)
    no_list = {k: v for k, v in SRUN.items() if "LIST" not in k}
    assert detect_launcher("slurm", no_list | {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}).address == "10.0.0.7"
    with pytest.raises(ArgumentError, match="Set MASTER_ADDR"):
        detect_launcher("slurm", no_list)
    assert first_host("a-[3,5],b") == "a-3"


@pytest.mark.parametrize(
    ("launcher", "environ", "named"),
    [
        ("auto", {"RANK": "0"}, "RANK=0, but WORLD_SIZE is not set"),
        ("auto", {"PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, "PMI_SIZE=2, but PMI_RANK is not set"),
        ("auto", TORCHRUN | {"RANK": "8"}, "RANK=8, WORLD_SIZE=8: a rank is a number from 0 to 7"),
        ("auto", TORCHRUN | {"RANK": "two"}, "RANK='two' is not a whole number"),
        ("auto", {"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
        ("auto", TORCHRUN | OPENMPI, "RANK=5, WORLD_SIZE=8 contradicts OMPI_COMM_WORLD_RANK=3, OMPI_COMM_WORLD_SIZE=4"),
        ("auto", TORCHRUN | SRUN, "contradicts SLURM_PROCID=2"),
        ("auto", OPENMPI | HYDRA, "OMPI_COMM_WORLD_RANK=3, OMPI_COMM_WORLD_SIZE=4 contradicts PMI_RANK=1, PMI_SIZE=6"),
        ("auto", SRUN | {"SLURM_NTASKS": "4"}, "SLURM_NTASKS=4 contradicts SLURM_STEP_NUM_TASKS=3"),
        ("torchrun", OPENMPI, "'torchrun': this process was not started by torchrun.*It was started by mpirun"),
        ("mpi", TORCHRUN, "'mpi': this process was not started by mpirun.*It was started by torchrun .RANK=5"),
        ("slurm", {}, "SLURM_STEP_NUM_TASKS are not set"),
        ("horovod", {}, "unknown; there are auto, none, torchrun, mpi, slurm"),
    ],
)
def test_contradictions_are_named(launcher, environ, named):
    with pytest.raises(ArgumentError, match=named):
        detect_launcher(launcher, environ)


def test_one_launcher_alone_is_read_when_it_is_named():
    assert told(detect_launcher("mpi", TORCHRUN | OPENMPI)) == ("mpi", 3, 4, 1, 2)
    assert detect_launcher("mpi", SRUN).launcher == "slurm"  # srun --mpi=pmix; MPI itself is asked next
    assert detect_launcher("mpi", {}) == ProcessInfo(launcher="mpi")
    assert LAUNCHERS[0] == "auto"


def test_shares():
    for size in (1, 2, 3, 7):
        groups = [Group(ProcessInfo(rank=rank, size=size), torch.device("cpu"), Ranks()) for rank in range(size)]
        shares = [batch_share(one, 23) for one in groups]
        assert torch.equal(torch.cat([torch.arange(23)[share] for share in shares]), torch.arange(23))
        lengths = {share.stop - share.start for share in shares}
        assert max(lengths) - min(lengths) <= 1
        assert {stop - start for start, stop in (probe_share(one, 23) for one in groups)} == {23 // size}
    with pytest.raises(ArgumentError, match="--batch: 13 rows per step are too few for 7 processes"):
        batch_share(groups[0], 13)
    with pytest.raises(ArgumentError, match="--probe-rows: 6 rows cannot be shared out over 7"):
        probe_share(groups[0], 6)


def test_devices_of_several_processes(monkeypatch):
    place = ProcessInfo(launcher="torchrun", rank=1, size=2, local_rank=1, local_size=2)
    assert group._device("cpu", place) == torch.device("cpu")
    with pytest.raises(ArgumentError, match="cannot share one GPU"):
        group._device("cuda:0", place)
    with pytest.raises(ArgumentError, match="100 processes on this machine, but it has "):
        group._device("cuda", ProcessInfo(launcher="torchrun", size=100, rank=0, local_size=100))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert group._device("cuda", ProcessInfo(launcher="slurm", size=4, local_rank=3)) == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert group._device("cuda", ProcessInfo(launcher="slurm", size=8, rank=7, local_rank=3)) == torch.device("cuda", 3)
    with pytest.raises(ArgumentError, match="launcher 'mpi' sums gradients that lie in the memory of the CPU"):
        group._device("cuda", ProcessInfo(launcher="mpi", size=2))


def test_alone_there_is_no_process_group():
    with start_group("none", device="cpu") as alone:
        net = torch.nn.Linear(2, 2)
        assert alone.parallel(net) is net
        assert not torch.distributed.is_initialized()
    with pytest.raises(ArgumentError, match="timeout=0"):
        start_group("none", timeout=0)


# ---------------------------------------------------------------- the command

SMALL = ["--data", "digits", "--train-rows", "1500", "--widths", "64,48", "--batch", "64", "--calibration", "1e6",
         "--tolerance", "0.05", "--align", "1"]  # fmt: skip
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "several_processes.py"
TRAIN = ("-m", "apoptosis.cli", "train", *SMALL)
STOPS = (str(Path(__file__).with_name("stops.py")), "train", *SMALL)  # TRAIN, standing still where it is told to


def records(folder, kind):
    lines = (json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize(("size", "widths"), [(2, ()), (3, ("--widths", "512,512"))])
def test_torchrun_interrupted_and_resumed_comes_to_the_same_bits(tmp_path, size, widths):
    """Rows, dropout of every rank and optimizer go on where they were; the whole log is rank 0's.

    Of three the order of the sums matters, and so in which of several buckets a gradient is.
    """
    # 93 steps an epoch: where steps take 0.01 s they vote on stopping after 20 at most, so inside the second epoch
    more = ["--no-apoptosis", "--dropout", "0.2", "--batch", "16", "--epochs", "2", *widths]
    stopped = Launched("torchrun", size, *STOPS, *more, "--out", "stopped", cwd=tmp_path, STOPS="96", STOP_PAUSE="0.01")
    stopped.until(96)
    stopped.interrupt()
    assert stopped.wait() != 0
    assert len(stopped.lines()) == 1, stopped.told()
    assert "interrupted; what was saved stays" in stopped.lines()[0]
    assert len(records(tmp_path / "stopped", "epoch")) == 1
    resumed = Launched("torchrun", size, "-m", "apoptosis.cli", "train", "--resume", "stopped", cwd=tmp_path)
    assert resumed.wait() == 0, resumed.told()
    whole = Launched("torchrun", size, *TRAIN, *more, "--out", "whole", cwd=tmp_path)
    assert whole.wait() == 0, whole.told()
    same_bits(tmp_path / "stopped", tmp_path / "whole")
    runs = records(tmp_path / "stopped", "run")
    assert [run["ranks"] for run in runs] == [size, size]
    assert 96 <= runs[1]["resumed_at_step"] < 2 * 93  # in the middle of an epoch, after the same step on both
    assert runs[0]["launcher"] == "torchrun"


def same_bits(one, other):
    """Both runs have come to the same: what they lost in every epoch, weights, optimizer, random states."""
    told = [{e["epoch"]: (e["loss"], e["widths"]) for e in records(path, "epoch")} for path in (one, other)]
    assert told[0] == told[1]
    assert result(one)["test_metric"] == result(other)["test_metric"]
    found, wanted = (load_file(path / "last.safetensors") for path in (one, other))
    assert found.keys() == wanted.keys()
    differ = [name for name in found if not torch.equal(found[name], wanted[name])]
    assert not differ


def result(folder):
    return json.loads((folder / "summary.json").read_text())["result"]


def test_a_killed_rank_is_one_line_and_a_restart_goes_on(tmp_path):
    """Torchrun starts both anew with the very same command, which goes on from the checkpoint."""
    program = ["--max-restarts", "1", *STOPS, "--epochs", "12", "--out", "run"]
    launched = Launched("torchrun", 2, *program, cwd=tmp_path, STOPS="70", STOP_RANK="1")
    launched.until(70)
    os.kill(launched.stands, signal.SIGKILL)
    assert launched.wait() == 0, launched.told()
    assert all(re.search("rank 0 of 2 lost another rank", line) for line in launched.lines())
    assert len(launched.lines()) <= 1  # none where torchrun was faster to stop the survivor
    begun = records(tmp_path / "run", "run")
    assert len(begun) == 2
    assert begun[1]["resumed_at_step"] >= 23
    assert result(tmp_path / "run")["steps"] == 12 * 23
    assert result(tmp_path / "run")["parameters"] < 7770


def test_processes_that_may_be_started_anew_need_a_folder_to_find(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "x",
        "TORCHELASTIC_MAX_RESTARTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert run(["train", *SMALL]) == 2
    assert "torchrun --max-restarts needs --out" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")  # another process of this machine says it
    assert run(["train", *SMALL, "--epochs", "0"]) == 2
    assert capsys.readouterr().err == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("environ", [TORCHRUN, OPENMPI, HYDRA, SRUN], ids=["torchrun", "openmpi", "mpich", "srun"])
@pytest.mark.parametrize("command", ["compare", "plan run", "inspect torch.nn:Linear", "report run"])
def test_what_works_alone_is_refused_in_each_of_several(tmp_path, monkeypatch, capsys, command, environ):
    """Each would do the whole work, into the same files."""
    monkeypatch.chdir(tmp_path)
    for name in environment().keys() ^ os.environ.keys():
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    local = next(name for name in environ if name.endswith(("LOCAL_RANK", "LOCALRANKID", "LOCALID")))
    monkeypatch.setenv(local, "0")
    assert run(command.split()) == 2
    told = capsys.readouterr()
    name, place = command.split()[0], detect_launcher("auto", environ)
    assert told.err.startswith(
        f"apoptosis: error: 'apoptosis {name}' runs in one process, and this is one of {place.size} ({place})"
    )
    assert told.err.count("\n") == 1
    monkeypatch.setenv(local, "1")  # another process of this machine says it
    assert run(command.split()) == 2
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_what_works_alone_speaks_where_nobody_else_would(tmp_path, monkeypatch, capsys):
    """Variables of some cluster's, by which no launcher is recognised, and mistakes in one of several processes."""
    monkeypatch.chdir(tmp_path)
    for name in environment().keys() ^ os.environ.keys():
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert run(["report", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run(["report"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("launcher", ["torchrun", "mpi"])
def test_compare_under_a_launcher_is_one_line(tmp_path, launcher):
    """Here all processes of torchrun are Pythons of their own."""
    if launcher == "mpi" and mpirun() is None:
        pytest.skip("needs an mpirun")
    program, fresh = ("-m", "apoptosis.cli", "compare", *SMALL, "--out", "run"), launcher == "torchrun"
    refused = Launched(launcher, 2, *program, cwd=tmp_path, fresh=fresh)
    assert refused.wait() != 0
    assert len(refused.lines()) == 1, refused.told()
    assert "'apoptosis compare' runs in one process, and this is one of 2" in refused.lines()[0]
    assert not (tmp_path / "run").exists()


def test_the_example_of_several_processes_runs(tmp_path):
    run = Launched("torchrun", 2, str(EXAMPLE), cwd=tmp_path)
    assert run.wait() == 0, run.told()
    assert "on 2 ranks" in run.out.read_text()
