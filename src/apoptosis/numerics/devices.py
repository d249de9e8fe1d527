"""Transfers that let the program go on while an accelerator works: nothing waits for it.

Holds: `to_async`, `is_async`, `sample_rows`. Elsewhere: which rows are taken (observe).
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_async(device: torch.device) -> bool:
    """Whether reading a number from a device makes the program wait for all work that is queued there."""
    return device.type not in ("cpu", "meta")


def to_async(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to a device; to an accelerator from pinned memory, without waiting."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def sample_rows(rows_NC: Tensor, good_N: Tensor, most: int, draws: torch.Generator) -> Tensor:
    """Return `most` rows, good ones before others and drawn evenly among them; where good ones are too few, zeros.

    No number is read from the device for it.

    Args:
        rows_NC: (rows, channels).
        good_N: (rows,) bool, on the same device.
        most: rows wanted; all where there are fewer.
        draws: of the CPU.

    Example:
        >>> rows = torch.tensor([[1.0], [float("nan")], [3.0]])
        >>> sample_rows(rows, rows.isfinite().all(1), 3, torch.Generator().manual_seed(0)).sort(0).values.T
        tensor([[0., 1., 3.]])
    """
    # millions of draws are made where the rows are
    seed = int(torch.randint(2**62, (1,), generator=draws, device="cpu").numpy()[0])
    own = torch.Generator(rows_NC.device).manual_seed(seed)
    keys = good_N.float() + torch.rand(len(rows_NC), generator=own, device=rows_NC.device, dtype=torch.float32) / 2
    chosen = keys.topk(min(most, len(rows_NC))).indices
    return torch.where(good_N[chosen, None], rows_NC[chosen], 0.0)
