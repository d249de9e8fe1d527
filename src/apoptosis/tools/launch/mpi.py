"""Sums over MPI: gradients while backward still runs, and moments, votes and exchanges of events.

Holds: `MpiRanks`, the thread that makes all MPI calls, and the communication hook of DistributedDataParallel.
Elsewhere: how processes are started and found (detect, group).

One thread makes all calls of MPI: it starts reductions without blocking and polls those under way. So calls have the
same order on every rank, backward continues meanwhile, no core spins, and a rank that does not answer is an error after
`timeout` seconds (MPI itself waits for ever).
"""

# No `from __future__ import annotations`: DistributedDataParallel compares the hook's annotations with classes.
import os
import pickle
import queue
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket

from apoptosis.distributed.ranks import Ranks
from apoptosis.errors import ArgumentError, RankError

T = TypeVar("T")
_PATIENCE = 50  # looks at what is under way without a pause, before there is one of:
_PAUSE = 5e-5  # seconds
MISSING = (
    "launcher 'mpi' needs mpi4py and an MPI library ({why}); install them with: pip install 'torch-apoptosis[mpi]', or "
    "start with torchrun."
)


class _Job(NamedTuple):
    what: str
    post: Callable[[], Any]  # -> the request of a call that does not block
    done: Callable[[Exception | None], None]


class MpiRanks(Ranks):
    """The ranks of an MPI communicator.

    Args: comm: of mpi4py, for this object alone from now on. timeout: seconds to wait for other ranks.

    Sums are MPI_Iallreduce: every rank has the same bits wherever the library adds in the same order for all, as MPI
    recommends; events compare checksums of all parameters, so that a library that does not is found out.
    """

    def __init__(self, comm: Any, *, timeout: float) -> None:
        from mpi4py import MPI

        self._mpi, self._comm, self._timeout = MPI, comm, timeout
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._broken: Exception | None = None
        self._closed = False
        self._abandoned: list[Any] = []
        self._thread = threading.Thread(target=self._serve, name="apoptosis-mpi", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread when all its calls are done."""
        self._closed = True
        self._jobs.put(None)
        self._thread.join(self._timeout)

    # ------------------------------------------------------------------ what ranks do

    def total(self, tensor: Tensor) -> Tensor:
        """Sum by MPI_Iallreduce."""
        out = tensor.detach().to("cpu", torch.float64, copy=True).contiguous()
        self._reduce("a sum", out, self._mpi.SUM)
        self.bytes_sent += out.numel() * out.element_size()
        return out.to(tensor.device)

    def range_of(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Compare by two reductions."""
        low, high = (tensor.detach().to("cpu", copy=True).contiguous() for _ in range(2))
        self._reduce("a comparison", low, self._mpi.MIN)
        self._reduce("a comparison", high, self._mpi.MAX)
        return low.to(tensor.device), high.to(tensor.device)

    def gathered(self, value: T) -> list[T]:
        """Exchange pickled values by MPI_Iallgatherv."""
        own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = torch.zeros(self.size, dtype=torch.int64, device="cpu")
        size = torch.tensor([len(own)], dtype=torch.int64, device="cpu")
        self._wait("an exchange", lambda: self._comm.Iallgather(size.numpy(), sizes.numpy()))
        found = torch.empty(int(sizes.sum()), dtype=torch.uint8, device="cpu")
        parts = (found.numpy(), sizes.tolist())
        self._wait("an exchange", lambda: self._comm.Iallgatherv(own.numpy(), parts))
        values = [pickle.loads(part.numpy().tobytes()) for part in torch.split(found, sizes.tolist())]
        return self._heard(value, values)

    def all(self, vote: bool) -> bool:
        """Vote by one number."""
        votes = torch.tensor([float(vote)], dtype=torch.float32, device="cpu")
        self._reduce("a vote", votes, self._mpi.MIN)
        return bool(votes.item())

    def average(self, gradients: Tensor) -> torch.futures.Future[Tensor]:
        """Begin to average a bucket of gradients over all ranks, in place; half precision travels as float32.

        Returns: a future of `gradients`, which raises RankError where another rank is gone.
        """
        wide = gradients if gradients.dtype in (torch.float32, torch.float64) else gradients.float()
        wide.div_(self.size)
        future: torch.futures.Future[Exception | None] = torch.futures.Future()

        def finish(done: torch.futures.Future[Exception | None]) -> Tensor:
            if (error := done.value()) is not None:
                raise error
            return gradients if wide is gradients else gradients.copy_(wide)

        averaged = future.then(finish)
        array = wide.numpy()
        self._ask(
            "gradients", lambda: self._comm.Iallreduce(self._mpi.IN_PLACE, array, self._mpi.SUM), future.set_result
        )
        return averaged

    # ------------------------------------------------------------------ the thread

    def _reduce(self, what: str, tensor: Tensor, operation: Any) -> None:
        array = tensor.numpy()
        self._wait(what, lambda: self._comm.Iallreduce(self._mpi.IN_PLACE, array, operation))

    def _wait(self, what: str, post: Callable[[], Any]) -> None:
        future: Future[None] = Future()

        def done(error: Exception | None) -> None:
            future.set_result(None) if error is None else future.set_exception(error)

        self._ask(what, post, done)
        future.result()

    def _ask(self, what: str, post: Callable[[], Any], done: Callable[[Exception | None], None]) -> None:
        if self._closed:
            done(RankError(f"rank {self.rank} of {self.size} asks for {what} after its group was closed"))
        else:
            self._jobs.put(_Job(what, post, done))

    def _serve(self) -> None:
        under_way: list[tuple[_Job, Any, float]] = []
        looks, more = 0, True
        while more or under_way:
            try:
                job = self._jobs.get(block=not under_way)
                more = more and job is not None
                if job is not None:
                    looks = 0
                    under_way += self._begin(job)
            except queue.Empty:
                pass
            left = [entry for entry in under_way if not self._finished(*entry)]
            looks = looks + 1 if len(left) == len(under_way) else 0
            under_way = left
            if self._broken is not None:
                for job, request, _ in under_way:
                    self._abandoned.append(request)  # MPI may still write to its buffer
                    job.done(self._broken)
                under_way = []
            if under_way:
                time.sleep(0.0 if looks < _PATIENCE else _PAUSE)

    def _begin(self, job: _Job) -> list[tuple[_Job, Any, float]]:
        if self._broken is not None:  # what others do now fits no call of this rank's
            job.done(self._broken)
            return []
        try:
            return [(job, job.post(), time.monotonic())]
        except Exception as error:  # noqa: BLE001 - raised again where it was asked for
            self._fail(job, str(error))
            return []

    def _finished(self, job: _Job, request: Any, since: float) -> bool:
        try:
            done = request.Test()
        except Exception as error:  # noqa: BLE001 - raised again where it was asked for
            self._fail(job, str(error))
            return True
        if done:
            job.done(None)
        elif time.monotonic() - since > self._timeout:
            self._abandoned.append(request)
            self._fail(job, "no answer")
            return True
        return bool(done)

    def _fail(self, job: _Job, why: str) -> None:
        self._broken = RankError(
            f"rank {self.rank} of {self.size} lost another rank while it waited up to {self._timeout:.0f} s for "
            f"{job.what}: MPI: {why}"
        )
        job.done(self._broken)


def average_gradients(ranks: MpiRanks, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Average gradients by MPI: a communication hook, whose state are the ranks that events of apoptosis use as well.

    Example: `model.register_comm_hook(ranks, average_gradients)`
    """
    return ranks.average(bucket.buffer())


def load_mpi() -> Any:
    """Import mpi4py and initialise MPI; whichever code imported it first also decides how it ends.

    Returns: the module, and MPI ends by `MPI.Finalize()` where this function began it (not at exit: a process that
        failed would wait there for the others).

    Raises: ArgumentError: mpi4py or its MPI library is missing or is not that of the mpirun that started this process,
        or the library does not allow calls from threads.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "suspicious MPI", RuntimeWarning)  # what is wrong is refused by name
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no libmpi
        raise ArgumentError(MISSING.format(why=" ".join(str(error).split()) or type(error).__name__)) from error
    if not MPI.Is_initialized():
        library = MPI.Get_library_version()
        if library.startswith("MPICH") and "OMPI_COMM_WORLD_SIZE" in os.environ:  # it would end the process by itself
            raise ArgumentError(
                "the mpirun that started this process is Open MPI's, and the MPI library that mpi4py loads is MPICH: "
                "take the mpirun of this Python environment."
            )
        MPI.Init_thread()
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise ArgumentError(
            "launcher 'mpi': this MPI library allows calls from the main thread alone, and gradients are summed by "
            "another while backward runs. Use one with MPI_THREAD_SERIALIZED, or start with torchrun."
        )
    return MPI
