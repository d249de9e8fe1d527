"""Data sets by name: `load_dataset("digits")` and the like.

Holds: the registry and the common way from a publisher's files to three standardised parts.
Elsewhere: the formats themselves (images, higgs, digits) or downloads (fetch).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from apoptosis.errors import ArgumentError
from apoptosis.tools.recipes.datasets import digits, higgs, images
from apoptosis.tools.recipes.datasets.fetch import default_data_dir
from apoptosis.tools.recipes.datasets.parts import Dataset, MetricName, Part, hold_out, standardised

__all__ = ["DATASETS", "Dataset", "Part", "default_data_dir", "load_dataset"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one data set is read: files -> (training, test), and what is known of it."""

    name: str
    read: Callable[[Path, int | None], tuple[Part, Part]]
    num_classes: int
    metric: MetricName = "accuracy"
    enlarged_rows: int | None = None


_RECIPES = (
    Recipe(
        name="digits",
        read=lambda folder, rows: digits.load_digits(),
        num_classes=10,
        enlarged_rows=digits.ENLARGED_ROWS,
    ),
    Recipe(name="mnist", read=lambda folder, rows: images.load_idx("mnist", folder), num_classes=10),
    Recipe(name="fashion-mnist", read=lambda folder, rows: images.load_idx("fashion-mnist", folder), num_classes=10),
    Recipe(name="cifar10", read=lambda folder, rows: images.load_cifar("cifar10", folder), num_classes=10),
    Recipe(name="cifar100", read=lambda folder, rows: images.load_cifar("cifar100", folder), num_classes=100),
    Recipe(name="higgs", read=higgs.load_higgs, num_classes=2, metric="auc"),
)
DATASETS: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _RECIPES})


def load_dataset(
    name: str,
    *,
    data_dir: Path | None = None,
    validation: float = 0.1,
    train_rows: int | None = None,
    test_rows: int | None = None,
) -> Dataset:
    """Read a data set, split it and standardise it by the statistics of its training rows.

    Args:
        name: a key of DATASETS.
        data_dir: where the publisher's files lie or are downloaded to; None for `default_data_dir()`.
        validation: share of the training split, its last rows, held out for choosing and for certificates; 0..0.9.
        train_rows: how many training rows to use (for digits: to enlarge to); None for all.
        test_rows: how many rows at the end of the file are the test split (higgs only); None for its default.

    Raises: ArgumentError: an unknown name. DataError: a file is missing, damaged or too small; the message names it.

    Example:
        >>> data = load_dataset("digits", train_rows=2000)
        >>> len(data.train), len(data.validation), len(data.test), data.shape
        (2000, 144, 359, (1, 8, 8))
    """
    if name not in DATASETS:
        raise ArgumentError(f"unknown data set '{name}'; there are {', '.join(DATASETS)}.")
    if test_rows is not None and name != "higgs":
        raise ArgumentError(f"test_rows is for higgs; the test split of {name} is fixed by its publisher.")
    recipe = DATASETS[name]
    train, test = recipe.read(default_data_dir() if data_dir is None else data_dir, test_rows)
    if recipe.enlarged_rows is None:
        train, held_out = hold_out(train, validation, train_rows)
    else:
        train, held_out = hold_out(train, validation)
        train = digits.enlarge(train, train_rows or recipe.enlarged_rows)
    shape = tuple(train.inputs.shape[1:])
    dims = (0,) if len(shape) == 1 else (0, 2, 3)
    train, held_out, test = standardised(train, held_out, test, dims=dims)
    return Dataset(
        name=name,
        shape=shape,
        num_classes=recipe.num_classes,
        metric=recipe.metric,
        train=train,
        validation=held_out,
        test=test,
    )
