"""Products of two activations: every formula against sums over all pairs of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apoptosis.numerics.bilinear import blocks_of, joint, pooled, product_error, same_sum, square_root
from apoptosis.numerics.moments import Moments

seeds = st.integers(0, 2**32 - 1)
LAYOUTS = {
    "one": np.arange(6)[:, None] * 0,
    "heads": np.repeat([0, 1], 3)[:, None],
    "grouped": np.repeat([[0, 1], [2, 3]], 3, axis=0),
    "halves": np.zeros((6, 2), dtype=np.int64),
    "halves of heads": np.repeat([[0, 0, 1, 1]], 4, axis=0),
}
every_layout = pytest.mark.parametrize("name", LAYOUTS)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3


def second(rows: torch.Tensor) -> torch.Tensor:
    return rows.T @ rows / len(rows)


def by_hand(left: torch.Tensor, right: torch.Tensor, sums: np.ndarray) -> float:
    """Mean over all pairs of rows of the squared sums, added up over sums."""
    total, flat = 0.0, torch.from_numpy(sums.reshape(-1))
    for number in flat.unique():
        scores = left[:, flat == number] @ right[:, flat == number].T
        total += float(scores.square().mean())
    return total


@every_layout
@given(seed=seeds, kept=st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_the_error_of_any_mix_is_that_of_all_pairs_of_rows(name: str, seed: int, kept: int) -> None:
    sums = LAYOUTS[name]
    num, count = sums.shape
    left, right = draw(seed, 30, num * count), draw(seed + 1, 20, num * count)
    keep = torch.randperm(num, generator=torch.Generator().manual_seed(seed))[:kept].sort().values
    mix = draw(seed + 2, kept, num)
    mix[:, keep] = torch.eye(kept, dtype=torch.float64)
    cube = left.reshape(-1, num, count)
    error = (cube - torch.einsum("nkp,kc->ncp", cube[:, keep], mix)).reshape(-1, num * count)
    got = product_error(second(left), second(right), sums, keep, mix)
    assert got == pytest.approx(by_hand(error, right, sums), rel=1e-9)


@every_layout
def test_what_is_lost_is_the_sum_over_the_channels_that_go(name: str) -> None:
    sums = LAYOUTS[name]
    num, count = sums.shape
    left, right = draw(0, 30, num * count), draw(1, 20, num * count)
    matrix = joint(second(left), second(right), sums)
    assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-9
    gone = torch.tensor([0, 2, 3])
    dropped = torch.zeros(30, num, count, dtype=torch.float64)
    dropped[:, gone] = left.reshape(-1, num, count)[:, gone]
    want = by_hand(dropped.reshape(30, -1), right, sums)
    assert float(matrix[gone][:, gone].sum()) == pytest.approx(want, rel=1e-9)


def test_pooling_loses_nothing_where_the_right_operand_is_the_same_at_all_positions() -> None:
    sums = LAYOUTS["grouped"]
    left, keys = draw(0, 30, 12), draw(1, 20, 6)
    right = keys[:, :, None].expand(20, 6, 2).reshape(20, 12)
    blocks = blocks_of(sums)
    assert blocks is not None
    root = square_root(pooled(second(right), sums), blocks)
    keep, mix = torch.tensor([0, 1, 3, 5]), draw(2, 4, 6)
    mix = torch.where(torch.from_numpy(blocks)[keep][:, None] == torch.from_numpy(blocks), mix, 0.0)
    mix[:, keep] = torch.eye(4, dtype=torch.float64)
    change = torch.eye(6, dtype=torch.float64)
    change[:, keep] -= mix.T
    residual = change @ pooled(second(left), sums) @ change.T
    got = 2.0 * float(torch.trace(root @ residual @ root.T))
    assert got == pytest.approx(product_error(second(left), second(right), sums, keep, mix), rel=1e-9)


def test_square_roots_stay_within_blocks_and_forgive_round_off() -> None:
    blocks = np.array([0, 1, 0, 1])
    matrix = second(draw(0, 3, 4)) * torch.from_numpy(blocks[:, None] == blocks)
    matrix[0, 0] -= 1e-18
    root = square_root(matrix, blocks)
    assert torch.allclose(root.T @ root, matrix, atol=1e-12)
    assert not root[torch.from_numpy(blocks[:, None] != blocks)].any()


def test_labels_of_channels_that_run_through_the_same_sums() -> None:
    found = {name: blocks_of(sums) for name, sums in LAYOUTS.items()}
    assert found["heads"].tolist() == [0, 0, 0, 1, 1, 1]
    assert found["grouped"].tolist() == [0, 0, 0, 1, 1, 1]
    assert found["halves"].tolist() == [0] * 6
    assert blocks_of(np.array([[0, 1], [1, 2]])) is None
    assert same_sum(np.array([[0, 1], [1, 2]])).tolist()[1] == [False, True, True, False]


def test_moments_of_a_second_moment() -> None:
    matrix = second(draw(0, 9, 3))
    moments = Moments.of_second_moment(matrix, num_rows=9, exact=False)
    assert torch.allclose(moments.second_moment(), matrix, atol=1e-14)
    assert (moments.num_rows, moments.exact, moments.mean.tolist()) == (9, False, [0.0, 0.0, 0.0])
