"""Streaming moments against a float64 twin that sees all rows at once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apoptosis.errors import ArgumentError, NonFiniteError, ShapeError
from apoptosis.numerics.linalg import true_float32
from apoptosis.numerics.moments import Moments

seeds = st.integers(0, 2**32 - 1)


def rows_of(seed: int, rows: int, channels: int, mean: float = 1.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, channels, generator=generator, dtype=torch.float64)
    z = z @ torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    return (z + mean * torch.randn(channels, generator=generator, dtype=torch.float64)).to(dtype)


def twin(rows: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    z = rows.double().numpy()
    return z.mean(0), np.cov(z, rowvar=False, bias=True).reshape(z.shape[1], -1), z.T @ z / len(z)


def filled(batches: list[torch.Tensor], *, exact: bool = True) -> Moments:
    moments = Moments(batches[0].shape[1])
    for batch in batches:
        moments.update(batch, exact=exact)
    return moments


@given(seed=seeds, rows=st.integers(2, 60), channels=st.integers(1, 7), mean=st.sampled_from([0.0, 1.0, 1e4]))
@settings(max_examples=40, deadline=None)
def test_exact_moments_equal_the_float64_twin(seed: int, rows: int, channels: int, mean: float) -> None:
    z = rows_of(seed, rows, channels, mean)
    moments = filled([z[: rows // 2], z[rows // 2 :]])
    want_mean, want_cov, want_second = twin(z)
    scale = max(1.0, float(np.abs(want_cov).max()))
    np.testing.assert_allclose(moments.mean.numpy(), want_mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.covariance().numpy(), want_cov, atol=1e-11 * scale * max(1.0, mean / 10))
    np.testing.assert_allclose(moments.second_moment().numpy(), want_second, rtol=1e-10, atol=1e-9 * scale)
    assert (moments.num_rows, moments.num_examples) == (rows, rows)


@given(seed=seeds, cuts=st.lists(st.integers(0, 50), max_size=6))
@settings(max_examples=40, deadline=None)
def test_any_split_into_batches_gives_the_same(seed: int, cuts: list[int]) -> None:
    z = rows_of(seed, 50, 5, 100.0)
    edges = [0, *sorted(cuts), 50]
    split = filled([z[a:b] for a, b in itertools.pairwise(edges)])
    whole = filled([z])
    assert split.num_rows == whole.num_rows == 50
    torch.testing.assert_close(split.mean, whole.mean, rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(split.covariance(), whole.covariance(), rtol=1e-11, atol=1e-11)


@given(seed=seeds, order=st.permutations(range(4)))
@settings(max_examples=30, deadline=None)
def test_merge_is_associative_and_commutative(seed: int, order: list[int]) -> None:
    parts = [rows_of(seed + i, 5 + i, 4, 10.0) for i in range(4)]
    whole = filled([torch.cat(parts)])
    merged = Moments(4)
    for i in order:
        merged.merge(filled([parts[i]]))
    right, left = filled([parts[2]]), filled([parts[0]])
    right.merge(filled([parts[3]]))
    left.merge(filled([parts[1]]))
    left.merge(right)
    for got in (merged, left):
        assert got.num_rows == whole.num_rows
        torch.testing.assert_close(got.covariance(), whole.covariance(), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(got.mean, whole.mean, rtol=1e-12, atol=1e-12)


@given(seed=seeds, mean=st.sampled_from([0.0, 10.0, 1e3]))
@settings(max_examples=20, deadline=None)
def test_float32_products_do_not_cancel_under_a_large_mean(seed: int, mean: float) -> None:
    z = rows_of(seed, 200, 6, mean, torch.float32)
    fast, want = filled(list(z.split(37)), exact=False), twin(z)[1]
    assert fast.covariance().dtype == torch.float64
    np.testing.assert_allclose(fast.covariance().numpy(), want, atol=3e-6 * np.abs(want).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("exact", [False, True])
def test_any_floating_dtype(dtype: torch.dtype, exact: bool) -> None:
    z = rows_of(0, 64, 3, 1.0, dtype)
    torch.testing.assert_close(
        filled([z], exact=exact).covariance(), torch.from_numpy(twin(z)[1]), rtol=1e-5, atol=1e-5
    )


def test_autocast_and_low_precision_flags_do_not_touch_the_products() -> None:
    z = rows_of(1, 300, 8, 0.0, torch.float32)
    want = filled([z], exact=False).covariance()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # bfloat16 products on the CPU
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = filled([z], exact=False).covariance()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="torch before 2.9 has no such switch")
def test_the_switch_of_the_cpu_alone_is_put_back() -> None:
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "bf16"
        with true_float32(torch.device("cpu")):
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "bf16"
    finally:
        backend.fp32_precision = before


def test_no_graph_is_recorded_and_rows_stay_untouched() -> None:
    z = rows_of(2, 10, 3).requires_grad_()
    before = z.detach().clone()
    moments = filled([z])
    assert not moments.mean.requires_grad
    assert not moments.covariance().requires_grad
    assert torch.equal(z, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("exact", [False, True])
def test_non_finite_rows_are_refused_and_nothing_is_added(bad: float, exact: bool) -> None:
    z = rows_of(3, 10, 3, dtype=torch.float32)
    moments = filled([z])
    before = moments.state_dict()
    broken = z.clone()
    broken[4, 1] = bad
    with pytest.raises(NonFiniteError, match="not added"):
        moments.update(broken, exact=exact)
    assert all(torch.equal(before[k], v) for k, v in moments.state_dict().items())


def test_a_product_that_overflows_float32_is_refused() -> None:
    with pytest.raises(NonFiniteError):
        Moments(2).update(torch.tensor([[1e30, 0.0], [-1e30, 0.0]]))


def test_state_round_trip_continues_as_if_never_saved() -> None:
    z = rows_of(4, 40, 4)
    first, again = filled([z[:20]]), Moments(4)
    again.load_state_dict(first.state_dict())
    for moments in (first, again):
        moments.update(z[20:], exact=True, examples=5)
    assert again.num_examples == first.num_examples == 25
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in first.state_dict().items())


def test_resolution_follows_the_least_exact_batch() -> None:
    z = rows_of(4, 20, 4)
    fine, coarse = filled([z]), filled([z], exact=False)
    assert fine.resolution < 1e-14 < coarse.resolution < 1e-6
    fine.merge(coarse)
    again = Moments(4)
    again.load_state_dict(fine.state_dict())
    assert again.resolution == coarse.resolution
    assert again.select(torch.tensor([0])).exact is False


def test_select_is_the_moments_of_those_channels() -> None:
    z = rows_of(5, 30, 6)
    index = torch.tensor([4, 0, 3])
    torch.testing.assert_close(filled([z]).select(index).covariance(), filled([z[:, index]]).covariance())


def test_bad_arguments_name_the_shapes() -> None:
    with pytest.raises(ArgumentError, match="at least one"):
        Moments(0)
    with pytest.raises(ShapeError, match="expected"):
        Moments(3).update(torch.zeros(4, 2))
    with pytest.raises(ShapeError):
        Moments(3).merge(Moments(2))
    with pytest.raises(ArgumentError, match="no rows"):
        Moments(3).covariance()
    with pytest.raises(ArgumentError, match="lie in"):
        filled([torch.ones(2, 2)]).without_dropout(1.0)
    state = filled([torch.ones(2, 2)]).state_dict()
    with pytest.raises(ShapeError):
        Moments(3).load_state_dict(state)
    with pytest.raises(ArgumentError, match="keys"):
        Moments(2).load_state_dict({"mean": state["mean"]})
    with pytest.raises(NonFiniteError):
        Moments(2).load_state_dict({**state, "mean": state["mean"] * float("nan")})


def test_empty_batches_and_single_rows() -> None:
    moments = filled([torch.zeros(0, 2), torch.tensor([[3.0, 4.0]])])
    assert moments.num_rows == 1
    assert moments.mean.tolist() == [3.0, 4.0]
    assert not moments.covariance().any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_with_tf32_allowed() -> None:
    z = rows_of(6, 512, 64, 10.0, torch.float32)
    torch.set_float32_matmul_precision("high")
    try:
        moments = Moments(64)
        moments.update(z.cuda())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert moments.device.type == "cuda"
    want = twin(z)[1]
    np.testing.assert_allclose(moments.covariance().cpu().numpy(), want, atol=3e-6 * np.abs(want).max())


def test_mean_of_many_rows_is_that_of_float64():
    z = torch.randn(1500, 3, generator=torch.Generator().manual_seed(3)) + 1e4  # more rows than are taken at once
    moments = Moments(3)
    moments.update(z)
    torch.testing.assert_close(moments.mean, z.double().mean(0), rtol=1e-14, atol=0.0)


def test_a_copy_is_equal_and_apart():
    z = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).double()
    moments = Moments(4)
    moments.update(z, exact=True, examples=3)
    again = moments.copy()
    assert (again.num_channels, again.num_rows, again.num_examples, again.exact) == (4, 9, 3, True)
    assert torch.equal(again.covariance(), moments.covariance())
    assert torch.equal(again.root(), moments.root())
    again.update(z[:2] + 1.0, exact=True)
    whole = Moments(4)
    whole.update(z, exact=True)
    assert moments.num_rows == 9
    assert torch.equal(moments.covariance(), whole.covariance())
    assert torch.equal(moments.root(), whole.root())


def test_select_of_nothing_is_refused():
    with pytest.raises(ArgumentError, match="no channel"):
        Moments(4).select(torch.zeros(0, dtype=torch.int64))


def test_without_rows_everything_but_a_covariance_works():
    z = torch.randn(7, 3, generator=torch.Generator().manual_seed(2))
    empty = Moments(3)
    assert not empty.state_dict()["scatter"].any()
    for again in (empty.copy(), empty.select(torch.tensor([2, 0, 1])), empty.without_dropout(0.5)):
        again.update(z)
        torch.testing.assert_close(again.covariance(), filled([z]).covariance())
    other = filled([z])
    joined = Moments(3)
    joined.merge(other)
    joined.update(z)
    assert torch.equal(other.covariance(), filled([z]).covariance())  # merged by value
    assert empty.num_rows == 0
    loaded = Moments(3)
    loaded.load_state_dict(empty.state_dict())
    loaded.update(z)
    assert torch.equal(loaded.covariance(), filled([z], exact=False).covariance())
