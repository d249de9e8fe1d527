"""Symmetric products, how exactly they are taken, and the thread that scipy's BLAS may use.

Lives here: `gram`, `true_float32`, `one_thread`. Does not live here: factorisations (decompose.py), sums over batches
(moments.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any

import torch
from scipy.linalg import blas
from threadpoolctl import ThreadpoolController
from torch import Tensor

_BLOCK = 256  # columns of a block of a Gram matrix
_CORNER = 64  # of a block on the diagonal that is mirrored at once
_SYRK = {torch.float32: blas.ssyrk, torch.float64: blas.dsyrk}


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


def gram(rows_NC: Tensor) -> Tensor:
    """Return rowsᵀ @ rows, (channels, channels) in the dtype and on the device of the rows.

    torch has no symmetric product. On one thread BLAS's own does half the work of a full one; on several threads, and
    elsewhere, blocks of columns are multiplied, each pair once.

    Args: rows_NC: (rows, channels), float32 or float64 where it lies on the CPU.

    Example:
        >>> gram(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
        tensor([[ 1.,  2.],
                [ 2., 13.]])
    """
    if rows_NC.device.type == "cpu" and rows_NC.dtype in _SYRK and torch.get_num_threads() == 1:
        return _by_syrk(rows_NC.detach())
    num = rows_NC.shape[1]
    if num < 2 * _BLOCK:
        return rows_NC.T @ rows_NC
    out = torch.empty(num, num, dtype=rows_NC.dtype, device=rows_NC.device)
    for start in range(0, num, _BLOCK):
        stop = min(start + _BLOCK, num)
        torch.mm(rows_NC[:, start:stop].T, rows_NC[:, start:], out=out[start:stop, start:])
        out[stop:, start:stop] = out[start:stop, stop:].T
    return out


def _by_syrk(rows_NC: Tensor) -> Tensor:
    """Compute one triangle, mirror it block by block."""
    with one_thread():  # rows in C order are their own transpose in Fortran's: nothing is copied
        triangle = _SYRK[rows_NC.dtype](1.0, rows_NC.numpy().T, lower=1)
    out = torch.from_numpy(triangle.T)  # the upper one, zeros below
    num = out.shape[0]
    for start in range(0, num, _CORNER):
        stop = min(start + _CORNER, num)
        corner = out[start:stop, start:stop]
        corner += corner.triu(1).T
        out[stop:, start:stop] = out[start:stop, stop:].T
    return out
