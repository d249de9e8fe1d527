"""What started this process, and its rank and size, from the environment.

Holds: the variables of torchrun, mpirun (Open MPI, MPICH and other Hydra launchers) and srun, and what is refused
of them. Elsewhere: anything that talks to another process (group, mpi).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from apoptosis.errors import ArgumentError

LAUNCHERS = ("auto", "none", "torchrun", "mpi", "slurm")
STARTERS = {"torchrun": "torchrun", "mpi": "mpirun", "slurm": "srun"}
_FIRST_PORT, _NUM_PORTS = 20_000, 12_000  # below the ports that systems hand out by themselves

Environment = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessInfo:
    """One process among all.

    launcher: "none", "torchrun", "mpi" or "slurm". rank, size: of all processes; local_rank, local_size: of those on
    this machine. address, port: where rank 0 waits for the others, None where the launcher has another way. restarts:
    how often torchrun has restarted all processes; restartable: whether it may. variables: the two that
    gave rank and size.
    """

    launcher: str = "none"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str | None = None
    port: int | None = None
    restarts: int = 0
    restartable: bool = False
    variables: tuple[str, str] = ("", "")

    def __str__(self) -> str:
        return f"{self.variables[0]}={self.rank}, {self.variables[1]}={self.size}"


def detect_launcher(launcher: str = "auto", environ: Environment | None = None) -> ProcessInfo:
    """Return rank and size of this process as its launcher set them in the environment.

    Args:
        launcher: one of LAUNCHERS. "auto" takes the innermost: torchrun before mpirun before srun, since each may start
            the one before it. "none" looks at nothing. Any other name reads the variables of that launcher alone.
        environ: variables by name; the process's own where None.

    Returns: the process. Under "mpi" `start_group` asks MPI itself again, which decides.

    Raises: ArgumentError: a variable is missing, no number or contradicts another, by name; or `launcher` names one
        that did not start this process.

    Example:
        >>> process = detect_launcher("auto", {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"})
        >>> process.launcher, process.rank, process.size
        ('mpi', 3, 4)
        >>> detect_launcher("auto", {"RANK": "4", "WORLD_SIZE": "4"})
        Traceback (most recent call last):
        ...
        apoptosis.errors.ArgumentError: RANK=4, WORLD_SIZE=4: a rank is a number from 0 to 3. Unset them, or ...
    """
    if launcher not in LAUNCHERS:
        raise ArgumentError(f"launcher '{launcher}' is unknown; there are {', '.join(LAUNCHERS)}.")
    environ = os.environ if environ is None else environ
    if launcher == "none":
        return ProcessInfo()
    if launcher == "auto":
        return _innermost([process for read in _READERS.values() if (process := read(environ)) is not None], environ)
    found = _READERS[launcher](environ)
    if found is None and launcher == "mpi" and (srun := _slurm(environ)) is not None:
        return srun  # srun starts MPI programs by itself (--mpi=pmix)
    if found is None:
        others = [process for read in _READERS.values() if (process := read(environ)) is not None and process.size > 1]
        if launcher == "mpi" and not others:
            return ProcessInfo(launcher="mpi")
        wanted = " or ".join(" and ".join(names) for names in _NAMES[launcher])
        by = f" It was started by {STARTERS[others[0].launcher]} ({others[0]})." if others else ""
        raise ArgumentError(
            f"launcher '{launcher}': this process was not started by {STARTERS[launcher]}, for {wanted} are not set."
            f"{by} Start it so, or leave the launcher at 'auto'."
        )
    return found


def first_host(nodes: str) -> str:
    """Return the first host of a list as Slurm writes it.

    Example:
        >>> first_host("gpu[07-12,15],login1"), first_host("a1,a2"), first_host("rack[2-3]-node[01,05]")
        ('gpu07', 'a1', 'rack2-node01')
    """
    first = re.match(r"(?:[^,\[\]]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group()) if first else ""


def _innermost(found: list[ProcessInfo], environ: Environment) -> ProcessInfo:
    """Choose among launchers whose variables are all there: one may have started the other.

    Raises: ArgumentError: variables of torchrun that it did not set itself, and another launcher says otherwise.
    """
    if not found:
        return ProcessInfo()
    chosen = found[0]
    if chosen.launcher == "torchrun" and "TORCHELASTIC_RUN_ID" not in environ:  # set by hand, or by a script
        for other in found[1:]:
            if other.size > 1 and (other.rank, other.size) != (chosen.rank, chosen.size):
                raise ArgumentError(
                    f"{chosen} contradicts {other}. Unset the ones that are stale, or name the launcher: "
                    f"'torchrun', '{other.launcher}' or 'none'."
                )
    return chosen


def _torchrun(environ: Environment) -> ProcessInfo | None:
    names = ("RANK", "WORLD_SIZE")
    pair = _pair(environ, *names)
    if pair is None:
        return None
    rank, size = pair
    if size > 1:
        for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in environ:
                raise ArgumentError(
                    f"RANK={rank}, WORLD_SIZE={size}, but {name} is not set. Start with torchrun, which sets all of "
                    "them, unset them, or take launcher 'none'."
                )
        if not environ["MASTER_ADDR"].strip() or environ["MASTER_PORT"].strip() in ("", "0"):
            raise ArgumentError(
                f"MASTER_ADDR={environ['MASTER_ADDR']!r}, MASTER_PORT={environ['MASTER_PORT']!r}: rank 0's address and "
                "an open port of it are needed. Start with torchrun, which sets both."
            )
    elastic = "TORCHELASTIC_RUN_ID" in environ
    return ProcessInfo(
        launcher="torchrun",
        rank=rank,
        size=size,
        local_rank=_number(environ, "LOCAL_RANK", 0),
        local_size=_number(environ, "LOCAL_WORLD_SIZE", 1),
        address=environ.get("MASTER_ADDR"),
        port=_number(environ, "MASTER_PORT", 0) or None,
        restarts=_number(environ, "TORCHELASTIC_RESTART_COUNT", 0) if elastic else 0,
        restartable=elastic and _number(environ, "TORCHELASTIC_MAX_RESTARTS", 0) > 0,
        variables=names,
    )


def _mpirun(environ: Environment) -> ProcessInfo | None:
    found = []
    for ranks, sizes, local_rank, local_size in _MPIRUNS:
        if ranks.startswith("PMI_") and local_rank not in environ:
            continue  # srun sets PMI_RANK as well, and is read by its own variables
        if (pair := _pair(environ, ranks, sizes)) is not None:
            process = ProcessInfo(
                launcher="mpi",
                rank=pair[0],
                size=pair[1],
                local_rank=_number(environ, local_rank, pair[0]),
                local_size=_number(environ, local_size, 1),
                variables=(ranks, sizes),
            )
            found.append(process)
    if len(found) == 2 and (found[0].rank, found[0].size) != (found[1].rank, found[1].size):
        raise ArgumentError(
            f"{found[0]} contradicts {found[1]}: unset the variables of the MPI that did not start this process."
        )
    return found[0] if found else None


def _slurm(environ: Environment) -> ProcessInfo | None:
    """Read srun's variables; a batch script's first shell has SLURM_PROCID and SLURM_NTASKS, but no step."""
    if "SLURM_STEP_NUM_TASKS" not in environ:
        return None
    pair = _pair(environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    if pair is None or pair[1] == 1:  # the shell of an interactive allocation is a step of one task
        return None
    tasks = _number(environ, "SLURM_NTASKS", pair[1])
    if tasks != pair[1]:
        raise ArgumentError(
            f"SLURM_NTASKS={tasks} contradicts SLURM_STEP_NUM_TASKS={pair[1]}: variables of another allocation are "
            "left. Unset them, or take launcher 'none'."
        )
    lists = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    nodes = next((environ[name] for name in lists if environ.get(name)), "")
    address = environ.get("MASTER_ADDR") or first_host(nodes) or environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if not address:
        raise ArgumentError(
            f"srun started {pair[1]} tasks, but none of {', '.join(lists)} and SLURM_LAUNCH_NODE_IPADDR is set: where "
            "task 0 runs is not known. Set MASTER_ADDR."
        )
    job, step = (_number(environ, name, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    node = _number(environ, "SLURM_NODEID", 0)
    return ProcessInfo(
        launcher="slurm",
        rank=pair[0],
        size=pair[1],
        local_rank=_number(environ, "SLURM_LOCALID", 0),
        local_size=_tasks_on(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"), node),
        address=address,
        port=_number(environ, "MASTER_PORT", 0) or _FIRST_PORT + (job * 131 + step) % _NUM_PORTS,
        variables=("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    )


def _tasks_on(nodes: str, node: int) -> int:
    """Return the tasks of one node from a list like "4(x2),3"."""
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", nodes):
        counts += [int(number)] * int(times or 1)
    return counts[node] if node < len(counts) else 1


def _pair(environ: Environment, ranks: str, sizes: str) -> tuple[int, int] | None:
    """Return rank and size, None where neither is set; refuse half of them, and what is no rank of that size."""
    if ranks not in environ and sizes not in environ:
        return None
    for name, other in ((ranks, sizes), (sizes, ranks)):
        if name not in environ:
            raise ArgumentError(f"{other}={environ[other]}, but {name} is not set. Unset it, or take launcher 'none'.")
    rank, size = _number(environ, ranks, 0), _number(environ, sizes, 1)
    if not 0 <= rank < size:
        raise ArgumentError(
            f"{ranks}={rank}, {sizes}={size}: a rank is a number from 0 to {size - 1}. Unset them, or take launcher "
            "'none'."
        )
    return rank, size


def _number(environ: Environment, name: str, missing: int) -> int:
    try:
        return int(environ.get(name, missing))
    except ValueError as error:
        raise ArgumentError(f"{name}='{environ[name]}' is not a whole number.") from error


_MPIRUNS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_READERS: Mapping[str, Callable[[Environment], ProcessInfo | None]] = {
    "torchrun": _torchrun,
    "mpi": _mpirun,
    "slurm": _slurm,
}
_NAMES = {
    "torchrun": (("RANK", "WORLD_SIZE"),),
    "mpi": tuple(names[:2] for names in _MPIRUNS),
    "slurm": (("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),),
}
