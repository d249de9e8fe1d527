"""What a removal costs in the long run: the formula's parts, and that its constants are those of the fit."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest

from apoptosis.decide.exchange import AT_ONCE, CAPACITY, gain_to_come, lasting_cost
from apoptosis.errors import ArgumentError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks are modules of the repository, not of the package


def test_at_the_end_of_a_run_what_the_outputs_lose_stays():
    assert lasting_cost(0.02, 0.1, saved=0.5, rate_left=0.0, to_come=0.0) == pytest.approx(AT_ONCE * 0.02)
    assert lasting_cost(0.02, 0.1, saved=0.5, rate_left=0.5, to_come=0.0) == pytest.approx(AT_ONCE * 0.02 / 4)
    assert lasting_cost(0.02, 0.1, saved=0.5, rate_left=1.0, to_come=0.0) == 0.0


def test_what_is_to_come_is_lost_by_the_mean_of_both_shares():
    assert lasting_cost(0.0, 0.25, saved=0.25, rate_left=1.0, to_come=2.0) == pytest.approx(CAPACITY * 0.25 * 2.0)
    assert lasting_cost(0.0, 9.0, saved=1.0, rate_left=1.0, to_come=2.0) == pytest.approx(
        CAPACITY * 2.0
    )  # rms counts as 1
    assert lasting_cost(0.0, 0.0, saved=0.9, rate_left=0.4, to_come=2.0) == 0.0


@pytest.mark.parametrize("name", ["divergence", "rms", "saved", "rate_left", "to_come"])
@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
def test_values_out_of_range_are_refused_by_name(name, value):
    given = {"divergence": 0.1, "rms": 0.1, "saved": 0.1, "rate_left": 0.1, "to_come": 0.1} | {name: value}
    with pytest.raises(ArgumentError, match=f"{name}={value!r}"):
        lasting_cost(given.pop("divergence"), given.pop("rms"), **given)
    if name in ("saved", "rate_left"):
        with pytest.raises(ArgumentError, match=f"{name}=1.5"):
            lasting_cost(0.1, 0.1, **{"saved": 0.1, "rate_left": 0.1, "to_come": 0.1} | {name: 1.5})


def test_every_doubling_gains_what_the_last_one_gained():
    assert gain_to_come(3.0, 2.5, step=100, total_steps=800) == pytest.approx(1.5)
    assert gain_to_come(3.0, 2.5, step=800, total_steps=800) == 0.0
    assert gain_to_come(2.5, 3.0, step=10, total_steps=800) == 0.0  # a loss that rises promises nothing


def test_a_logarithmic_curve_is_foretold_exactly():
    loss = [5.0 - 0.3 * math.log(t) for t in range(1, 2001)]
    foretold = gain_to_come(loss[149], loss[299], step=300, total_steps=2000)
    assert foretold == pytest.approx(loss[299] - loss[1999], rel=1e-3)


def test_steps_out_of_order_are_refused():
    with pytest.raises(ArgumentError, match="step=9 <= total_steps=8"):
        gain_to_come(1.0, 0.5, step=9, total_steps=8)
    with pytest.raises(ArgumentError, match="then=nan"):
        gain_to_come(math.nan, 0.5, step=1, total_steps=8)


def test_the_constants_are_those_of_the_fit():
    fit = importlib.import_module("benchmarks.aftermath.fit")
    record = json.loads((ROOT / "benchmarks" / "results" / "aftermath.json").read_text(encoding="utf-8"))
    found = fit.CHOSEN.fit(*fit.fitted(record))
    assert [AT_ONCE, CAPACITY] == [float(f"{constant:.2g}") for constant in found]


def test_the_formula_is_the_one_that_was_fitted():
    fit = importlib.import_module("benchmarks.aftermath.fit")
    record = json.loads((ROOT / "benchmarks" / "results" / "aftermath.json").read_text(encoding="utf-8"))
    trials, curves = fit.fitted(record)
    values = fit.CHOSEN.values(trials, curves) @ [AT_ONCE, CAPACITY]
    for trial, value in list(zip(trials, values, strict=True))[::5]:
        at_once = trial["at_once"]
        own = lasting_cost(
            at_once["kl"],
            at_once["rms_squared"] ** 0.5,
            saved=1 - trial["macs_left"],
            rate_left=trial["rate_left"],
            to_come=fit.foretold_gain(trial, curves),
        )
        assert own == pytest.approx(value, abs=1e-7)
