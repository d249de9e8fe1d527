"""What every data set turns into: tensors in memory (or mapped from a file) and how a batch is taken from them.

Holds: `Part` (examples with labels), `Dataset` (training, validation and test parts), and `Recipe` (how the former are
read). Elsewhere: file formats, downloads, or anything random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from apoptosis.errors import DataError
from apoptosis.tools.recipes.datasets.fetch import Source

MetricName = Literal["accuracy", "auc", "r2", "negative loss"]
Kind = Literal["classes", "values"]

# Standardised copies up to this size are made once; larger parts are standardised batch by batch.
RESIDENT_BYTES = 512 * 2**20
_CHUNK_ROWS = 65536
SPLIT_SEED = 0
TEST_SHARE = 0.2  # of data that bring no test part


class Rows(Protocol):
    """Examples and labels, of which batches are taken: `Part`, or what reads a data set of the user's own."""

    def __len__(self) -> int: ...

    @property
    def device(self) -> torch.device:
        """Where the index of a batch has to be."""

    def batches(self, indices: Iterable[Tensor]) -> Iterator[tuple[Any, Tensor]]:
        """Yield inputs and labels of the rows in every index."""

    def between(self, start: int, stop: int) -> tuple[Any, Tensor]:
        """Return inputs and labels of the rows start..stop."""

    def slices(self, size: int) -> Iterator[tuple[Any, Tensor]]:
        """Yield inputs and labels of all rows in order, so many at a time."""

    def rows(self, start: int, stop: int) -> Self:
        """Return the rows start..stop as a part of their own."""

    def resident(self, device: torch.device) -> Self:
        """Return a copy on `device` where that is possible."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """Examples and their labels.

    inputs: (rows, *shape), float32, or uint8 pixels; may be mapped from a file. labels: (rows,) int64, or values.
    shift, scale: broadcast against one example; a batch is `inputs * scale + shift` in float32. None: ready as is.
    """

    inputs: Tensor
    labels: Tensor
    shift: Tensor | None = None
    scale: Tensor | None = None

    def __len__(self) -> int:
        return self.labels.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the labels are, and with them the index of a batch."""
        return self.labels.device

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs (float32) and labels of the rows in `index` (int64, on the part's device)."""
        return self._standard(self.inputs.index_select(0, index)), self.labels.index_select(0, index)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and labels of the rows in every index."""
        return (self.take(index) for index in indices)

    def between(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return inputs (float32) and labels of the rows start..stop."""
        return self._standard(self.inputs[start:stop]), self.labels[start:stop]

    def slices(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and labels of all rows in order, so many at a time."""
        return (self.between(start, start + size) for start in range(0, len(self), size))

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

    shape: of one example, (features,) or (planes, height, width); () where an example is more than one tensor.
    num_classes: outputs of a network: classes, or numbers to predict; 0 where that is not known without it. metric:
    what a run on it reports; more is better. kind: whether labels are classes, or values (regression). notes: what the
    user should know of how it was read. fingerprint: of the contents, "" where they are known by name. about: plain
    values that a later use of the network needs: names of classes, columns and their statistics.
    """

    name: str
    shape: tuple[int, ...]
    num_classes: int
    metric: MetricName
    train: Rows
    validation: Rows
    test: Rows
    kind: Kind = "classes"
    notes: tuple[str, ...] = ()
    fingerprint: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)


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


def split_rows(labels: Tensor | None, num_rows: int, validation: float) -> tuple[Tensor, Tensor, Tensor]:
    """Choose training, validation and test rows: the same for the same number of rows (and labels), whatever the run.

    Every class gives its share to each of them, where classes have enough examples for that.

    Args:
        labels: (rows,) classes; None for rows without.
        num_rows: how many there are; a fifth becomes the test part.
        validation: share of the others that is held out.

    Returns: indices of rows, in an order that says nothing about their labels.

    Raises: DataError: too few rows for that.

    Example:
        >>> [len(part) for part in split_rows(None, 100, 0.1)]
        [72, 8, 20]
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(num_rows, generator=generator, device="cpu")
    groups = [order] if labels is None else [order[labels[order] == label] for label in torch.unique(labels)]
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for group in groups:
        num_test = round(len(group) * TEST_SHARE)
        num_held = round((len(group) - num_test) * validation)
        sizes = [len(group) - num_test - num_held, num_held, num_test]
        for part, rows in zip(parts, torch.split(group, sizes), strict=True):
            part.append(rows)
    train, held_out, test = (torch.cat(part) for part in parts)
    if labels is not None and (not len(test) or (validation > 0 and not len(held_out))):  # classes of few examples
        return split_rows(None, num_rows, validation)
    if len(train) < 2 or not len(test) or (validation > 0 and not len(held_out)):
        raise DataError(
            f"{num_rows} examples are too few to hold out a fifth for testing and a share of {validation} of the rest "
            "for validation."
        )
    mixed = (part[torch.randperm(len(part), generator=generator, device="cpu")] for part in (train, held_out, test))
    train, held_out, test = mixed
    return train, held_out, test


def first_rows(part: Tensor, train_rows: int | None) -> Tensor:
    """Return so many of the training rows, the first; None for all.

    Raises: DataError: there are fewer.
    """
    if train_rows is not None and train_rows > len(part):
        raise DataError(f"--train-rows: {train_rows} is more than the {len(part)} training rows that are there.")
    return part[:train_rows]


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
