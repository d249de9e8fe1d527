"""The processes that train one network together, and how they come to one decision.

Holds: sums, votes and exchanges over all ranks, with one clear error when a rank is gone, fails or disagrees.
Elsewhere: what is summed or decided (observe, planner, engine).

Everything here is collective: all ranks call the same functions in the same order. Alone, each is the identity.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apoptosis.distributed.protocol import kind_of
from apoptosis.distributed.sharded import is_sharded
from apoptosis.distributed.wrappers import group_of
from apoptosis.errors import NonFiniteError, RankError

T = TypeVar("T")
SUM_NUMBERS = 2**22  # float64 that travel in one sum at most, 32 MiB: what a process holds twice meanwhile
_CHUNK = 2**20  # words of a parameter that are multiplied at once for its checksum


class _Ended(NamedTuple):
    """How a rank's work inside `Ranks.run_collectively` ended.

    fault: None, or (not finite, its repr, its text) of what it failed with.
    """

    fault: tuple[bool, str, str] | None


class Ranks:
    """One process alone.

    Attributes: rank, size: of this process and of all. bytes_sent: by this rank in sums so far.
    """

    rank = 0
    size = 1
    bytes_sent = 0

    def total(self, tensor: Tensor) -> Tensor:
        """Sum a float64 tensor over all ranks, bit for bit the same on every one; the result is a new tensor."""
        return tensor.clone()

    def range_of(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least and the largest of every number over all ranks."""
        return tensor, tensor

    def gathered(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank; tensors in them must lie on the CPU."""
        return [value]

    def gathered_tensors(self, value: T, device: torch.device) -> list[T]:
        """Return values that hold tensors, wherever these lie; what comes from others lies on `device`."""
        if self.size == 1:
            return [value]
        written = io.BytesIO()
        torch.save(value, written)
        found = self.gathered(written.getvalue())
        return [torch.load(io.BytesIO(one), map_location=device, weights_only=False) for one in found]

    def first(self, value: T) -> T:
        """Return rank 0's value."""
        return self.gathered(value)[0]

    def all(self, vote: bool) -> bool:
        """Whether all ranks vote yes."""
        return vote

    def any(self, vote: bool) -> bool:
        """Whether one rank votes yes."""
        return not self.all(not vote)

    def first_error(self, what: str) -> str:
        """Return the first rank's fault with its number, "" where no rank has one."""
        faults = self.gathered(what)
        bad = next((rank for rank, fault in enumerate(faults) if fault), None)
        if bad is None:
            return ""
        return faults[bad] if self.size == 1 else f"rank {bad}: {faults[bad]}"

    def run_collectively(self, work: Callable[[], T]) -> T:
        """Do the same on every rank; where it fails on one it fails on all, so that no rank waits for one that is gone.

        Raises: NonFiniteError: on all ranks, where one raises it. Else the error itself on the rank that has it, and
        RankError on the others.
        """
        if self.size == 1:
            return work()
        error: Exception | None = None
        found: list[T] = []
        try:
            found.append(work())
        except Exception as caught:
            if getattr(caught, "reported", False):  # a rank has failed in this same work, and said so
                raise
            error = caught
        fault = None if error is None else (isinstance(error, NonFiniteError), repr(error), str(error))
        reported = self.gathered(_Ended(fault))
        ended = [(rank, one.fault) for rank, one in enumerate(reported) if isinstance(one, _Ended)]
        for rank, fault in ended:
            if fault is not None and fault[0]:
                raise NonFiniteError(f"rank {rank}: {fault[2]}") from error
        if error is not None:
            raise error
        for rank, fault in ended:
            if fault is not None:
                raise RankError(f"rank {rank} of {self.size} failed, so rank {self.rank} cannot go on: {fault[1]}")
        if len(ended) < self.size:
            raise RankError(
                f"rank {self.rank} of {self.size} has finished work that other ranks have not: they made other "
                "calls, or in another order. Call step(), save and load equally often on all ranks."
            )
        return found[0]

    def _heard(self, value: T, found: list[T]) -> list[T]:
        """Return what was exchanged, unless a rank reported the end of work that this one is still at.

        Raises: RankError: one did: it failed there.
        """
        for rank, other in enumerate(found if not isinstance(value, _Ended) else ()):
            if isinstance(other, _Ended):
                why = "" if other.fault is None else f": {other.fault[1]}"
                error = RankError(f"rank {rank} of {self.size} failed, so rank {self.rank} cannot go on{why}")
                error.reported = True
                raise error
        return found

    def same(self, what: str, value: dict[str, Any], remedy: str = "All ranks need the same.") -> None:
        """Check that named values are equal on all ranks.

        Raises: RankError: some are not; rank and name are given.
        """
        for rank, other in enumerate(self.gathered(value)):
            names = [n for n in dict.fromkeys((*value, *other)) if value.get(n) != other.get(n)]
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise RankError(f"rank {rank} and rank {self.rank} differ in {what}: '{names[0]}'{more}. {remedy}")

    def same_parameters(self, when: str, model: nn.Module) -> None:
        """Check that all parameters hold the same bits on all ranks.

        Raises: RankError: some do not; rank and parameter are given.
        """
        if self.size == 1:
            return
        sums = checksums(model)
        numbers = torch.tensor([*sums.values(), len(sums)], dtype=torch.int64, device="cpu")
        least, most = self.range_of(numbers[-1:])
        equal = bool((least == most).all())
        if equal:
            least, most = self.range_of(numbers)
            equal = bool((least == most).all())
        if not equal:
            remedy = (
                "Begin with the same weights on all ranks, and average all gradients (DistributedDataParallel does)."
            )
            self.same(f"parameters {when}", sums, remedy)


class TorchRanks(Ranks):
    """The ranks of a torch.distributed process group.

    Args: group: the process group, of DistributedDataParallel for one. device: where the model lies.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        nccl, host = "nccl" in str(dist.get_backend(group)), torch.device("cpu")
        self._device = device if nccl else host
        # A vote after a step should not wait for the step: where the group has gloo beside NCCL, numbers of the CPU go
        # by gloo.
        self._ballot = host if any(each.type == "cpu" for each in getattr(group, "_device_types", ())) else self._device

    def _here(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _call(self, what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        try:
            with self._here():
                function(*args, group=self._group, **kwargs)
                if isinstance(args[0], Tensor) and args[0].is_cuda:
                    torch.cuda.synchronize(self._device)  # else the error of a lost rank comes up somewhere else
        except RuntimeError as error:
            seconds = time.perf_counter() - start
            raise RankError(
                f"rank {self.rank} of {self.size} lost another rank while it waited {seconds:.0f} s for {what}: "
                f"{str(error).splitlines()[0]}"
            ) from error

    def _place(self, tensor: Tensor) -> torch.device:
        return self._ballot if tensor.device.type == "cpu" else self._device

    def total(self, tensor: Tensor) -> Tensor:
        """Sum by all_reduce, SUM_NUMBERS at once."""
        out = tensor.detach().to(self._place(tensor), torch.float64, copy=True).contiguous()
        for part in torch.split(out.view(-1), SUM_NUMBERS):
            self._call("a sum", dist.all_reduce, part)
        self.bytes_sent += out.numel() * out.element_size()
        return out.to(tensor.device)

    def range_of(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Compare by two reductions."""
        low, high = (tensor.detach().to(self._place(tensor), copy=True).contiguous() for _ in range(2))
        self._call("a comparison", dist.all_reduce, low, op=dist.ReduceOp.MIN)
        self._call("a comparison", dist.all_reduce, high, op=dist.ReduceOp.MAX)
        return low.to(tensor.device), high.to(tensor.device)

    def gathered(self, value: T) -> list[T]:
        """Exchange by all_gather_object."""
        found: list[Any] = [None] * self.size
        self._call("an exchange", dist.all_gather_object, found, value)
        return self._heard(value, found)

    def all(self, vote: bool) -> bool:
        """Vote by one number."""
        votes = torch.tensor([float(vote)], device=self._ballot, dtype=torch.float32)
        self._call("a vote", dist.all_reduce, votes, op=dist.ReduceOp.MIN)
        return bool(votes.item())


def checksums(model: nn.Module) -> dict[str, int]:
    """Return one number per parameter that says which bits it holds, and where.

    Of a sharded one it says the shape alone: every rank holds other bits of it.
    """
    return {
        name: checksum(torch.tensor(p.shape, dtype=torch.int64, device="cpu") if is_sharded(p) else p)
        for name, p in model.named_parameters()
    }


def checksum(tensor: Tensor) -> int:
    """Return a number that two tensors share if they hold the same bits (and hardly ever if they do not)."""
    flat = tensor.detach().contiguous().reshape(-1)
    bits = (flat.clone() if flat.storage_offset() * flat.element_size() % 4 else flat).view(torch.uint8)
    words = bits[: len(bits) // 4 * 4].view(torch.int32)
    found = int(bits[len(words) * 4 :].long().sum())
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK].long()
        places = torch.arange(start + 1, start + 1 + len(part), device=part.device)
        found += int((part * (places * 2_654_435_761 % 4_294_967_291)).sum())
    return (found + 2**63) % 2**64 - 2**63


def ranks_of(wrappers: Iterable[nn.Module], model: nn.Module) -> Ranks:
    """Return the ranks that train a model together; alone where it has no process group.

    Where a wrapper has its gradients summed by other ranks (of MPI, say), events use them too.

    Args: wrappers: around the model, outermost first. model: without them.
    """
    group = group_of(wrappers, model)
    if group is None or group.size() == 1:
        return Ranks()
    other = next((found for each in wrappers if (found := kind_of(each).ranks(each)) is not None), None)
    return other or TorchRanks(group, next(model.parameters()).device)
