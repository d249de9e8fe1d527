"""Configurations: one clear line for whatever is wrong, and the same again from a file."""

import pytest
import torch

from apoptosis.errors import ArgumentError, DataError
from apoptosis.tools.recipes.config import RunConfig, resolve_device
from apoptosis.tools.recipes.optim import learning_rate, make_optimizer


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


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "constant"])
def test_learning_rates_stay_within_the_peak(schedule):
    rates = [learning_rate(schedule, 0.1, step, 97) for step in range(97)]
    assert max(rates) <= 0.1
    assert min(rates) > 0
    assert max(rates) > 0.0999
    if schedule == "one-cycle":
        peak = rates.index(max(rates))
        assert rates[: peak + 1] == sorted(rates[: peak + 1])
        assert rates[peak:] == sorted(rates[peak:], reverse=True)
        assert rates[0] == pytest.approx(0.004)
    if schedule == "cosine":
        twin = torch.optim.lr_scheduler.CosineAnnealingLR
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler = twin(optimizer, 97)
        for rate in rates:
            assert rate == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_optimizers(name, kind):
    config = RunConfig.checked(optimizer=name, lr=0.5, weight_decay=0.25)
    optimizer = make_optimizer(config, torch.nn.Linear(2, 2))
    assert type(optimizer) is kind
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.5, 0.25)
    assert optimizer.param_groups[0]["fused"] is True
