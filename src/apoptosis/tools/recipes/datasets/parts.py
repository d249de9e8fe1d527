"""What every data set turns into: tensors in memory (or mapped from a file) and how a batch is taken from them.

Holds: `Part` (examples with labels), `Dataset` (training, validation and test parts), and `Recipe` (how the former are
read). Elsewhere: file formats, downloads, or anything random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from apoptosis.errors import DataError
from apoptosis.tools.recipes.datasets.fetch import Source

MetricName = Literal["accuracy", "auc"]

# Standardised copies up to this size are made once; larger parts are standardised batch by batch.
RESIDENT_BYTES = 512 * 2**20
_CHUNK_ROWS = 65536


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """Examples and their labels.

    inputs: (rows, *shape), float32, or uint8 pixels; may be mapped from a file. labels: (rows,) int64.
    shift, scale: broadcast against one example; a batch is `inputs * scale + shift` in float32. None: ready as is.
    """

    inputs: Tensor
    labels: Tensor
    shift: Tensor | None = None
    scale: Tensor | None = None

    def __len__(self) -> int:
        return self.labels.shape[0]

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs (float32) and labels of the rows in `index` (int64, on the part's device)."""
        return self._standard(self.inputs.index_select(0, index)), self.labels.index_select(0, index)

    def between(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return inputs (float32) and labels of the rows start..stop."""
        return self._standard(self.inputs[start:stop]), self.labels[start:stop]

    def rows(self, start: int, stop: int) -> Part:
        """Return the rows start..stop as a part of their own, sharing memory."""
        return replace(self, inputs=self.inputs[start:stop], labels=self.labels[start:stop])

    def resident(self, device: torch.device, limit_bytes: int = RESIDENT_BYTES) -> Part:
        """Return a copy on `device`, already standardised, where that fits in `limit_bytes`; else what can be moved.

        A part too large even as it is stays where it is; batches are moved one by one.
        """
        if self.inputs.numel() * 4 <= limit_bytes:
            inputs = self._standard(self.inputs).to(device).contiguous()
            return Part(inputs=inputs, labels=self.labels.to(device))
        if device.type == "cpu" or self.inputs.numel() * self.inputs.element_size() > 4 * limit_bytes:
            return self
        shift, scale = (None if t is None else t.to(device) for t in (self.shift, self.scale))
        return Part(inputs=self.inputs.to(device), labels=self.labels.to(device), shift=shift, scale=scale)

    def _standard(self, inputs: Tensor) -> Tensor:
        if self.scale is None or self.shift is None:
            return inputs
        return torch.addcmul(self.shift, inputs.to(torch.float32), self.scale)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dataset:
    """One data set, split once: training, validation (may be empty) and test parts.

    shape: of one example, (features,) or (planes, height, width). metric: what a run on it reports, in 0..1.
    """

    name: str
    shape: tuple[int, ...]
    num_classes: int
    metric: MetricName
    train: Part
    validation: Part
    test: Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one data set is read.

    read: (data folder, rows of the test split or None) -> (training, test). takes_test_rows: whether the test split may
    have another number of rows. sources: the publisher's files. enlarge: (training part, rows or None) -> a larger one.
    """

    name: str
    read: Callable[[Path, int | None], tuple[Part, Part]]
    num_classes: int
    metric: MetricName = "accuracy"
    sources: tuple[Source, ...] = ()
    takes_test_rows: bool = False
    enlarge: Callable[[Part, int | None], Part] | None = None


def standardised(train: Part, *others: Part, dims: tuple[int, ...]) -> tuple[Part, ...]:
    """Give all parts the shift and scale that make the *training* part's mean 0 and variance 1 over `dims`.

    Args:
        train: the part whose statistics count, without validation and test rows.
        others: parts that get the same shift and scale.
        dims: dimensions of `inputs` to average over; 0 (the rows) among them.

    Returns: the parts in the order given. A constant feature keeps scale 1.
    """
    total = square = torch.zeros((), dtype=torch.float64, device="cpu")
    count = 0
    for start in range(0, len(train), _CHUNK_ROWS):
        chunk = train.inputs[start : start + _CHUNK_ROWS].to(torch.float64)
        total = total + chunk.sum(dims, keepdim=True)
        square = square + chunk.square().sum(dims, keepdim=True)
        count += chunk.numel() // (total.numel())
    mean = total / count
    deviation = (square / count - mean.square()).clamp_min(0).sqrt()
    deviation = torch.where(deviation > 1e-6 * (1 + mean.abs()), deviation, torch.ones_like(deviation))
    scale = (1 / deviation)[0].to(torch.float32)
    shift = (-mean / deviation)[0].to(torch.float32)
    return tuple(replace(part, shift=shift, scale=scale) for part in (train, *others))


def hold_out(part: Part, share: float, train_rows: int | None = None) -> tuple[Part, Part]:
    """Split a training part: its last `share` of rows is the validation part; the rest, or `train_rows` of it, trains.

    Args:
        part: rows in an order that says nothing about their labels.
        share: in 0..1 (1 excluded); 0 gives an empty validation part.
        train_rows: how many of the remaining rows to keep, from the first; None for all.

    Raises: DataError: fewer rows remain than `train_rows`, or none.
    """
    num_validation = round(len(part) * share)
    num_train = len(part) - num_validation
    if num_train < 1 or (share > 0 and num_validation < 1):
        raise DataError(f"{len(part)} training rows are too few to hold out a share of {share} for validation.")
    if train_rows is not None and train_rows > num_train:
        raise DataError(f"--train-rows: {train_rows} is more than the {num_train} training rows that are there.")
    return part.rows(0, train_rows or num_train), part.rows(num_train, len(part))
