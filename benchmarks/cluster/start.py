"""The processes of a world, started and waited for: each by itself for gloo, all by mpirun for MPI.

Holds: commands, environments, what is missing for MPI. Elsewhere: namespaces (links.py), what ranks
measure.

mpirun is MPICH's (Hydra): it enters the namespaces by a launcher of its own choice, where others call ssh. Ranks then
look like machines to MPI, which shares no memory between them and talks TCP over their interface.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cluster.links import Links, host

ROOT = Path(__file__).resolve().parents[2]
PYTHON = [sys.executable]  # the words that run a rank's program
TIMEOUT = 1800.0  # seconds that a world may take
#: Another launcher may have started this very process; its variables are not those of the ranks.
_FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC_", "OMPI_", "PMI", "MPI_", "SLURM_", "PRTE_")
_OVER_TCP = {
    "FI_PROVIDER": "tcp",
    "FI_TCP_IFACE": "eth0",
    "MPIR_CVAR_CH4_NETMOD": "ofi",
    "MPIR_CVAR_NOLOCAL": "1",  # no shared memory, though all ranks are on this machine
}


def mpirun() -> str | None:
    """The mpirun of this Python environment, or the one on the path."""
    num_static = Path(sys.executable).with_name("mpirun")
    return str(num_static) if num_static.exists() else shutil.which("mpirun")


def why_no_mpi() -> str:
    """Say what is missing for ranks over MPI, "" where nothing is."""
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed"
    if mpirun() is None:
        return "there is no mpirun"
    return ""


def why_no_links_for_mpi() -> str:
    """Say why mpirun cannot enter namespaces, "" where it can; `why_no_mpi` has said that there is one."""
    text = subprocess.run([str(mpirun()), "--version"], capture_output=True, text=True, timeout=60).stdout
    return "" if "HYDRA" in text.upper() else "this mpirun is not MPICH's, whose launcher enters the namespaces"


def run_ranks(
    backend: str, size: int, program: Sequence[str], *, links: Links | None, folder: Path, threads: int
) -> None:
    """Start `size` processes of a program and wait for all.

    Args:
        backend: "gloo": each is given its rank as last argument. "mpi": none is, MPI knows it.
        program: words after the interpreter. links: where they live, None for the machine itself. folder: for files.

    Raises: SystemExit: one failed, or all took longer than TIMEOUT. Nothing is left running.
    """
    device = "lo" if links is None else "eth0"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    environment |= {"GLOO_SOCKET_IFNAME": device, "OMP_NUM_THREADS": str(threads)}
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns that addresses of namespaces have no names
    words = [*PYTHON, *program]
    if backend == "mpi":
        commands = [_by_mpirun(size, words, links, folder)]
        # Open MPI as the superuser of a container, and on fewer cores than processes
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        environment |= {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
        environment |= _OVER_TCP if links is not None else {}
    else:
        commands = [[*([] if links is None else links.enter(n)), *words, str(n)] for n in range(size)]
    started = [
        subprocess.Popen(each, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        for each in commands
    ]
    try:
        _wait(started, f"{size} processes on {backend}")
    finally:
        for process in started:
            _end(process)


def _by_mpirun(size: int, words: Sequence[str], links: Links | None, folder: Path) -> list[str]:
    command = [str(mpirun()), "-n", str(size)]
    if links is None:
        return [*command, *words]
    launcher = folder / "enter"
    cases = "\n".join(f"{host(n)}) set -- {shlex.join(links.enter(n, from_another=True))} ;;" for n in range(size))
    # called as ssh is: options, a host, the words of a command line for its shell
    launcher.write_text(
        '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\nhost=$1; shift; line="$*"\n'
        f'case $host in\n{cases}\nesac\nexec "$@" sh -c "$line"\n'
    )
    launcher.chmod(0o700)
    hosts = ",".join(host(n) for n in range(size))
    there = ["-launcher", "ssh", "-launcher-exec", str(launcher), "-hosts", hosts, "-iface", "eth0"]
    return [*links.enter(0), *command, *there, *words]


def _wait(started: Sequence[subprocess.Popen[bytes]], name: str) -> None:
    """Wait for all; the first that fails ends the wait, since the others would wait for it in vain."""
    end = time.monotonic() + TIMEOUT
    while any(process.poll() is None for process in started):
        if any(process.poll() for process in started):
            break
        if time.monotonic() > end:
            raise SystemExit(f"{name} took more than {TIMEOUT:.0f} s")
        time.sleep(0.05)
    if any(process.poll() for process in started):
        raise SystemExit(f"{name}: one failed")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()  # mpirun passes it on to what it has started
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
