"""Data sets by name: `load_dataset("digits")` and the like.

Holds: the table of data sets and the common way from a publisher's files to three standardised parts. A data set in a
format that is known already is one entry of the table. Elsewhere: formats (images, higgs, digits), downloads (fetch).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from apoptosis.errors import ArgumentError
from apoptosis.tools.recipes.datasets import digits, higgs
from apoptosis.tools.recipes.datasets.fetch import default_data_dir
from apoptosis.tools.recipes.datasets.images import cifar, idx
from apoptosis.tools.recipes.datasets.parts import Dataset, Part, Recipe, hold_out, standardised

__all__ = ["DATASETS", "Dataset", "Part", "default_data_dir", "load_dataset"]

_RECIPES = (
    digits.RECIPE,
    idx(
        "mnist",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    idx(
        "fashion-mnist",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",  # its former address has no https
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    cifar(
        "cifar10",
        "cifar-10-batches-bin",
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        files=(*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"),
    ),
    cifar(
        "cifar100",
        "cifar-100-binary",
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        files=("train.bin", "test.bin"),
        label_bytes=2,
        num_classes=100,
    ),
    higgs.RECIPE,
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
    recipe = DATASETS[name]
    if test_rows is not None and not recipe.takes_test_rows:
        takers = ", ".join(r.name for r in _RECIPES if r.takes_test_rows)
        raise ArgumentError(f"test_rows is for {takers}; the test split of {name} is fixed by its publisher.")
    train, test = recipe.read(default_data_dir() if data_dir is None else data_dir, test_rows)
    train, held_out = hold_out(train, validation, None if recipe.enlarge else train_rows)
    if recipe.enlarge is not None:
        train = recipe.enlarge(train, train_rows)
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
