"""How exactly products are taken, and the thread that scipy's BLAS may use.

Holds: `true_float32`, `one_thread`. Elsewhere: factorisations (decompose.py), sums over batches
(moments.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any

import torch
from threadpoolctl import ThreadpoolController


def one_thread() -> AbstractContextManager[object]:
    """Let scipy's BLAS work on one thread.

    Its waiting threads and torch's would fight for the same cores: with both at work, the products after a
    factorisation ran ten times slower on two cores than with one thread here.
    """
    limited: AbstractContextManager[object] = _controller().limit(limits=1, user_api="blas")
    return limited


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def true_float32(device: torch.device) -> Iterator[None]:
    """Matrix products in full float32 or float64: no autocast, no TF32 or bfloat16 shortcuts, user's flags restored.

    A product rounded to ten bits would put a floor of about 1e-3 under every relative residual.
    """
    read, write, exact = _float32_switch(device)
    before = read()
    shortcut = before not in ("ieee", "none", "highest", False)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            if shortcut:
                write(exact)
            yield
        finally:
            if shortcut:
                write(before)


def _float32_switch(device: torch.device) -> tuple[Callable[[], object], Callable[[Any], None], object]:
    """Return how to read and to set the precision of float32 products on a device, and its exact setting.

    Torch before 2.9 has no switch of its own for the CPU: there the one for the whole process decides.
    """
    backends: Any = torch.backends
    backend = backends.cuda.matmul if device.type == "cuda" else getattr(backends.mkldnn, "matmul", None)
    if backend is None:
        return torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"
    name, exact = ("fp32_precision", "ieee") if hasattr(backend, "fp32_precision") else ("allow_tf32", False)
    return partial(getattr, backend, name, exact), partial(setattr, backend, name), exact
