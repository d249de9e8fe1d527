"""Whether there is memory for tensors that are about to be made.

Holds: the refusal of tensors larger than the memory that is left, and how torch says that fake tensors have no numbers.
Elsewhere: fake tensors (graph.trace.fakes).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import UnsupportedFakeTensorException

from apoptosis.errors import ArgumentError
from apoptosis.model.dispatch import DispatchMode

LARGE_BYTES = 2**24  # tensors below are not asked about
SPARE = 0.9  # of the memory that is left may be taken
_READS = re.compile(
    r"DataDependentOutput|DynamicOutputShape|not supported for tensor subclasses|_local_scalar_dense|"
    r"data-dependent|no data pointer|FakeTensor"
)


def needs_numbers(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that a tensor without numbers was asked for some."""
    while error is not None:
        if isinstance(error, UnsupportedFakeTensorException) or _READS.search(f"{type(error).__name__} {error}"):
            return True
        error = error.__cause__ or error.__context__
    return False


def available_memory() -> int | None:
    """Return the bytes of memory that this machine has left, None where that is not known."""
    info = Path("/proc/meminfo")
    if info.exists():
        found = re.search(r"^MemAvailable:\s+(\d+) kB", info.read_text(), flags=re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return None


class _Metered(DispatchMode):
    """Asks before every large tensor is made from nothing; those computed from others are about as large."""

    def __init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        size = args[0] if args and isinstance(args[0], list | tuple) else ()
        if size and all(isinstance(s, int) for s in size):
            dtype = (kwargs or {}).get("dtype") or torch.get_default_dtype()
            check_memory(math.prod(size) * dtype.itemsize, "a network with real weights")
        return func(*args, **(kwargs or {}))


def check_memory(size: int, what: str) -> None:
    """Refuse to make a tensor for which there is no memory, before the system ends the process.

    Args: size: bytes. what: the tensor is for.

    Raises: ArgumentError: says how much there is.
    """
    if size < LARGE_BYTES:
        return
    left = available_memory()
    if left is not None and size > SPARE * left:
        raise ArgumentError(
            f"{what} does not fit into memory: a tensor of {size / 2**30:.1f} GiB is asked for, and "
            f"{left / 2**30:.1f} GiB are left."
        )


@contextmanager
def within_memory() -> Iterator[None]:
    """Refuse large tensors that are made inside when memory does not suffice (ArgumentError)."""
    with _Metered():
        yield
