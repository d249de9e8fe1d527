"""Symmetric products: the same on every way to them, rows untouched."""

from __future__ import annotations

import pytest
import torch

from apoptosis.numerics.blas import gram


@pytest.fixture
def threads():
    """Put back the number of threads that a test sets."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "channels"), [(1, 1), (5, 3), (40, 64), (40, 65), (33, 129), (20, 600), (7, 513)])
def test_gram_is_the_product_whatever_the_threads(threads, dtype, rows, channels):
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(rows)).to(dtype)
    kept = x.clone()
    want = x.double().T @ x.double()
    for number in (1, 2):
        threads(number)
        got = gram(x)
        assert got.dtype == dtype
        assert number > 1 or torch.equal(got, got.T)
        torch.testing.assert_close(
            got.double(), want, rtol=10 * torch.finfo(dtype).eps, atol=1e3 * torch.finfo(dtype).eps
        )
    assert torch.equal(x, kept)


def test_gram_takes_rows_that_are_not_contiguous(threads):
    threads(1)
    x = torch.randn(30, 50, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(gram(x.T), x @ x.T)
    torch.testing.assert_close(gram(x[:, ::2]), x[:, ::2].T @ x[:, ::2])


def test_gram_of_other_dtypes_and_of_what_is_not_finite(threads):
    threads(1)
    half = torch.ones(4, 3, dtype=torch.bfloat16)
    assert torch.equal(gram(half), torch.full((3, 3), 4.0, dtype=torch.bfloat16))
    bad = torch.ones(4, 70)
    bad[1, 5] = torch.nan
    assert bool(gram(bad)[:, 5].isnan().all())
    assert bool(gram(torch.full((4, 3), 1e30)).isinf().all())
