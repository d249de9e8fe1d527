"""The processes that train one network together, and how they come to one decision.

Lives here: sums, votes and exchanges over all ranks, with one clear error when a rank is gone or disagrees. Does not
live here: what is summed or decided (observe, planner, operate).

Everything here is collective: all ranks call the same functions in the same order. Alone, each is the identity.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from apoptosis.errors import RankError

T = TypeVar("T")


class Ranks:
    """One process alone.

    Attributes: rank, size: of this process and of all. bytes_sent: by this rank in sums and exchanges so far.
    """

    rank = 0
    size = 1
    bytes_sent = 0

    def total(self, tensor: Tensor) -> Tensor:
        """Sum a float64 tensor over all ranks, bit for bit the same on every one; the result is a new tensor."""
        return tensor.clone()

    def gathered(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank."""
        return [value]

    def first(self, value: T) -> T:
        """Return rank 0's value."""
        return self.gathered(value)[0]

    def all(self, vote: bool) -> bool:
        """Whether all ranks vote yes."""
        return vote

    def fault(self, what: str) -> str:
        """Return the first rank's fault with its number, "" where no rank has one."""
        faults = self.gathered(what)
        bad = next((rank for rank, fault in enumerate(faults) if fault), None)
        if bad is None:
            return ""
        return faults[bad] if self.size == 1 else f"rank {bad}: {faults[bad]}"

    def same(self, what: str, value: dict[str, Any]) -> None:
        """Check that named values are equal on all ranks.

        Raises: RankError: some are not; rank and name are told.
        """
        for rank, other in enumerate(self.gathered(value)):
            names = [n for n in dict.fromkeys((*value, *other)) if value.get(n) != other.get(n)]
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise RankError(f"rank {rank} and rank {self.rank} differ in {what}: '{names[0]}'{more}.")


class TorchRanks(Ranks):
    """The ranks of a torch.distributed process group.

    Args: group: the process group, of DistributedDataParallel for one.
    """

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        self._dist, self._group = dist, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        nccl = "nccl" in str(dist.get_backend(group))
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def _call(self, what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        try:
            function(*args, group=self._group, **kwargs)
        except RuntimeError as error:
            seconds = time.perf_counter() - start
            raise RankError(
                f"rank {self.rank} of {self.size} lost another rank while it waited {seconds:.0f} s for {what}: "
                f"{str(error).splitlines()[0]}"
            ) from error

    def total(self, tensor: Tensor) -> Tensor:
        """Sum by all_reduce."""
        out = tensor.detach().to(self._device, torch.float64, copy=True).contiguous()
        self._call("a sum", self._dist.all_reduce, out)
        self.bytes_sent += out.numel() * out.element_size()
        return out.to(tensor.device)

    def gathered(self, value: T) -> list[T]:
        """Exchange by all_gather_object."""
        found: list[Any] = [None] * self.size
        self._call("an exchange", self._dist.all_gather_object, found, value)
        return found

    def all(self, vote: bool) -> bool:
        """Vote by one number."""
        votes = torch.tensor([float(vote)], device=self._device)
        self._call("a vote", self._dist.all_reduce, votes, op=self._dist.ReduceOp.MIN)
        return bool(votes.item())


def checksums(model: nn.Module) -> dict[str, int]:
    """Return one number per parameter that says which bits it holds, and where."""
    return {name: checksum(p) for name, p in model.named_parameters()}


def checksum(tensor: Tensor) -> int:
    """Return a number that two tensors share if they hold the same bits (and hardly ever if they do not)."""
    bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = bits[: len(bits) // 4 * 4].view(torch.int32).long()
    places = torch.arange(1, len(words) + 1, device=words.device)
    return int((words * (places * 2_654_435_761 % 4_294_967_291)).sum() + bits[len(words) * 4 :].long().sum())


def ranks_of(parallel: Sequence[Any]) -> Ranks:
    """Return the ranks that DistributedDataParallel modules around a model speak of; alone without any."""
    group = parallel[0].process_group if parallel else None
    return Ranks() if group is None or group.size() == 1 else TorchRanks(group)
