"""The one measurement that decisions rest on."""

import math

import pytest
import torch

from apoptosis.decide import overhead as calibration
from apoptosis.decide.overhead import macs_per_second, overhead_macs


def test_a_power_of_four_that_grows_with_the_capture():
    for seconds in (0.0, 1e-3, 0.1, 10.0):
        exponent = math.log(overhead_macs(seconds), 4)
        assert exponent == pytest.approx(round(exponent))
    assert overhead_macs(0.0) == 1.0
    assert overhead_macs(10.0) > overhead_macs(0.001)
    assert overhead_macs(0.0, compile_seconds=10.0) > overhead_macs(0.001)


def test_the_rate_is_that_of_a_product_and_touches_no_generator():
    state = torch.get_rng_state()
    rate = macs_per_second()
    assert 1e7 < rate < 1e15
    assert rate == pytest.approx(macs_per_second(), rel=0.95)
    assert torch.equal(torch.get_rng_state(), state)
    assert calibration._SIZE**3 / rate < 10


def test_decisions_rest_on_the_saved_calibration(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    dear = runs.calibrated(runs.start(net, optimizer), overhead=1e30)
    assert runs.train(net, optimizer, dear) == []
    twin = runs.mlp()
    optimizer = runs.adam(twin)
    assert runs.train(twin, optimizer, runs.calibrated(runs.start(twin, optimizer), overhead=1.0))
