"""Factorisations, least squares and error curves against slow, obvious twins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apoptosis.errors import NonFiniteError, ShapeError
from apoptosis.numerics.decompose import complement, joint_error_curve
from apoptosis.numerics.linalg import Factor, ordered_cholesky, pivoted_cholesky, pivoted_qr, roundoff_floor
from numerics.twins import fit_mix, residual_gram, site_diag

seeds = st.integers(0, 2**32 - 1)


def sample(seed: int, channels: int, rank: int, rows: int = 60) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    z = z @ torch.randn(rank, channels, generator=generator, dtype=torch.float64)
    return z + torch.randn(channels, generator=generator, dtype=torch.float64)


def covariance(z: torch.Tensor) -> torch.Tensor:
    centred = z - z.mean(0)
    return centred.T @ centred / len(z)


def weights(seed: int, out: int, channels: int) -> torch.Tensor:
    return torch.randn(out, channels, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)


def slow_pivots(gram: np.ndarray, weight: np.ndarray, steps: int) -> list[int]:
    """The obvious twin: after every choice, the Schur complement written out."""
    rest, chosen = gram.copy(), []
    for _ in range(steps):
        score = rest.diagonal() * weight**2
        score[chosen] = -np.inf
        j = int(score.argmax())
        chosen.append(j)
        rest = rest - np.outer(rest[:, j], rest[j]) / rest[j, j]
    return chosen


def brute_force(gram: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor) -> float:
    """tr(W S Wᵀ) of the least-squares remainder through a pseudo-inverse."""
    g = gram.numpy()
    k = keep.numpy()
    s = g - g[:, k] @ np.linalg.pinv(g[np.ix_(k, k)], rcond=1e-12, hermitian=True) @ g[k]
    w = weight.numpy()
    return float(np.trace(w @ s @ w.T))


@given(seed=seeds, channels=st.integers(2, 12), weighted=st.booleans())
@settings(max_examples=40, deadline=None)
def test_pivots_equal_the_slow_twin(seed: int, channels: int, weighted: bool) -> None:
    gram = covariance(sample(seed, channels, channels))
    weight = torch.rand(channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    found = pivoted_cholesky(gram, weights_C=weight if weighted else None)
    used = weight.numpy() if weighted else np.ones(channels)
    assert found.order.tolist() == slow_pivots(gram.numpy(), used, channels)
    torch.testing.assert_close(found.factor @ found.factor.T, gram, rtol=1e-9, atol=1e-9)


@given(seed=seeds, channels=st.integers(3, 14), rank=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_rank_is_found_and_the_factor_reproduces_the_gram(seed: int, channels: int, rank: int) -> None:
    gram = covariance(sample(seed, channels, rank))
    found = pivoted_cholesky(gram)
    pivots = found.lower.diagonal().square()
    assert int((pivots > 1e-11 * gram.diagonal().max()).sum()) == min(rank, channels)
    assert sorted(found.order.tolist()) == list(range(channels))
    torch.testing.assert_close(found.factor @ found.factor.T, gram, rtol=1e-8, atol=1e-8 * float(gram.max()))


@given(seed=seeds, channels=st.integers(2, 10), out=st.integers(1, 14), rank=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_joint_curve_equals_brute_force_for_every_number_kept(seed: int, channels: int, out: int, rank: int) -> None:
    gram, weight = covariance(sample(seed, channels, rank)), weights(seed, out, channels)
    for found in (
        pivoted_cholesky(gram),
        pivoted_cholesky(gram, weights_C=weight.norm(dim=0)),
        ordered_cholesky(gram, torch.randperm(channels, generator=torch.Generator().manual_seed(seed))),
    ):
        curve = joint_error_curve(weight, found)
        assert curve.shape == (channels + 1,)
        assert (curve.diff() <= 0).all()
        for k in range(channels + 1):
            want = brute_force(gram, weight, found.order[:k])
            assert curve[k].item() == pytest.approx(want, rel=1e-6, abs=1e-6 * float(curve[0]))


@given(seed=seeds, channels=st.integers(4, 24), rank=st.integers(1, 6), spread=st.floats(0.0, 4.0))
@settings(max_examples=60, deadline=None)
def test_curves_of_singular_matrices_end_at_round_off(seed: int, channels: int, rank: int, spread: float) -> None:
    """Channels of very different energies, fewer directions than channels: what pivots explain is explained."""
    scale = 10.0 ** -(spread * torch.rand(channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    gram, weight = covariance(sample(seed, channels, min(rank, channels)) * scale), weights(seed, 5, channels)
    order = pivoted_cholesky(gram, weights_C=weight.norm(dim=0)).order
    curve = joint_error_curve(weight, ordered_cholesky(gram, order))
    known = joint_error_curve(weight, pivoted_cholesky(gram, weights_C=weight.norm(dim=0)))
    assert (curve.diff() <= 0).all()
    level = float((weight.square() * gram.diagonal()).sum())
    assert float((curve - known).abs().max()) <= roundoff_floor(channels) ** 2 * level


@given(seed=seeds, channels=st.integers(2, 10), rank=st.integers(1, 10), kept=st.integers(1, 9), centred=st.booleans())
@settings(max_examples=60, deadline=None)
def test_solve_mix_equals_lstsq_on_the_rows(seed: int, channels: int, rank: int, kept: int, centred: bool) -> None:
    z = sample(seed, channels, rank)
    keep = pivoted_cholesky(covariance(z)).order[: min(kept, rank, channels)].sort().values
    gram = covariance(z) if centred else z.T @ z / len(z)
    mix, offset = fit_mix(gram, keep, mean_C=z.mean(0) if centred else None)
    left = torch.cat([z[:, keep], torch.ones(len(z), 1).double()], 1) if centred else z[:, keep]
    target = z.numpy()
    want = target - left.numpy() @ np.linalg.lstsq(left.numpy(), target, rcond=1e-11)[0]
    got = z - z[:, keep] @ mix - (0.0 if offset is None else offset)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-6 * float(z.abs().max()))
    assert torch.equal(mix[:, keep], torch.eye(keep.numel(), dtype=torch.float64))
    if centred:
        assert offset is not None
        assert not offset[keep].any()
    else:
        assert offset is None


def test_solve_mix_survives_duplicates_and_dead_channels_among_the_kept() -> None:
    z = sample(0, 4, 3)
    z = torch.cat([z, z[:, :1], torch.zeros(len(z), 1).double()], 1)
    keep = torch.tensor([0, 1, 2, 4, 5])
    mix, offset = fit_mix(covariance(z), keep, mean_C=z.mean(0))
    assert torch.isfinite(mix).all()
    error = z - z[:, keep] @ mix - offset
    assert error.abs().max() < 1e-6


@given(
    seed=seeds, channels=st.integers(2, 9), kept=st.integers(0, 8), offset_kind=st.sampled_from(["no", "any", "all"])
)
@settings(max_examples=60, deadline=None)
def test_residual_gram_is_the_measured_one_for_any_mix(seed: int, channels: int, kept: int, offset_kind: str) -> None:
    z = sample(seed, channels, channels)
    generator = torch.Generator().manual_seed(seed)
    keep = torch.randperm(channels, generator=generator)[: min(kept, channels)].sort().values
    mix = torch.randn(keep.numel(), channels, generator=generator, dtype=torch.float64)
    offset = torch.randn(channels, generator=generator, dtype=torch.float64) if offset_kind != "no" else None
    if offset_kind == "any" or seed % 2:
        mix[:, keep] = torch.eye(keep.numel(), dtype=torch.float64)
    error = z - z[:, keep] @ mix - (0.0 if offset is None else offset)
    want = error.T @ error / len(z)
    got = residual_gram(covariance(z), z.mean(0), keep, mix, offset)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8 * float(want.abs().max()) + 1e-10)
    weight = weights(seed, 3, channels)
    measured = (error @ weight.T).square().mean(0)
    torch.testing.assert_close(site_diag(weight, got), measured, rtol=1e-6, atol=1e-8)


def test_roundoff_floor_covers_what_exact_duplicates_leave() -> None:
    z = sample(7, 40, 12, rows=200)
    gram, weight = covariance(z), weights(7, 5, 40)
    found = pivoted_cholesky(gram, weights_C=weight.norm(dim=0))
    mix, offset = fit_mix(gram, found.order[:12].sort().values, mean_C=z.mean(0))
    left = site_diag(weight, residual_gram(gram, z.mean(0), found.order[:12].sort().values, mix, offset)).sum()
    assert (left / site_diag(weight, gram).sum()) ** 0.5 < roundoff_floor(40) < 1e-5


def test_a_ridge_keeps_round_off_out_of_the_weights() -> None:
    z = sample(1, 100, 5, rows=400)
    noise = 1e-7 * torch.randn(100, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = covariance(z)
    gram = gram + (noise + noise.T) * gram.diagonal().sqrt().outer(gram.diagonal().sqrt())  # float32 products
    keep = torch.arange(60)  # far more than the 5 directions there are
    plain, ridged = (fit_mix(gram, keep, mean_C=z.mean(0), ridge=r)[0][:, 60:] for r in (None, 5e-7))
    assert ridged.norm() < 0.3 * plain.norm()
    error = z - z[:, keep] @ fit_mix(gram, keep, mean_C=z.mean(0), ridge=5e-7)[0]
    assert covariance(error).trace() < 1e-5 * gram.trace()


def test_channels_nobody_reads_come_last_and_an_empty_gram_has_rank_zero() -> None:
    gram, weight = covariance(sample(8, 5, 5)), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    found = pivoted_cholesky(gram, weights_C=weight)
    assert set(found.order[3:].tolist()) == {1, 3}
    assert torch.isfinite(found.factor).all()
    nothing = pivoted_cholesky(torch.zeros(3, 3))
    assert isinstance(nothing, Factor)
    assert nothing.rank == 0
    assert joint_error_curve(torch.ones(2, 3), nothing).tolist() == [0.0] * 4


def test_bad_arguments() -> None:
    with pytest.raises(ShapeError):
        pivoted_cholesky(torch.zeros(2, 3))
    with pytest.raises(NonFiniteError):
        pivoted_cholesky(torch.full((2, 2), float("nan")))
    with pytest.raises(ShapeError):
        pivoted_cholesky(torch.eye(3), weights_C=torch.ones(2))
    with pytest.raises(ShapeError):
        joint_error_curve(torch.ones(2, 4), pivoted_cholesky(torch.eye(3)))
    assert complement(torch.tensor([1]), 3).tolist() == [0, 2]


@pytest.mark.parametrize("rank", [60, 150, 300])  # below, above and far above what is multiplied at once
def test_factors_are_triangular_and_curves_are_the_whole_product(rank: int) -> None:
    z = sample(3, 300, rank, rows=400)
    gram, weight = covariance(z), weights(3, 20, 300)
    root = (z - z.mean(0)) / len(z) ** 0.5
    for found in (
        pivoted_cholesky(gram, weights_C=weight.norm(dim=0)),
        ordered_cholesky(gram, torch.randperm(300, generator=torch.Generator().manual_seed(5))),
        pivoted_qr(root, weight.norm(dim=0)),
    ):
        assert not found.factor[found.order].triu(1).any()
        for matrix in (weight, weights(4, 310, 300)):
            energies = (matrix @ found.factor).square().sum(0)
            want = torch.cat([energies.flip(0).cumsum(0).flip(0), torch.zeros(301 - found.rank).double()])
            got = joint_error_curve(matrix, found)
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10 * float(want[0]))
            short = joint_error_curve(matrix, found, dtype=torch.float32)
            torch.testing.assert_close(short, want, rtol=1e-4, atol=1e-6 * float(want[0]))
