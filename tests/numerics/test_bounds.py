"""Certificates against their definitions: exact binomial sums, brute-force flips, sampled worst cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from apoptosis.errors import ArgumentError, NonFiniteError, ShapeError
from apoptosis.numerics import bounds

seeds = st.integers(0, 2**32 - 1)


@given(rows=st.integers(1, 3000), share=st.floats(0, 1), alpha=st.floats(1e-6, 0.5))
@settings(max_examples=60, deadline=None)
def test_clopper_pearson_solves_its_definition(rows: int, share: float, alpha: float) -> None:
    flips = round(share * rows)
    limit = bounds.clopper_pearson_upper(flips, rows, alpha)
    assert flips / rows <= limit <= 1.0
    if flips < rows:
        assert stats.binom.cdf(flips, rows, limit) == pytest.approx(alpha, rel=1e-6)
        assert bounds.clopper_pearson_upper(flips + 1, rows, alpha) >= limit


def test_the_numbers_of_the_method_page() -> None:
    assert bounds.clopper_pearson_upper(0, 4096, 0.05) == pytest.approx(0.00073, abs=5e-6)
    ten = sum(bounds.clopper_pearson_upper(0, 4096, bounds.alpha_for_attempt(i, 0.05)) for i in range(1, 11))
    assert ten == pytest.approx(0.013, rel=0.25)


@given(budget=st.floats(1e-5, 0.5), alpha=st.floats(1e-6, 0.5))
@settings(max_examples=60, deadline=None)
def test_required_rows_are_enough_and_one_fewer_is_not(budget: float, alpha: float) -> None:
    rows = bounds.required_probe_rows(budget, alpha)
    assert bounds.clopper_pearson_upper(0, rows, alpha) <= budget
    assert rows == 1 or bounds.clopper_pearson_upper(0, rows - 1, alpha) > budget * (1 - 1e-9)


def test_attempts_spend_alpha_and_no_more() -> None:
    spent = [bounds.alpha_for_attempt(i, 0.05) for i in range(1, 20_001)]
    assert 0.0499 < sum(spent) < 0.05
    assert spent == sorted(spent, reverse=True)
    assert bounds.alpha_for_attempt(3, 0.05, earlier_results=2) == pytest.approx(spent[2] / 4)


@given(seed=seeds, rows=st.integers(0, 40), classes=st.integers(2, 6), size=st.floats(0, 2))
@settings(max_examples=60, deadline=None)
def test_flips_are_counted_and_lie_within_the_rows_at_risk(seed: int, rows: int, classes: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(rows, classes, generator=generator)
    after = before + size * torch.randn(rows, classes, generator=generator)
    found = bounds.compare_logits(before, after)
    flips = sum(int(a.argmax() != b.argmax()) for a, b in zip(before, after, strict=True))
    assert (found.rows, found.flips) == (rows, flips)
    assert flips <= found.at_risk <= rows


def test_compare_logits_refuses_what_has_no_classes() -> None:
    for before, after in ((torch.ones(3, 1), torch.ones(3, 1)), (torch.ones(3), torch.ones(3))):
        with pytest.raises(ShapeError):
            bounds.compare_logits(before, after)
    with pytest.raises(ShapeError):
        bounds.compare_logits(torch.ones(3, 2), torch.ones(2, 2))
    with pytest.raises(ShapeError, match="labels"):
        bounds.compare_logits(torch.ones(3, 2), torch.ones(3, 2), torch.zeros(2))
    with pytest.raises(NonFiniteError):
        bounds.compare_logits(torch.full((3, 2), float("nan")), torch.ones(3, 2))


def test_only_predictions_that_were_right_are_lost_and_broken_rows_are_flips() -> None:
    before = torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [9.0, 1.0]])
    after = torch.tensor([[1.0, 2.0], [1.0, 2.0], [float("nan"), 0.0], [9.0, 1.5]])
    found = bounds.compare_logits(before, after, torch.tensor([0, 1, 0, 0]))
    assert (found.rows, found.flips, found.losses, found.at_risk) == (4, 3, 2, 3)
    assert bounds.compare_logits(before, after).losses == 3


def test_worst_case_of_a_site() -> None:
    weight, deviation = torch.eye(3), torch.tensor([0.0, 3.0, 4.0])
    assert bounds.worst_case_site_error(weight, deviation, 2.0) == pytest.approx(10.0)
    assert bounds.worst_case_site_error(weight, torch.zeros(3), 2.0) == 0.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: bounds.clopper_pearson_upper(3, 2, 0.05),
        lambda: bounds.clopper_pearson_upper(-1, 2, 0.05),
        lambda: bounds.clopper_pearson_upper(0, 2, 0.0),
        lambda: bounds.required_probe_rows(0.0, 0.05),
        lambda: bounds.required_probe_rows(0.1, 1.0),
        lambda: bounds.alpha_for_attempt(0, 0.05),
        lambda: bounds.alpha_for_attempt(1, math.nan),
        lambda: bounds.alpha_for_attempt(1, 0.05, earlier_results=-1),
    ],
)
def test_bad_arguments(call) -> None:
    with pytest.raises(ArgumentError):
        call()
