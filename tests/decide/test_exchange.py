"""What a removal costs in the long run: the formula's parts, and that its constants are those of the fit."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest

from apoptosis.decide.exchange import AT_ONCE, CAPACITY, lasting_cost
from apoptosis.errors import ArgumentError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks are modules of the repository, not of the package


def test_at_the_end_of_a_run_only_what_the_outputs_lose_counts():
    assert lasting_cost(0.02, 0.1, saved=0.5, rate_left=0.0) == pytest.approx(AT_ONCE * 0.02)
    assert lasting_cost(0.0, 0.1, saved=0.5, rate_left=0.0) == 0.0


def test_what_is_to_come_is_lost_by_the_mean_of_both_shares():
    assert lasting_cost(0.0, 0.25, saved=0.25, rate_left=0.5) == pytest.approx(CAPACITY * 0.25 * 0.5)
    assert lasting_cost(0.0, 9.0, saved=1.0, rate_left=1.0) == pytest.approx(CAPACITY)  # rms counts up to 1
    assert lasting_cost(0.0, 0.0, saved=0.9, rate_left=0.4) == 0.0


@pytest.mark.parametrize("name", ["divergence", "rms", "saved", "rate_left"])
@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
def test_values_out_of_range_are_refused_by_name(name, value):
    given = {"divergence": 0.1, "rms": 0.1, "saved": 0.1, "rate_left": 0.1} | {name: value}
    with pytest.raises(ArgumentError, match=f"{name}={value!r}"):
        lasting_cost(given.pop("divergence"), given.pop("rms"), **given)


@pytest.mark.parametrize("name", ["saved", "rate_left"])
def test_shares_end_at_one(name):
    with pytest.raises(ArgumentError, match=f"{name}=1.5"):
        lasting_cost(0.1, 0.1, **{"saved": 0.1, "rate_left": 0.1} | {name: 1.5})


def test_the_constants_are_those_of_the_fit():
    fit = importlib.import_module("benchmarks.aftermath.fit")
    record = json.loads((ROOT / "benchmarks" / "results" / "aftermath.json").read_text(encoding="utf-8"))
    found = fit.CHOSEN.fit(fit.fitted(record))
    assert [AT_ONCE, CAPACITY] == [float(f"{constant:.2g}") for constant in found]


def test_the_formula_is_the_one_that_was_fitted():
    fit = importlib.import_module("benchmarks.aftermath.fit")
    record = json.loads((ROOT / "benchmarks" / "results" / "aftermath.json").read_text(encoding="utf-8"))
    trials = fit.fitted(record)
    values = fit.CHOSEN.values(trials) @ [AT_ONCE, CAPACITY]
    for trial, value in list(zip(trials, values, strict=True))[::5]:
        at_once = trial["at_once"]
        own = lasting_cost(
            at_once["kl"],
            at_once["rms_squared"] ** 0.5,
            saved=1 - trial["macs_left"],
            rate_left=trial["rate_left"],
        )
        assert own == pytest.approx(value, abs=1e-7)
