"""The data of a run, by what `--data` names.

Holds: which reader takes it, which options belong to which, and what a network of the library's has to know of it.
Elsewhere: the readers (datasets).
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import torch

from apoptosis.errors import ArgumentError, DataError
from apoptosis.tools.recipes.config import CSV, IMAGES, RunConfig
from apoptosis.tools.recipes.datasets import DATASETS, Dataset, load_dataset
from apoptosis.tools.recipes.datasets.folders import load_images
from apoptosis.tools.recipes.datasets.own import load_own
from apoptosis.tools.recipes.datasets.parts import Rows
from apoptosis.tools.recipes.datasets.table import load_table
from apoptosis.tools.recipes.own import find_object

_OWN_OPTIONS = {"label": CSV, "drop": CSV, "task": CSV, "size": IMAGES}
_OF_NETWORKS = ("network", "widths", "activation", "dropout")


def load_data(config: RunConfig) -> Dataset:
    """Read the data of a run and split them.

    Raises: ArgumentError, DataError: they are not there, are damaged or too few, or an option belongs to others.
    """
    check_options(config)
    if config.data in DATASETS:
        return load_dataset(
            config.data,
            data_dir=None if config.data_dir is None else Path(config.data_dir),
            test_rows=config.test_rows,
            validation=config.validation,
            train_rows=config.train_rows,
        )
    if config.data.startswith(IMAGES):
        data = load_images(_path(config, IMAGES), size=config.size, validation=config.validation,
                           train_rows=config.train_rows)  # fmt: skip
    elif config.data.startswith(CSV):
        data = load_table(_path(config, CSV), config.label, drop=config.drop, task=config.task,
                          validation=config.validation, train_rows=config.train_rows)  # fmt: skip
    else:
        data = load_own(config.data, validation=config.validation, train_rows=config.train_rows)
    if data.kind == "values" and config.budget is not None:
        raise ArgumentError("--budget counts predictions of classes that become wrong, and these data have values.")
    if config.loss is not None:
        data = replace(data, metric="negative loss")
    data = data if data.num_classes or not _asks_for_classes(config) else _counted(data)
    if data.kind == "classes" and data.num_classes == 1:
        raise DataError(f"'{config.data}': all labels are the same class: there is nothing to learn.")
    return data


def check_options(config: RunConfig) -> None:
    """Refuse options that belong to other data, or to another network.

    Raises: ArgumentError: names the option.
    """
    fresh = RunConfig.checked()
    for name, owner in _OWN_OPTIONS.items():
        if getattr(config, name) != getattr(fresh, name) and not config.data.startswith(owner):
            raise ArgumentError(f"--{name} is for --data {owner}..., and --data is '{config.data}'.")
    if config.data not in DATASETS:
        for name in ("data_dir", "test_rows"):
            if getattr(config, name) is not None:
                raise ArgumentError(f"--{name.replace('_', '-')} is for data sets that are known by name.")
    if config.model is None and config.kwargs != fresh.kwargs:
        raise ArgumentError("--kwargs are the arguments of a factory: name it with --model.")
    for name in _OF_NETWORKS:
        if config.model is not None and getattr(config, name) != getattr(fresh, name):
            raise ArgumentError(f"--{name} is for the library's networks, and --model names your own: use --kwargs.")


def _path(config: RunConfig, kind: str) -> Path:
    return Path(config.data.removeprefix(kind)).expanduser()


def _asks_for_classes(config: RunConfig) -> bool:
    """Whether the network has to be told how many classes there are."""
    if config.model is None:
        return True
    try:
        return "num_classes" in inspect.signature(find_object(config.model)).parameters
    except (TypeError, ValueError):  # no factory, which is told later; or built in
        return False


def _counted(data: Dataset) -> Dataset:
    """Return the data with the number of classes, after reading all labels."""
    if data.kind == "values":
        raise DataError(f"'{data.name}': labels of more than two dimensions need a network of your own: give --model.")
    seen: set[int] = set()
    parts: list[Rows] = [data.train, data.validation, data.test]
    for part in parts:
        for _, labels in part.slices(256):
            seen.update(torch.unique(labels).tolist())
    return replace(data, num_classes=max(seen, default=0) + 1)
