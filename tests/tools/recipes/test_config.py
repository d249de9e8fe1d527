"""Configurations: one clear line for whatever is wrong, and the same again from a file."""

import math

import pytest
import torch

from apoptosis.errors import ArgumentError, DataError
from apoptosis.tools.recipes.config import RunConfig, resolve_device
from apoptosis.tools.recipes.optim import learning_rates, make_optimizer


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"data": "digit"}, r"--data: unknown; there are digits.*given: digit"),
        ({"network": "mpl"}, r"--network: unknown"),
        ({"activation": "rleu"}, r"--activation: unknown"),
        ({"widths": (64, 0)}, r"--widths: .*greater than or equal to 1.*given: 0"),
        ({"epochs": 0}, r"--epochs"),
        ({"batch": 1}, r"--batch"),
        ({"lr": -1.0}, r"--lr"),
        ({"lr": float("nan")}, r"--lr"),
        ({"optimizer": "adm"}, r"--optimizer: .*'adam', 'adamw' or 'sgd'"),
        ({"schedule": "linear"}, r"--schedule"),
        ({"precision": "fp8"}, r"--precision"),
        ({"validation": 1.0}, r"--validation"),
        ({"dropout": 1.0}, r"--dropout"),
        ({"tolerance": 1.5}, r"--tolerance"),
        ({"budget": 0.01, "validation": 0.0}, r"--budget needs examples that do not train"),
        ({"treshold": 1}, r"--treshold: Extra"),
    ],
)
def test_wrong_values_are_one_line_that_names_the_option(values, what):
    with pytest.raises(ArgumentError, match=what) as caught:
        RunConfig.checked(**values)
    assert "\n" not in str(caught.value)


def test_written_and_read_back(tmp_path):
    config = RunConfig.checked(widths=(64, 32), tolerance=0.02, exclude=("0",), data_dir="x")
    config.write(tmp_path / "config.json")
    assert RunConfig.read(tmp_path / "config.json") == config


@pytest.mark.parametrize("text", ["", "{", "[]", '{"epochs": "many"}', '{"unknown": 1}'])
def test_damaged_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"config\.json"):
        RunConfig.read(tmp_path / "config.json")


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="not the folder of a run"):
        RunConfig.read(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_there(name):
    with pytest.raises(ArgumentError, match="--device"):
        resolve_device(name)


def formula(schedule, share):
    """Learning rate over its peak after a share of the run."""
    rise = 0.3 if schedule == "one-cycle" else 0.0
    if schedule == "constant":
        return 1.0
    if share < rise:
        return 1 / 25 + (1 - 1 / 25) * (0.5 - 0.5 * math.cos(math.pi * share / rise))
    return 0.5 + 0.5 * math.cos(math.pi * (share - rise) / (1 - rise))


@pytest.mark.parametrize("steps", [1, 2, 3, 97, 1000])
@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "constant"])
def test_learning_rates(schedule, steps):
    rates = learning_rates(schedule, 0.1, steps)
    assert rates == pytest.approx([0.1 * formula(schedule, step / steps) for step in range(steps)], rel=1e-10)
    assert max(rates) <= 0.1
    assert min(rates) > 0


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_optimizers(name, kind):
    config = RunConfig.checked(optimizer=name, lr=0.5, weight_decay=0.25)
    optimizer = make_optimizer(config, torch.nn.Linear(2, 2))
    assert type(optimizer) is kind
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.5, 0.25)
    assert optimizer.param_groups[0]["fused"] is True
