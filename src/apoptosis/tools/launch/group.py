"""The group of processes that train one network together: begun, used by a loop, and ended.

Holds: `start_group`, the torch.distributed process group behind it, which of several failing ranks speaks.
Elsewhere: the environment (place), sums over MPI (mpi), what is trained.
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
_LINGER = 3.0  # seconds in which other ranks may ask who has spoken already
_FAILURES = "apoptosis/failures"
# Threads of gloo let go of the last tensors a moment after a sum, and abort a process that is at its end by then.
_SETTLE = 0.2  # seconds
_stores: Any = dist  # its stubs leave out the stores


class Group:
    """The processes of a run; use it as a context.

    Attributes: place: how this process was started. rank, size, launcher: of it. device: where this process trains.
        ranks: sums, votes and exchanges over all processes; `ranks.run_collectively(work)` fails on all where it fails
        on one. silent: after an error left the context: whether another rank was the first to fail, and has told it.
    """

    def __init__(
        self,
        place: ProcessInfo,
        device: torch.device,
        ranks: Ranks,
        *,
        store: Any = None,
        hosts: bool = False,
        mpi: Any = None,
    ) -> None:
        self.place, self.device, self.ranks = place, device, ranks
        self.silent = False
        self._store, self._hosts, self._mpi = store, hosts, mpi
        self._open = True

    @property
    def rank(self) -> int:
        """Of this process, from 0."""
        return self.place.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.place.size

    @property
    def launcher(self) -> str:
        """Return "none", "torchrun", "mpi" or "slurm"."""
        return self.place.launcher

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
            if isinstance(error, RankError):  # the rank that knows why may be about to say so
                time.sleep(_DEFER)
            self.silent = not self._first_to_fail()
        self.close(failed=error is not None)

    def _first_to_fail(self) -> bool:
        try:
            return bool(self._store.add(_FAILURES, 1) == 1)
        except RuntimeError:  # its host was killed, and has told nothing
            return True

    def _linger(self) -> None:
        """Keep the store up until all others have failed and asked, so that one of them speaks and not each."""
        deadline = time.monotonic() + _LINGER
        while time.monotonic() < deadline and self._store.add(_FAILURES, 0) < self.size:
            time.sleep(0.05)


def start_group(launcher: str = "auto", *, device: str = "auto", timeout: float = TIMEOUT) -> Group:
    """Begin the process group of this run, as whoever started the process says; alone where nobody did.

    Args:
        launcher: as for `detect_launcher`.
        device: "auto" (the GPU of the local rank where there is one), "cpu" or "cuda".
        timeout: seconds after which a rank that does not answer is an error.

    Returns: the group: gloo on the CPU, NCCL on GPUs and gloo beside it for votes; under "mpi" sums go through MPI, and
        a gloo group is begun besides, which DistributedDataParallel cannot be without.

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
    place, comm, mpi = detect_launcher(launcher), None, None
    if launcher == "mpi" or (place.launcher == "mpi" and place.size > 1):
        place, comm, mpi = _mpi_place(place)
    target = _device(device, place)
    if place.size == 1:
        return Group(place, target, Ranks(), mpi=mpi)
    if dist.is_initialized():
        raise ArgumentError(
            "start_group() begins the process group of this run, and one has begun already: leave out "
            "init_process_group(), or wrap the model in DistributedDataParallel yourself and go without start_group()."
        )
    store, hosts = _mpi_store(comm, timeout) if comm is not None else _store(place, timeout)
    nccl = target.type == "cuda"
    if nccl:
        torch.cuda.set_device(target)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo",
            store=_stores.PrefixStore("apoptosis", store),
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=timeout),
        )
    except RuntimeError as error:
        raise _not_come(place, error) from error
    ranks = TorchRanks(dist.group.WORLD, target) if comm is None else MpiRanks(comm, timeout=timeout)
    return Group(place, target, ranks, store=store, hosts=hosts, mpi=mpi)


def _device(name: str, place: ProcessInfo) -> torch.device:
    """Return where this process trains.

    Raises: ArgumentError: no such device, several processes on one GPU, or GPUs under MPI.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if place.size == 1 or not name.startswith("cuda"):
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ArgumentError(f"device '{name}' is unknown: {str(error).splitlines()[0]}") from error
    if place.launcher == "mpi":
        raise ArgumentError(
            "launcher 'mpi' sums gradients that lie in the memory of the CPU, and this run has GPUs: name device "
            "'cpu', or start with torchrun or srun, where NCCL sums them."
        )
    if name != "cuda":
        raise ArgumentError(f"device '{name}': {place.size} processes cannot share one GPU; 'cuda' gives each its own.")
    there, wanted = torch.cuda.device_count(), max(place.local_size, place.local_rank + 1)
    if there == 1 and place.launcher == "slurm":  # --gpus-per-task=1 shows every task its own
        return torch.device("cuda", 0)
    if there < wanted:  # on every process of the machine, so that none waits for one that cannot come
        raise ArgumentError(
            f"{wanted} processes on this machine and GPUs for {there}: start fewer, or name device 'cpu'."
        )
    return torch.device("cuda", place.local_rank)


def _store(place: ProcessInfo, timeout: float) -> tuple[Any, bool]:
    """Meet the others at rank 0's address; torchrun keeps the meeting place itself, and hosts nothing here."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and place.launcher == "torchrun"
    assert place.address is not None
    assert place.port is not None
    hosts = place.rank == 0 and not agent
    try:
        store = _stores.TCPStore(
            place.address,
            place.port,
            place.size,
            is_master=hosts,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
        )
    except (RuntimeError, OSError) as error:
        raise _not_come(place, error) from error
    return _stores.PrefixStore(f"attempt-{place.restarts}", store), hosts


def _mpi_place(told: ProcessInfo) -> tuple[ProcessInfo, Any, Any]:
    """Ask MPI itself for the place.

    Raises: ArgumentError: MPI knows of another number of processes than whoever started them.
    """
    ours = "mpi4py.MPI" not in sys.modules
    mpi = load_mpi()
    comm = mpi.COMM_WORLD.Dup()
    near = comm.Split_type(mpi.COMM_TYPE_SHARED)
    place = ProcessInfo(
        launcher="mpi",
        rank=comm.Get_rank(),
        size=comm.Get_size(),
        local_rank=near.Get_rank(),
        local_size=near.Get_size(),
        told_by=told.told_by,
    )
    near.Free()
    if told.size not in (1, place.size):
        library = mpi.Get_library_version().split("\n")[0].split(",")[0].strip()
        raise ArgumentError(
            f"{told}, but the MPI library that mpi4py loads ({library}) knows of {place.size} process"
            f"{'es' if place.size > 1 else ''}: the launcher belongs to another MPI. Take the mpirun of this Python "
            "environment, or srun --mpi=pmix with an MPI built for it."
        )
    return place, comm, mpi if ours else None


def _mpi_store(comm: Any, timeout: float) -> tuple[Any, bool]:
    """Meet at a port that rank 0 was given by its system and has told the others by MPI."""
    from mpi4py import MPI

    near = comm.Split_type(MPI.COMM_TYPE_SHARED)
    host = "127.0.0.1" if near.Get_size() == comm.Get_size() else socket.gethostname()
    near.Free()
    store, told = None, ("", 0, "")
    limit = timedelta(seconds=timeout)
    if comm.Get_rank() == 0:
        try:
            store = _stores.TCPStore(host, 0, comm.Get_size(), is_master=True, timeout=limit, wait_for_workers=False)
            told = (host, store.port, "")
        except (RuntimeError, OSError) as error:
            told = ("", 0, str(error).splitlines()[0])
    address, port, fault = comm.bcast(told)
    if fault:
        raise RankError(f"rank 0 could not open a port for the others: {fault}")
    if store is None:
        try:
            store = _stores.TCPStore(
                address, port, comm.Get_size(), is_master=False, timeout=limit, wait_for_workers=False
            )
        except (RuntimeError, OSError) as error:
            raise RankError(
                f"rank {comm.Get_rank()} could not reach rank 0 at {address}:{port}: {str(error).splitlines()[0]}"
            ) from error
    return store, comm.Get_rank() == 0


def _not_come(place: ProcessInfo, error: Exception) -> RankError:
    where = f" at {place.address}:{place.port}" if place.address else ""
    return RankError(
        f"rank {place.rank} of {place.size} did not meet the others{where} ({place.launcher}): "
        f"{str(error).splitlines()[0]}"
    )


def _of_a_lost_rank(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return any(word in text for word in ("RankError", "gloo", "Connection closed by peer", "NCCL"))
