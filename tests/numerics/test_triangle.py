"""Half of a symmetric matrix against the whole of it, and errors of outputs against the written-out residual."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apoptosis.errors import NonFiniteError
from apoptosis.numerics.mixes import CompactReduction, compact, output_errors
from apoptosis.numerics.moments import Moments
from apoptosis.numerics.triangle import Triangle
from apoptosis.records import SiteReduction
from numerics.twins import residual_gram, site_diag

SIZES = st.sampled_from([1, 3, 127, 128, 129, 300])


def rows_of(seed: int, rows: int, channels: int) -> torch.Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(size=SIZES, seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_every_reading_agrees_with_the_whole_matrix(size: int, seed: int) -> None:
    rows = rows_of(seed, 40, size)
    matrix = Triangle(size)
    matrix.add_gram(rows[:25])
    matrix.add_gram(rows[25:])
    matrix.add_outer(rows[0], 3.0)
    want = rows.T @ rows + 3.0 * torch.outer(rows[0], rows[0])
    torch.testing.assert_close(matrix.full(), want)
    torch.testing.assert_close(matrix.diagonal(), want.diagonal())
    torch.testing.assert_close(matrix.products(rows[:7]), rows[:7] @ want)
    draws = torch.Generator().manual_seed(seed)
    some, others = (torch.randperm(size, generator=draws)[: max(1, size // n)] for n in (2, 3))
    torch.testing.assert_close(matrix.block(some, others, 0.5), 0.5 * want[some][:, others])
    torch.testing.assert_close(Triangle.of(want).full(), want)
    other = matrix.copy()
    other.add(Triangle.of(want))
    other.scale(2.0)
    other.set_diagonal(torch.zeros(size, dtype=torch.float64))
    torch.testing.assert_close(other.full(), 4.0 * (want - want.diagonal().diag()))
    torch.testing.assert_close(matrix.full(), want)


def test_what_was_never_added_to_is_zero_and_takes_no_memory() -> None:
    empty = Triangle(10**6)
    index = torch.tensor([0, 10**6 - 1])
    assert empty.block(index, index).count_nonzero() == 0
    matrix = Triangle(3)
    matrix.add(Triangle(3))
    assert torch.equal(matrix.full(), torch.zeros(3, 3, dtype=torch.float64))
    assert torch.equal(matrix.diagonal(), torch.zeros(3, dtype=torch.float64))


def test_moments_of_float32_rows_take_little_more_than_half_a_square_of_float32() -> None:
    rows = rows_of(0, 600, 512).float()
    moments = Moments(512)
    for part in rows.split(100):
        moments.update(part)
    stored = sum(strip.untyped_storage().nbytes() for strip in moments._scatter._strips)
    assert stored <= 0.63 * 4 * 512**2
    want = torch.cov(rows.double().T, correction=0)
    torch.testing.assert_close(moments.covariance(), want, rtol=0, atol=3e-6)
    torch.testing.assert_close(moments.variances(), want.diagonal(), rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_rows_after_coarse_ones_are_summed_in_float64(dtype: torch.dtype) -> None:
    rows = rows_of(1, 50, 4)
    moments = Moments(4)
    moments.update(rows[:20].to(dtype))
    moments.update(rows[20:], exact=True)
    assert moments._scatter.dtype == torch.float64
    assert not moments.exact
    torch.testing.assert_close(moments.covariance(), torch.cov(rows.T, correction=0), rtol=1e-5, atol=1e-6)


def test_a_batch_that_overflows_on_top_of_what_is_there_is_refused_and_nothing_is_added() -> None:
    moments, large = Moments(2), torch.tensor([[1.2e19, 0.0], [-1.2e19, 1.0]])
    moments.update(large)
    before = moments.covariance()
    with pytest.raises(NonFiniteError, match="overflow"):
        moments.update(large)
    assert torch.equal(moments.covariance(), before)
    assert moments.num_rows == 2


@pytest.mark.parametrize("outputs", [1, 40, 700])  # few, and so many that the residual is written out
@pytest.mark.parametrize("offset", [None, "removed", "everywhere"])
@pytest.mark.parametrize("itself", [True, False])
def test_errors_of_outputs_are_those_of_the_whole_residual(outputs: int, offset: str | None, itself: bool) -> None:
    rows = rows_of(2, 400, 300) @ rows_of(3, 300, 300) + 2.0
    moments = Moments(300)
    moments.update(rows, exact=True)
    keep = torch.arange(0, 300, 3)
    mix = 0.05 * rows_of(4, 100, 300)
    if itself:
        mix[:, keep] = torch.eye(100, dtype=torch.float64)
    constant = None if offset is None else rows_of(5, 1, 300)[0]
    if offset == "removed":
        constant[keep] = 0.0
    weight = rows_of(6, outputs, 300)
    want = site_diag(weight, residual_gram(moments.covariance(), moments.mean, keep, mix, constant))
    found = SiteReduction(mix=mix, offset=constant)
    for told in (found, compact(found, keep)):
        torch.testing.assert_close(output_errors(weight, moments, keep, told), want, rtol=1e-9, atol=0)
    assert isinstance(compact(found, keep), CompactReduction) == itself
    assert torch.equal(compact(found, keep).mix, mix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("number", [1, 2])
def test_products_on_several_threads_and_of_rows_that_are_not_contiguous(dtype: torch.dtype, number: int) -> None:
    rows = rows_of(7, 40, 600).to(dtype)
    kept, before = rows.clone(), torch.get_num_threads()
    matrix = Triangle(300, dtype=dtype)
    try:
        torch.set_num_threads(number)
        matrix.add_gram(rows[:, ::2])
        matrix.add_gram(rows.T[:300, :].T)
    finally:
        torch.set_num_threads(before)
    wide = rows.double()
    want = wide[:, ::2].T @ wide[:, ::2] + wide[:, :300].T @ wide[:, :300]
    torch.testing.assert_close(matrix.full(), want, rtol=0, atol=1e3 * torch.finfo(dtype).eps)
    assert torch.equal(rows, kept)
