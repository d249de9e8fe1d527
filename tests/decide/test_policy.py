"""The policy is a pure function: every property is checked on plain numbers."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apoptosis.decide.policy import (
    LAST_SHARE,
    NUM_EVENT_STEPS,
    WARMUP_MAX,
    PastEvent,
    Telemetry,
    allocate,
    decide,
    event_steps,
    loss_of,
    site_limit,
    tolerance_at,
    warmup_steps,
)

FRESH = Telemetry(
    step=0,
    total_steps=5000,
    macs=1e6,
    batch_rows=0.0,
    event_macs=1e9,
    overhead_macs=1e9,
    tolerance=0.025,
    num_backoffs=0,
)


def event(step, share, rolled_back=False):
    return PastEvent(step=step, macs_before=1e6, macs_after=(1 - share) * 1e6, rolled_back=rolled_back)


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_turns_lie_between_warmup_and_the_last_share(total, after):
    found = event_steps(total, after=after)
    assert len(found) <= NUM_EVENT_STEPS
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert all(gap >= (warmup_steps(total) + 1) // 2 for gap in gaps)
    assert all(after < step <= max(LAST_SHARE * total, warmup_steps(total)) for step in found)
    assert all(step >= warmup_steps(total) for step in found)


@given(st.integers(1, 10**7))
def test_warmup_is_bounded(total):
    assert 1 <= warmup_steps(total) <= min(WARMUP_MAX, max(1, total // 4))


def test_unknown_length_doubles():
    steps = []
    after = 0
    for _ in range(5):
        (after,) = event_steps(None, after=after)
        steps.append(after)
    assert all(b == 2 * a for a, b in itertools.pairwise(steps))


@given(st.floats(0, 0.9), st.integers(0, 5))
def test_every_rollback_halves_the_tolerance(cap, num_backoffs):
    now = tolerance_at(cap, num_backoffs)
    assert now == cap / 2**num_backoffs
    assert site_limit(cap) == pytest.approx(8 * tolerance_at(cap, 0))


@given(st.floats(0, 0.5), st.dictionaries(st.text(), st.floats(0, 1e12), max_size=6))
def test_allotted_tolerances_never_exceed_the_cap(tolerance, macs):
    found = allocate(tolerance, macs)
    assert found.keys() == macs.keys()
    assert all(0 <= part <= tolerance for part in found.values())
    assert not macs or max(found.values()) == tolerance


def test_first_window_opens_after_warmup():
    decision = decide(FRESH)
    assert decision.at_step == warmup_steps(5000)
    assert decision.tolerance > 0


def test_poor_events_back_off_and_end():
    good = replace(FRESH, step=200, batch_rows=128.0, history=(event(150, 0.5),))
    poor = replace(good, history=(event(150, 0.001),))
    assert decide(poor).at_step > decide(good).at_step
    hopeless = replace(good, history=tuple(event(150 + i, 0.0) for i in range(NUM_EVENT_STEPS)))
    assert decide(hopeless).at_step is None
    assert "saved less than 2 %" in decide(hopeless).reason


def test_an_event_that_cannot_pay_is_not_looked_for():
    dear = replace(FRESH, step=200, batch_rows=1.0, history=(event(150, 0.3),), event_macs=1e15)
    assert decide(dear).at_step is None
    assert "cost" in decide(dear).reason
    optimistic = replace(dear, history=(), batch_rows=0.0)
    assert decide(optimistic).at_step is not None


def test_the_schedule_ends_before_the_run():
    assert decide(replace(FRESH, step=int(LAST_SHARE * 5000))).at_step is None


def test_pays_compares_what_remains_with_the_overhead():
    now = replace(FRESH, step=4999, batch_rows=1.0)
    assert loss_of(now, 0.5e6)
    assert not loss_of(replace(now, step=100, batch_rows=128.0), 0.5e6)
    assert loss_of(replace(now, step=100, batch_rows=128.0), 1e6)


@given(st.integers(0, 5000), st.floats(0, 1), st.floats(1, 1e12))
def test_decide_is_a_function(step, share, cost):
    telemetry = replace(FRESH, step=step, batch_rows=64.0, event_macs=cost, history=(event(step, share),))
    assert decide(telemetry) == decide(telemetry)
    at = decide(telemetry).at_step
    assert at is None or at > step
