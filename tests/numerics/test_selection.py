"""Forward selection against a twin that writes every Schur complement out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apoptosis.errors import NonFiniteError, ShapeError
from apoptosis.numerics.decompose import joint_error_curve
from apoptosis.numerics.linalg import greedy_order, ordered_cholesky, pivoted_cholesky


def gram_of(seed: int, channels: int, rank: int) -> torch.Tensor:
    factor = torch.randn(channels, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T


def slow_greedy(gram: np.ndarray, weight: np.ndarray) -> list[int]:
    rest, chosen = gram.copy(), []
    for _ in range(len(gram)):
        best, lowest = -1, np.inf
        for j in set(range(len(gram))) - set(chosen):
            after = rest - np.outer(rest[:, j], rest[j]) / rest[j, j]
            error = np.trace(weight @ after @ weight.T)
            if error < lowest - 1e-13:
                best, lowest = j, error
        chosen.append(best)
        rest = rest - np.outer(rest[:, best], rest[best]) / rest[best, best]
    return chosen


@given(seed=st.integers(0, 2**32 - 1), channels=st.integers(2, 8), out=st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_order_equals_the_slow_twin_as_far_as_it_matters(seed: int, channels: int, out: int) -> None:
    gram = gram_of(seed, channels, channels + 3)
    weight = torch.randn(out, channels, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    order = greedy_order(gram, weight)
    assert sorted(order.tolist()) == list(range(channels))
    got = joint_error_curve(weight, ordered_cholesky(gram, order))
    want = joint_error_curve(weight, ordered_cholesky(gram, torch.tensor(slow_greedy(gram.numpy(), weight.numpy()))))
    # Beyond the rank of W the error is zero and every choice is as good: compare what the choices achieve.
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9 * float(want[0]))


def test_running_gains_stay_true_over_many_steps() -> None:
    gram = gram_of(3, 150, 200)
    weight = torch.randn(20, 150, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    greedy = joint_error_curve(weight, ordered_cholesky(gram, greedy_order(gram, weight)))
    pivoted = joint_error_curve(weight, pivoted_cholesky(gram, weights_C=weight.norm(dim=0)))
    assert greedy[20:100].sum() < pivoted[20:100].sum()  # it looks at what the consumer really loses


def test_every_choice_is_the_best_one_even_after_many_steps() -> None:
    gram = gram_of(6, 90, 120)
    weight = torch.randn(85, 90, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    order = greedy_order(gram, weight)
    for step in (5, 63, 64, 65, 80):
        factor = ordered_cholesky(gram, order).factor[:, :step]
        rest = gram - factor @ factor.T
        left = order[step:]
        gains = (weight @ rest[:, left]).square().sum(0) / rest[left, left]
        assert float(gains[0]) >= float(gains.max()) * (1 - 1e-8)


def test_low_rank_puts_the_rest_last() -> None:
    order = greedy_order(gram_of(5, 12, 3), torch.eye(12))
    curve = joint_error_curve(torch.eye(12), ordered_cholesky(gram_of(5, 12, 3), order))
    assert curve[3] < 1e-9 * curve[0]


def test_bad_arguments() -> None:
    with pytest.raises(ShapeError):
        greedy_order(torch.eye(3), torch.ones(2, 4))
    with pytest.raises(NonFiniteError):
        greedy_order(torch.eye(3), torch.full((2, 3), float("inf")))
