"""Programs started by the real torchrun, mpirun and srun, for the tests beside."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import apoptosis
from distributed.warm import Warm, interpreter

SRC = Path(apoptosis.__file__).parents[1]
#: What launchers set; this very process may have been started by one.
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC_", "OMPI_", "PMI", "MPI_", "SLURM_", "PRTE_")


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED)}
    kept |= {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}  # where the controller is
    kept |= {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    # Open MPI as the superuser of a container, and on fewer cores than processes
    kept |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    kept |= {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    return kept | more


def mpirun():
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


def command(launcher, size, *program, fresh=False):
    if launcher == "mpi":
        return [mpirun(), "-n", str(size), *([sys.executable] if fresh else interpreter()), *program]
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), *program]
    if launcher == "slurm":
        return ["srun", "--overcommit", "--ntasks", str(size), sys.executable, *program]
    return [sys.executable, *program]


class Launched:
    """A launcher and all it started, in a session of their own; nothing is left behind (conftest.py)."""

    running: ClassVar[list[Launched]] = []

    def __init__(self, launcher, size, *program, cwd, fresh=False, **variables):
        """launcher: none for a lone Python. fresh: every process is a Python of its own, none is forked (warm.py)."""
        # files, not pipes: a process that is left over would keep a pipe open
        self.out, self.err = Path(cwd) / "stdout.txt", Path(cwd) / "stderr.txt"
        words, env = command(launcher, size, *program, fresh=fresh), environment(**variables)
        if launcher in ("torchrun", "none") and not fresh:
            self.out.touch()
            self.err.touch()
            self.process = Warm(words[1:], cwd=cwd, env=env, out=self.out, err=self.err)
            self.running.append(self)
            return
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                words, cwd=cwd, env=env, start_new_session=True, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )
        self.running.append(self)

    def interrupt(self):
        """As Ctrl-C on a terminal: SIGINT for the launcher and whatever is in its process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def until(self, step, timeout=200):
        """Wait until `stops.py` stands still in this step, as process `stands`; return whether a window is open."""
        path, deadline = self.out.with_name(f"at-{step}"), time.monotonic() + timeout
        while not path.exists():
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.wait(1)
                raise AssertionError(f"step {step} was not reached: {self.told()}")
            time.sleep(0.05)
        watching, pid = path.read_text().split()
        self.stands = int(pid)
        return watching == "True"

    def wait(self, timeout=400):
        try:
            self.process.wait(timeout)
        finally:
            self.kill()
        return self.process.returncode

    def kill(self):
        """End whatever is left; workers of torchrun have sessions of their own."""
        if self in self.running:
            self.running.remove(self)
        for pid in descendants(self.process.pid) if self.process.poll() is None else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def printed(self):
        return self.out.read_text()

    def told(self):
        return self.err.read_text()

    def lines(self):
        """What the command told of its failure."""
        return [line for line in self.told().splitlines() if line.startswith("apoptosis: error")]


def descendants(pid):
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*found, *(deeper for child in found for deeper in descendants(child))]


def ran(code, *words, cwd):
    """Run a program as `python -c` would, to its end; forked from a process that has everything imported."""
    done = Launched("none", 1, "-c", code, *words, cwd=cwd)
    done.wait()
    return done


def has_slurm():
    """Whether srun is here, and a controller that answers it."""
    if shutil.which("srun") is None:
        return False
    try:
        return subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        return False
