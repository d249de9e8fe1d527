"""Data of the user's own code, `--data package.module:factory`.

Holds: what a factory may return, and how batches are taken of it. Elsewhere: importing it (recipes.own).

The factory takes no arguments and returns one of

- a dataset: anything with a length whose items are (input, label), (input, input, ..., label), or a dict with the key
  "labels" or "label"; it is split here, a fifth for testing;
- a pair (training, test) or three (training, validation, test) of datasets or DataLoaders, or a dict of them by these
  names ("train", "validation", "test");
- two tensors or arrays, inputs and labels;
- in the place of a dataset, an iterable of batches, which is read once, into memory.

Labels that are whole numbers are classes, 0 to K - 1; floating-point numbers are values (regression).
"""

from __future__ import annotations

import random
import signal
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, TensorDataset, default_collate
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data.sampler import RandomSampler, SequentialSampler, SubsetRandomSampler

from apoptosis.errors import ApoptosisError, DataError
from apoptosis.storage.files import reason
from apoptosis.tools.recipes.datasets.parts import Dataset, Kind, Part, Rows, first_rows, split_rows
from apoptosis.tools.recipes.memory import available_memory
from apoptosis.tools.recipes.own import call_factory, what_went_wrong

PARTS = ("train", "validation", "test")
LABELS = ("labels", "label")
MEMORY_SHARE = 0.25  # of what is left, for batches that are read once
_FORM = (
    "return a dataset of (input, label), a pair (training, test) of datasets or DataLoaders, or a dict of them with "
    "the keys train, validation and test"
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OwnRows:
    """Rows of a map-style dataset, read batch by batch. What its items draw follows from which rows they are.

    source: its items. index: which of them, in order. collate: items -> a batch. workers: processes that read.
    """

    name: str
    source: Any
    index: Tensor
    collate: Callable[[list[Any]], Any] = default_collate
    workers: int = 0

    def __len__(self) -> int:
        return len(self.index)

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self.index.device

    def batches(self, indices: Iterable[Tensor]) -> Iterator[tuple[Any, Tensor]]:
        """Yield inputs and labels of the rows in every index, on the CPU.

        Raises: DataError: the user's code fails, or a process that reads is gone.
        """
        rows = [self.index[index].tolist() for index in indices]
        reader = _Reader(self.name, self.source, self.collate)
        with _disable_current_modes():
            ready = (
                iter(self._loader(reader, rows)) if self.workers and len(rows) > 1 else map(reader.__getitem__, rows)
            )
        for _ in rows:
            with _disable_current_modes():
                try:
                    found = next(ready)
                except RuntimeError as error:  # the system killed one, most often for memory
                    raise DataError(f"{self.name}: {reason(error)[:200]}") from error
            if isinstance(found, DataError):
                raise found
            yield found

    def _loader(self, reader: _Reader, rows: list[list[int]]) -> DataLoader[Any]:
        return DataLoader(
            reader,
            sampler=rows,
            batch_size=None,
            num_workers=min(self.workers, len(rows)),
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # the global one is that of dropout
        )

    def between(self, start: int, stop: int) -> tuple[Any, Tensor]:
        """Return inputs and labels of the rows start..stop."""
        return next(self.batches([torch.arange(start, min(stop, len(self)), device="cpu")]))

    def slices(self, size: int) -> Iterator[tuple[Any, Tensor]]:
        """Yield inputs and labels of all rows in order, so many at a time."""
        return self.batches(
            torch.arange(start, min(start + size, len(self)), device="cpu") for start in range(0, len(self), size)
        )

    def rows(self, start: int, stop: int) -> OwnRows:
        """Return the rows start..stop as a part of their own."""
        return replace(self, index=self.index[start:stop])

    def resident(self, device: torch.device) -> OwnRows:
        """Return itself: items are read when they are needed."""
        return self


class _Reader(TorchDataset[Any]):
    """Reads one batch: `reader[rows]`; random numbers are those of the rows, and the global generators stay."""

    def __init__(self, name: str, source: Any, collate: Callable[[list[Any]], Any]) -> None:
        self._name, self._source, self._collate = name, source, collate

    def __getitem__(self, rows: list[int]) -> tuple[Any, Tensor] | DataError:
        """Return a batch, or what is wrong: an error that leaves a process as such takes its traceback along."""
        try:
            return self._read(rows)
        except DataError as error:
            return error

    def _read(self, rows: list[int]) -> tuple[Any, Tensor]:
        with drawn_from(zlib.crc32(np.array(rows, dtype=np.int64).tobytes())):
            try:
                at_once = getattr(self._source, "__getitems__", None)
                items = list(at_once(rows)) if at_once else [self._source[row] for row in rows]
                batch = self._collate(items)
            except ApoptosisError:
                raise
            except Exception as error:  # the user's code may raise anything
                raise DataError(
                    f"{self._name}: a batch of rows {rows[:3]} ... fails: {what_went_wrong(error)}"
                ) from error
        return in_two(self._name, batch)


def _ignore_interrupts(_: int) -> None:
    """Leave an interrupt, which a terminal sends to all processes, to the one that trains: it writes a checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Seed the generators of torch (CPU), numpy and Python inside; they go on afterwards as if nothing had been."""
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])


def in_two(name: str, batch: Any) -> tuple[Any, Tensor]:
    """Return inputs (a tensor, a tuple of arguments or a dict of keyword arguments) and labels of a batch.

    Raises: DataError: it has no labels, or these are no numbers; says what it is, and what it should be.

    Example:
        >>> inputs, labels = in_two("data", {"x": torch.zeros(2, 3), "labels": torch.tensor([0, 1])})
        >>> list(inputs), labels
        (['x'], tensor([0, 1]))
    """
    if isinstance(batch, Mapping):
        key = next((key for key in LABELS if key in batch), None)
        if key is None:
            raise DataError(f"{name}: a batch has the keys {', '.join(map(str, batch))}, and none of them is 'labels'.")
        inputs: Any = {k: value for k, value in batch.items() if k != key}
        labels = batch[key]
    elif isinstance(batch, tuple | list) and len(batch) >= 2:
        *given, labels = batch
        inputs = given[0] if len(given) == 1 else tuple(given)
        if isinstance(inputs, list):
            inputs = tuple(inputs)
    else:
        raise DataError(f"{name}: an item is a {type(batch).__name__}; it should be (input, label) or have 'labels'.")
    if isinstance(labels, np.ndarray):
        labels = torch.from_numpy(labels)
    if not isinstance(labels, Tensor):
        kind = f"texts such as '{labels[0]}'" if isinstance(labels, list | tuple) and labels and isinstance(
            labels[0], str) else f"of type {type(labels).__name__}"  # fmt: skip
        raise DataError(f"{name}: labels are {kind}: give classes as numbers 0 to K - 1, or values.")
    if labels.is_complex():
        raise DataError(f"{name}: labels are complex numbers, which are neither classes nor values.")
    return inputs, labels.to(torch.float32) if labels.is_floating_point() else labels.to(torch.int64)


def load_own(spec: str, *, validation: float = 0.1, train_rows: int | None = None) -> Dataset:
    """Call a factory and make three parts of what it returns.

    Args: spec: package.module:factory. validation, train_rows: as in load_dataset.

    Raises: ArgumentError: it cannot be called. DataError: what it returns is no data, or too little.
    """
    name = f"'{spec}'"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # a split of its own is the same in every run
        made = call_factory(spec)
    notes: list[str] = []
    given = {part: _rows_of(f"{name} ({part})" if len(named) > 1 else name, data, notes)
             for named in [_by_part(name, made)] for part, data in named.items()}  # fmt: skip
    parts = [_in_memory(part) for part in _three(name, given, validation, train_rows)]
    inputs, labels = parts[0].between(0, 2)
    kind: Kind = "values" if labels.is_floating_point() else "classes"
    shape = tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else ()
    split = "as the factory says" if "test" in given else "split here, the same every time"
    sizes = ", ".join(f"{len(part):,}" for part in parts)
    notes.insert(0, f"{name}: {sizes} examples for training, validation and testing ({split}), predicted are {kind}")
    return Dataset(
        name=spec,
        shape=shape,
        num_classes=_num_outputs(parts, labels, kind) if shape else 0,
        metric="accuracy" if kind == "classes" else "r2",
        train=parts[0],
        validation=parts[1],
        test=parts[2],
        kind=kind,
        notes=tuple(notes),
    )


def _by_part(name: str, made: Any) -> dict[str, Any]:
    """Return what was made by the names of parts: "train" alone where it is to be split."""
    if isinstance(made, Mapping):
        known = {str(key): value for key, value in made.items() if value is not None}
        if "train" not in known or known.keys() - set(PARTS):
            raise DataError(f"{name} returns a dict with the keys {', '.join(map(str, made))}: {_FORM}.")
        return known
    if isinstance(made, tuple | list) and 2 <= len(made) <= 3:
        if len(made) == 2 and all(isinstance(one, Tensor | np.ndarray) for one in made):
            tensors = [one if isinstance(one, Tensor) else torch.from_numpy(np.ascontiguousarray(one)) for one in made]
            if len(tensors[0]) != len(tensors[1]):
                raise DataError(f"{name} returns {len(tensors[0])} inputs and {len(tensors[1])} labels.")
            return {"train": TensorDataset(*tensors)}
        if all(_is_data(one) for one in made):
            return dict(zip(PARTS if len(made) == 3 else ("train", "test"), made, strict=True))
    return {"train": made}


def _is_data(one: Any) -> bool:
    plain = isinstance(one, Tensor | np.ndarray | str | Mapping | tuple | int | float)
    items = hasattr(one, "__getitem__") and hasattr(one, "__len__")
    return not plain and (isinstance(one, DataLoader | IterableDataset) or items or hasattr(one, "__iter__"))


def _rows_of(name: str, data: Any, notes: list[str]) -> Rows:
    """Return the rows of a dataset, a DataLoader or an iterable of batches."""
    if isinstance(data, DataLoader):
        return _rows_of_loader(name, data, notes)
    if isinstance(data, IterableDataset):
        return _read_once(name, DataLoader(data, batch_size=256))
    if _is_data(data) or isinstance(data, tuple):
        if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
            return OwnRows(name=name, source=data, index=torch.arange(len(data), device="cpu"))
        return _read_once(name, data)
    raise DataError(f"{name} returns a {type(data).__name__}, which is no data: {_FORM}.")


def _rows_of_loader(name: str, loader: DataLoader[Any], notes: list[str]) -> Rows:
    """Return the rows of a DataLoader: its dataset, its way to make batches, its processes; not its order."""
    data = loader.dataset
    if isinstance(data, IterableDataset) or loader.batch_sampler is None:
        return _read_once(name, loader)
    sampler: Any = loader.sampler if type(loader.batch_sampler) is BatchSampler else loader.batch_sampler
    if isinstance(sampler, SubsetRandomSampler):
        index = torch.as_tensor(list(sampler.indices), dtype=torch.int64, device="cpu")
    elif isinstance(sampler, SequentialSampler) or (isinstance(sampler, RandomSampler) and not sampler.replacement):
        index = torch.arange(len(data), device="cpu")  # type: ignore[arg-type]
    else:
        raise DataError(
            f"{name}: the order of its {type(sampler).__name__} is not followed, as a run draws its own, which can be "
            "resumed and compared: give the dataset, or a DataLoader with shuffle=True."
        )
    if name.endswith((PARTS[0] + ")", "'")):  # the others are read in order
        notes.append(f"{name}: examples are drawn anew in every epoch; --batch, and not the DataLoader, sets the batch")
    return OwnRows(name=name, source=data, index=index, collate=loader.collate_fn, workers=loader.num_workers)


def _read_once(name: str, batches: Iterable[Any]) -> Part:
    """Read all batches into memory.

    Raises: DataError: they hold no tensors, differ in shape, or are more than fits.
    """
    found: list[tuple[Tensor, Tensor]] = []
    size, most = 0, MEMORY_SHARE * (available_memory() or 2**34)
    try:
        for batch in batches:
            inputs, labels = in_two(name, batch)
            if not isinstance(inputs, Tensor):
                raise DataError(
                    f"{name}: batches that are read once hold one tensor of inputs: give a dataset instead."
                )
            found.append((inputs, labels))
            size += inputs.numel() * inputs.element_size() + 8 * labels.numel()
            if size > most:
                raise DataError(
                    f"{name}: its batches do not end within {most / 2**30:.1f} GiB, a quarter of the memory "
                    "that is left: give a dataset, whose items are read when they are needed."
                )
        if not found:
            raise DataError(f"{name} holds no batches.")
        return Part(inputs=torch.cat([one for one, _ in found]), labels=torch.cat([one for _, one in found]))
    except ApoptosisError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise DataError(f"{name}: its batches cannot be read: {what_went_wrong(error)}") from error


def _three(name: str, given: Mapping[str, Rows], validation: float, train_rows: int | None) -> list[Rows]:
    """Return training, validation and test part; what was not given is split off the training examples."""
    train = given["train"]
    for part, rows in given.items():
        if len(rows) < (2 if part == "train" else 1):
            raise DataError(f"{name}: {len(rows)} examples for {part} are too few.")
    if "test" in given and "validation" in given:
        return [_picked(train, first_rows(torch.arange(len(train), device="cpu"), train_rows)),
                given["validation"], given["test"]]  # fmt: skip
    if "test" in given:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0), device="cpu")
        num_held = round(len(train) * validation)
        if len(train) - num_held < 2 or (validation > 0 and not num_held):
            raise DataError(f"{name}: {len(train)} training examples are too few to hold out a share of {validation}.")
        index = first_rows(order[num_held:], train_rows)
        return [_picked(train, index), _picked(train, order[:num_held]), given["test"]]
    index, held_out, test = split_rows(None, len(train), 0.0 if "validation" in given else validation)
    held = given["validation"] if "validation" in given else _picked(train, held_out)
    return [_picked(train, first_rows(index, train_rows)), held, _picked(train, test)]


def _picked(rows: Rows, index: Tensor) -> Rows:
    if isinstance(rows, OwnRows):
        return replace(rows, index=rows.index[index])
    assert isinstance(rows, Part)
    return Part(inputs=rows.inputs[index], labels=rows.labels[index])


def _in_memory(rows: Rows) -> Rows:
    """Return rows of two tensors as these, without a detour over single items."""
    if not isinstance(rows, OwnRows) or type(rows.source) is not TensorDataset or rows.collate is not default_collate:
        return rows
    tensors = tuple(tensor[rows.index] for tensor in rows.source.tensors)
    inputs, labels = in_two(rows.name, tensors)
    return Part(inputs=inputs, labels=labels) if isinstance(inputs, Tensor) else rows


def _num_outputs(parts: Iterable[Rows], labels: Tensor, kind: str) -> int:
    """Return how many numbers a network has to return, 0 where that takes reading every example."""
    if kind == "values":
        return int(labels.shape[1]) if labels.dim() == 2 else 1 if labels.dim() == 1 else 0
    if labels.dim() != 1 or not all(isinstance(part, Part) for part in parts):
        return 0
    return 1 + max(int(part.labels.max()) for part in parts if isinstance(part, Part) and len(part))
