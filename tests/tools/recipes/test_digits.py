"""The bundled digits: only training images are enlarged, by the seed alone."""

import pytest
import torch

from apoptosis.errors import ArgumentError, DataError
from apoptosis.tools.recipes.datasets import DATASETS, digits, load_dataset


def rows_as_set(images):
    return {tuple(row.tolist()) for row in images.flatten(1)}


def test_no_test_or_validation_image_is_trained_on():
    data = load_dataset("digits", train_rows=1294)
    full, test = digits.load_digits()
    assert torch.equal(data.test.inputs, test.inputs)  # not enlarged, not moved
    assert torch.equal(data.validation.inputs, full.inputs[1294:])
    assert len(data.train) + len(data.validation) == len(full)
    train = rows_as_set(data.train.inputs)
    assert len(train & rows_as_set(test.inputs)) == 0
    assert len(train & rows_as_set(data.validation.inputs)) == 0


def test_enlarged_rows_are_moved_copies_and_reproducible():
    data = load_dataset("digits", train_rows=3000)
    again = load_dataset("digits", train_rows=3000)
    originals = len(digits.load_digits()[0]) - len(data.validation)
    assert len(data.train) == 3000
    assert torch.equal(data.train.inputs, again.train.inputs)
    copies = data.train.inputs[originals:]
    source = data.train.inputs[torch.arange(3000 - originals) % originals]
    assert torch.equal(data.train.labels[originals:], data.train.labels[torch.arange(3000 - originals) % originals])
    assert not torch.equal(copies, source)
    correlation = torch.nn.functional.cosine_similarity(copies.flatten(1), source.flatten(1))
    assert float(correlation.mean()) > 0.8  # small shifts and rotations: still the same digit
    assert len(rows_as_set(copies)) == len(copies)


def test_moving_by_nothing_is_the_identity(monkeypatch):
    images = digits.load_digits()[0].inputs[:5]
    monkeypatch.setattr(digits, "MAX_ANGLE", 0.0)
    monkeypatch.setattr(digits, "MAX_SHIFT", 0.0)
    assert torch.allclose(digits.move(images, torch.Generator().manual_seed(0)), images, atol=1e-4)


def test_a_shift_is_in_pixels(monkeypatch):
    monkeypatch.setattr(digits, "MAX_ANGLE", 0.0)
    monkeypatch.setattr(digits, "MAX_SHIFT", 1.0)
    images = torch.zeros(200, 1, 8, 8)
    images[:, :, 4, 4] = 1.0
    moved = digits.move(images, torch.Generator().manual_seed(0))
    assert float(moved[:, :, 3:6, 3:6].sum((1, 2, 3)).min()) > 0.999  # never further than one pixel
    assert float(moved[:, :, 4, 4].min()) < 0.1  # but up to one


def test_unknown_names_and_sizes():
    with pytest.raises(ArgumentError, match="unknown data set 'digit'; there are digits, mnist"):
        load_dataset("digit")
    with pytest.raises(ArgumentError, match="test_rows is for higgs"):
        load_dataset("digits", test_rows=10)
    with pytest.raises(DataError, match="too few"):
        load_dataset("digits", validation=0.9999)
    assert set(DATASETS) == {"digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "higgs"}
