"""The command and start_group under the real srun, where there is one with a controller that answers."""

import os
import signal
import stat
import subprocess
import sys

import pytest

from distributed.launched import Launched, environment, has_slurm
from distributed.test_launch import SMALL, STOPS, TRAIN, records, same_bits
from distributed.test_mpi import has_mpi

pytestmark = pytest.mark.skipif(not has_slurm(), reason="needs srun and a Slurm controller that answers")

WHO = """
from apoptosis.tools.launch import detect_launcher, start_group
with start_group(timeout=200) as group:
    print(group.launcher, group.rank, group.size, group.process.local_size, group.ranks.gathered(group.rank))
"""
ALONE = "from apoptosis.tools.launch import detect_launcher; print('alone', detect_launcher().size)"


def told_by(*command, cwd):
    run = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    return sorted(run.stdout.splitlines())


def test_a_cancelled_job_resumed_comes_to_the_bits_of_torchrun(tmp_path):
    more = ["--epochs", "4"]
    name = f"stops-{os.getpid()}"
    stopped = Launched("slurm", 2, *STOPS, *more, "--out", "run", cwd=tmp_path, STOPS="21", SLURM_JOB_NAME=name)
    assert stopped.until(21)  # inside a window
    told_by("scancel", f"--name={name}", cwd=tmp_path)  # SIGTERM, as at a time limit; what is left 30 s later is killed
    assert stopped.wait() != 0
    assert len(stopped.lines()) == 1, stopped.told()
    assert "interrupted; what was saved stays" in stopped.lines()[0]
    resumed = Launched("slurm", 2, "-m", "apoptosis.cli", "train", "--resume", "run", cwd=tmp_path)
    assert resumed.wait() == 0, resumed.told()
    whole = Launched("torchrun", 2, *TRAIN, *more, "--out", "whole", cwd=tmp_path)
    assert whole.wait() == 0, whole.told()
    same_bits(tmp_path / "run", tmp_path / "whole")
    runs = records(tmp_path / "run", "run")
    assert [(run["launcher"], run["ranks"]) for run in runs] == [("slurm", 2), ("slurm", 2)]
    assert runs[1]["resumed_at_step"] == 27  # where the window ends


def test_a_killed_task_is_one_line(tmp_path):
    run = Launched("slurm", 2, *STOPS, "--epochs", "4", "--out", "run", cwd=tmp_path, STOPS="30", STOP_RANK="1")
    run.until(30)
    os.kill(run.stands, signal.SIGKILL)
    assert run.wait() != 0
    assert len(run.lines()) == 1, run.told()
    assert "rank 0 of 2 lost another rank" in run.lines()[0]


def test_a_batch_script_with_four_tasks_and_a_shell_that_is_alone(tmp_path):
    script = tmp_path / "job.sh"
    python = f"'{sys.executable}'"
    train = " ".join(f"'{word}'" for word in (*TRAIN, "--epochs", "2", "--batch", "66", "--out", "run"))
    script.write_text(
        f"#!/bin/sh\nsrun --overcommit --ntasks 4 {python} {train}\n{python} -m apoptosis.cli report run\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    told_by("sbatch", "--wait", "--overcommit", "--ntasks", "4", "--output", "job.txt", str(script), cwd=tmp_path)
    job = (tmp_path / "job.txt").read_text()
    assert "test accuracy" in job, job
    assert "report: run" in job, job  # by the script's own shell
    assert [(run["launcher"], run["ranks"]) for run in records(tmp_path / "run", "run")] == [("slurm", 4)]


def test_an_interactive_allocation(tmp_path):
    steps = f'srun --overlap --overcommit --ntasks 2 "{sys.executable}" -c "{WHO}"; "{sys.executable}" -c "{ALONE}"'
    told = told_by("salloc", "--overcommit", "--ntasks", "2", "sh", "-c", steps, cwd=tmp_path)
    assert told == ["alone 1", "slurm 0 2 2 [0, 1]", "slurm 1 2 2 [0, 1]"]


@pytest.mark.skipif(not has_mpi(), reason="needs the extra 'mpi'")
def test_mpi_that_srun_starts(tmp_path):
    """MPICH asks Slurm by PMI2; without that every task is alone for MPI, and is refused."""
    mpi = [*TRAIN, "--epochs", "2", "--launcher", "mpi", "--out", "run"]
    run = Launched("slurm", 2, *mpi, cwd=tmp_path, SLURM_MPI_TYPE="pmi2")
    assert run.wait() == 0, run.told()
    assert [(run["launcher"], run["ranks"]) for run in records(tmp_path / "run", "run")] == [("mpi", 2)]
    run = Launched("slurm", 2, *mpi, cwd=tmp_path, SLURM_MPI_TYPE="none")
    assert run.wait() != 0
    assert len(run.lines()) == 1, run.told()
    assert "knows of 1 process: the launcher belongs to another MPI" in run.lines()[0]


def test_another_launcher_is_refused_by_name(tmp_path):
    run = Launched("slurm", 2, "-m", "apoptosis.cli", "train", *SMALL, "--launcher", "torchrun", cwd=tmp_path)
    assert run.wait() != 0
    assert len(run.lines()) == 1, run.told()
    assert "was not started by torchrun" in run.lines()[0]
    assert "It was started by srun" in run.lines()[0]
