"""Roots of Gram matrices: what the Gram matrix itself does not resolve."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apoptosis.errors import NonFiniteError
from apoptosis.numerics.decompose import solve_mix_of_root
from apoptosis.numerics.linalg import pivoted_cholesky, pivoted_qr
from apoptosis.numerics.moments import Moments


def rows_of(seed: int, count: int, channels: int, mean: float = 0.0) -> torch.Tensor:
    return mean + torch.randn(count, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 50), st.integers(1, 50))
def test_a_root_squares_to_the_covariance_whatever_the_batches(seed: int, channels: int, first: int, more: int) -> None:
    rows = rows_of(seed, first + more, channels, mean=3.0)
    one, other = Moments(channels), Moments(channels)
    one.update(rows[:first], exact=True)
    other.update(rows[first:], exact=True)
    one.merge(other)
    for moments in (one, one.select(torch.arange(channels)), one.counted(7, 7)):
        root = moments.root()
        assert root is not None
        assert root.shape[0] <= max(channels, 4)
        torch.testing.assert_close(root.T @ root, moments.covariance(), rtol=1e-12, atol=1e-13)
    assert one.counted(7, 7).num_rows == 7


def test_rows_of_float32_have_no_root() -> None:
    moments = Moments(3)
    moments.update(rows_of(0, 9, 3), exact=True)
    assert moments.root() is not None
    moments.update(rows_of(1, 9, 3).float(), exact=True)
    assert moments.root() is None


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_a_signal_below_the_root_of_round_off_is_seen_and_kept(mean: float) -> None:
    rows = rows_of(0, 400, 6, mean)
    rows[:, 4] = rows[:, 0] + 1e-9 * rows_of(1, 400, 1)[:, 0]
    rows[:, 5] = rows[:, 1] - rows[:, 2]
    moments = Moments(6)
    moments.update(rows, exact=True)
    root = moments.root()
    assert root is not None
    factor = pivoted_qr(root, torch.ones(6))
    left = factor.lower.square().sum(0).flip(0).cumsum(0).flip(0).sqrt()
    assert 1e-10 < float(left[4]) < 1e-8
    assert factor.rank == 5 or float(left[5]) < 1e-12 * max(1.0, mean)
    assert pivoted_cholesky(moments.covariance()).rank < 6
    keep = factor.order[:5].sort().values
    mix = solve_mix_of_root(root, keep)
    assert float((root - root[:, keep] @ mix).norm()) < 1e-12 * max(1.0, mean)


def test_weights_choose_the_order_and_nothing_infinite_is_taken() -> None:
    root = rows_of(2, 8, 5)
    weights = torch.tensor([1.0, 0.0, 100.0, 1.0, 1.0])
    assert pivoted_qr(root, weights).order.tolist() == pivoted_cholesky(root.T @ root, weights_C=weights).order.tolist()
    with pytest.raises(NonFiniteError):
        pivoted_qr(root * torch.inf, weights)
