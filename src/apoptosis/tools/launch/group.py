"""The group of processes that train one network together: its start, its use in a loop, its end.

Holds: `start_group`, the torch.distributed process group behind it, which of several failing ranks reports the error.
Elsewhere: the environment (detect), sums over MPI (mpi), what is trained.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apoptosis.distributed.ranks import Ranks, TorchRanks
from apoptosis.errors import ArgumentError, RankError
from apoptosis.tools.launch.detect import ProcessInfo, detect_launcher
from apoptosis.tools.launch.mpi import MpiRanks, average_gradients, load_mpi

TIMEOUT = 1800.0  # seconds, as torch.distributed has it
_DEFER = 0.5  # seconds
_LINGER = 3.0  # seconds in which other ranks may ask whether the error was reported
_FAILURES = "apoptosis/failures"
# Threads of gloo release the last tensors a moment after a sum, and abort a process that is exiting by then.
_SETTLE = 0.2  # seconds
_stores: Any = dist  # its stubs leave out the stores


class Group:
    """The processes of a run; use it as a context.

    Attributes: process: how this process was started. rank, size, launcher: of it. device: where this process trains.
        ranks: sums, votes and exchanges over all processes; `ranks.run_collectively(work)` fails on all where it fails
        on one. reported_elsewhere: after an error left the context: whether another rank failed first and reports it.
    """

    def __init__(
        self,
        process: ProcessInfo,
        device: torch.device,
        ranks: Ranks,
        *,
        store: Any = None,
        hosts: bool = False,
        mpi: Any = None,
    ) -> None:
        self.process, self.device, self.ranks = process, device, ranks
        self.reported_elsewhere = False
        self._store, self._hosts, self._mpi = store, hosts, mpi
        self._open = True

    @property
    def rank(self) -> int:
        """Of this process, from 0."""
        return self.process.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.process.size

    @property
    def launcher(self) -> str:
        """Return "none", "torchrun", "mpi" or "slurm"."""
        return self.process.launcher

    def parallel(self, model: nn.Module, **options: Any) -> nn.Module:
        """Wrap a model, on `device` already, in DistributedDataParallel; one process alone gets the model itself.

        Under MPI the gradients are averaged by MPI_Iallreduce while backward runs, and Apoptosis, given the wrapped
        model, sums its moments by MPI too. What the wrapper itself exchanges (parameters at the beginning, the layout
        of its buckets, buffers of BatchNorm) goes through the gloo group that it needs to exist.

        Args:
            model: the network.
            options: of DistributedDataParallel.

        Raises: ArgumentError: a process group of some processes, whose gradients MPI would average over all.
        """
        if self.size == 1:
            return model
        own = options.get("process_group")
        if isinstance(self.ranks, MpiRanks) and own is not None and own.size() < self.size:
            raise ArgumentError(
                f"process_group= has {own.size()} of {self.size} processes, and under MPI gradients are averaged over "
                "all. Leave it out, or start with torchrun or srun."
            )
        wrapped = DistributedDataParallel(model, **options)
        if isinstance(self.ranks, MpiRanks):
            wrapped.register_comm_hook(self.ranks, average_gradients)
        return wrapped

    def share(self, rows: int) -> slice:
        """Return this rank's share of `rows` rows; the first ranks have one more where it does not divide.

        Example:
            >>> Group(ProcessInfo(rank=1, size=3), torch.device("cpu"), Ranks()).share(8)
            slice(3, 6, None)
        """
        each, more = divmod(rows, self.size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    @contextmanager
    def step(self) -> Iterator[None]:
        """Turn the errors of a training step that come of a lost rank into RankError.

        Raises: RankError: backward or a broadcast of buffers failed because another rank is gone.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _of_a_lost_rank(error):
                raise
            why = str(error).strip().splitlines()[0].removeprefix("RankError: ")
            named = f"rank {self.rank} of {self.size} lost another rank in a training step: "
            raise RankError(why if why.startswith("rank ") else named + why) from error

    def close(self, *, failed: bool = False) -> None:
        """End the group. failed: without waiting for the others; closing twice does nothing."""
        if not self._open:
            return
        self._open = False
        if isinstance(self.ranks, MpiRanks) and not failed:
            self.ranks.close()
        if self.size > 1 and dist.is_initialized():
            if not failed:
                dist.destroy_process_group()
                time.sleep(_SETTLE)
            elif self._hosts:
                self._linger()
        if self._mpi is not None and not failed:
            self._mpi.Finalize()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None and self.size > 1 and self._open:
            if isinstance(error, RankError):  # the rank that knows the cause may be about to report it
                time.sleep(_DEFER)
            self.reported_elsewhere = not self._first_to_fail()
        self.close(failed=error is not None)

    def _first_to_fail(self) -> bool:
        try:
            return bool(self._store.add(_FAILURES, 1) == 1)
        except RuntimeError:  # its host was killed and reported nothing
            return True

    def _linger(self) -> None:
        """Keep the store up until all others have failed and asked, so that only one of them reports the error."""
        deadline = time.monotonic() + _LINGER
        while time.monotonic() < deadline and self._store.add(_FAILURES, 0) < self.size:
            time.sleep(0.05)


def start_group(launcher: str = "auto", *, device: str = "auto", timeout: float = TIMEOUT) -> Group:
    """Join the process group of this run, as the launcher set it up; without one the process is alone.

    Args:
        launcher: as for `detect_launcher`.
        device: "auto" (the GPU of the local rank where there is one), "cpu" or "cuda".
        timeout: seconds after which a rank that does not answer is an error.

    Returns: the group: gloo on the CPU, NCCL on GPUs with gloo for votes; under "mpi" sums go through MPI, and a gloo
        group is started for DistributedDataParallel, which needs one.

    Raises: ArgumentError: variables that contradict one another, a device that is not there, a missing MPI. RankError:
        the others did not come.

    Example:
        >>> with start_group("none", device="cpu") as group:
        ...     net = group.parallel(nn.Linear(2, 2).to(group.device))
        >>> type(net).__name__
        'Linear'
    """
    if not timeout > 0:
        raise ArgumentError(f"timeout={timeout}: a number of seconds above 0.")
    process, comm, mpi = detect_launcher(launcher), None, None
    if launcher == "mpi" or (process.launcher == "mpi" and process.size > 1):
        process, comm, mpi = _mpi_process(process)
    target = _device(device, process)
    if process.size == 1:
        return Group(process, target, Ranks(), mpi=mpi)
    if dist.is_initialized():
        raise ArgumentError(
            "start_group() starts the process group of this run, and one was started already: leave out "
            "init_process_group(), or wrap the model in DistributedDataParallel yourself and do not call start_group()."
        )
    store, hosts = _mpi_store(comm, timeout) if comm is not None else _store(process, timeout)
    nccl = target.type == "cuda"
    if nccl:
        torch.cuda.set_device(target)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo",
            store=_stores.PrefixStore("apoptosis", store),
            rank=process.rank,
            world_size=process.size,
            timeout=timedelta(seconds=timeout),
        )
    except RuntimeError as error:
        raise _not_come(process, error) from error
    ranks = TorchRanks(dist.group.WORLD, target) if comm is None else MpiRanks(comm, timeout=timeout)
    return Group(process, target, ranks, store=store, hosts=hosts, mpi=mpi)


def _device(name: str, process: ProcessInfo) -> torch.device:
    """Return where this process trains.

    Raises: ArgumentError: no such device, several processes on one GPU, or GPUs under MPI.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if process.size == 1 or not name.startswith("cuda"):
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ArgumentError(f"device '{name}' is unknown: {str(error).splitlines()[0]}") from error
    if process.launcher == "mpi":
        raise ArgumentError(
            "launcher 'mpi' sums gradients that lie in the memory of the CPU, and this run has GPUs: name device "
            "'cpu', or start with torchrun or srun, where NCCL sums them."
        )
    if name != "cuda":
        raise ArgumentError(
            f"device '{name}': {process.size} processes cannot share one GPU; 'cuda' gives each its own."
        )
    there, wanted = torch.cuda.device_count(), max(process.local_size, process.local_rank + 1)
    if there == 1 and process.launcher == "slurm":  # --gpus-per-task=1 shows every task its own
        return torch.device("cuda", 0)
    if there < wanted:  # on every process of the machine, so that none waits for one that cannot come
        raise ArgumentError(
            f"{wanted} processes on this machine, but it has {there} GPUs: start fewer processes, or name device 'cpu'."
        )
    return torch.device("cuda", process.local_rank)


def _store(process: ProcessInfo, timeout: float) -> tuple[Any, bool]:
    """Meet the others at rank 0's address; torchrun hosts the store itself."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and process.launcher == "torchrun"
    assert process.address is not None
    assert process.port is not None
    hosts = process.rank == 0 and not agent
    try:
        store = _tcp_store(process.address, process.port, process.size, hosts, timeout)
    except (RuntimeError, OSError) as error:
        raise _not_come(process, error) from error
    return _stores.PrefixStore(f"attempt-{process.restarts}", store), hosts


def _tcp_store(host: str, port: int, size: int, hosts: bool, timeout: float) -> Any:
    limit = timedelta(seconds=timeout)
    return _stores.TCPStore(host, port, size, is_master=hosts, timeout=limit, wait_for_workers=False)


def _mpi_process(detected: ProcessInfo) -> tuple[ProcessInfo, Any, Any]:
    """Ask MPI itself for rank and size.

    Raises: ArgumentError: MPI knows of another number of processes than the launcher set.
    """
    ours = "mpi4py.MPI" not in sys.modules
    mpi = load_mpi()
    comm = mpi.COMM_WORLD.Dup()
    near = comm.Split_type(mpi.COMM_TYPE_SHARED)
    process = ProcessInfo(
        launcher="mpi",
        rank=comm.Get_rank(),
        size=comm.Get_size(),
        local_rank=near.Get_rank(),
        local_size=near.Get_size(),
        variables=detected.variables,
    )
    near.Free()
    if detected.size not in (1, process.size):
        library = mpi.Get_library_version().split("\n")[0].split(",")[0].strip()
        raise ArgumentError(
            f"{detected}, but the MPI library that mpi4py loads ({library}) knows of {process.size} process"
            f"{'es' if process.size > 1 else ''}: the launcher belongs to another MPI. Take the mpirun of this Python "
            "environment, or srun --mpi=pmix with an MPI built for it."
        )
    return process, comm, mpi if ours else None


def _mpi_store(comm: Any, timeout: float) -> tuple[Any, bool]:
    """Meet at a free port of rank 0, which sends its number by MPI."""
    from mpi4py import MPI

    near = comm.Split_type(MPI.COMM_TYPE_SHARED)
    host = "127.0.0.1" if near.Get_size() == comm.Get_size() else socket.gethostname()
    near.Free()
    store, found = None, ("", 0, "")
    if comm.Get_rank() == 0:
        try:
            store = _tcp_store(host, 0, comm.Get_size(), True, timeout)
            found = (host, store.port, "")
        except (RuntimeError, OSError) as error:
            found = ("", 0, str(error).splitlines()[0])
    address, port, fault = comm.bcast(found)
    if fault:
        raise RankError(f"rank 0 could not open a port for the others: {fault}")
    if store is None:
        try:
            store = _tcp_store(address, port, comm.Get_size(), False, timeout)
        except (RuntimeError, OSError) as error:
            raise RankError(
                f"rank {comm.Get_rank()} could not reach rank 0 at {address}:{port}: {str(error).splitlines()[0]}"
            ) from error
    return store, comm.Get_rank() == 0


def _not_come(process: ProcessInfo, error: Exception) -> RankError:
    where = f" at {process.address}:{process.port}" if process.address else ""
    return RankError(
        f"rank {process.rank} of {process.size} did not meet the others{where} ({process.launcher}): "
        f"{str(error).splitlines()[0]}"
    )


def _of_a_lost_rank(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return any(word in text for word in ("RankError", "gloo", "Connection closed by peer", "NCCL"))
