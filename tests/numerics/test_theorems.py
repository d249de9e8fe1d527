"""Every theorem of docs/theory.md, under its own name: hypothesis looks for a counterexample."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional as F

from apoptosis.decide.acceptance import AcceptanceTest
from apoptosis.model.evaluate import compare, make_probe
from apoptosis.modules.norms import NormEdit, Statistics
from apoptosis.modules.response_norms import Response, response
from apoptosis.numerics import bounds
from apoptosis.numerics.activations import NEURON_TYPES, neuron_type
from apoptosis.numerics.bilinear import joint, product_error
from apoptosis.numerics.decompose import joint_error_curve
from apoptosis.numerics.linalg import ordered_cholesky, pivoted_cholesky
from apoptosis.numerics.moments import Moments
from apoptosis.numerics.sketch import Sketch
from apoptosis.records import ColumnFold, OffsetFold, RowScale, TensorEdit
from apoptosis.surgery import apply_edit, merge_like
from apoptosis.surgery.norms import norm_changes
from numerics.twins import fit_mix, residual_gram, site_diag

seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=40, deadline=None)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(seed: int, rows: int, channels: int) -> torch.Tensor:
    return draw(seed, rows, channels) @ draw(seed + 1, channels, channels) + draw(seed + 2, channels)


def moments_of(z: torch.Tensor) -> Moments:
    moments = Moments(z.shape[1])
    moments.update(z, exact=True)
    return moments


def fold(
    weight: torch.Tensor, bias: torch.Tensor, keep: torch.Tensor, mix: torch.Tensor, shift: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What surgery makes of a consumer's weight and bias."""
    columns = np.arange(weight.shape[1])[:, None]
    edit = TensorEdit(tensor="w", keep={1: keep}, folds=(ColumnFold(dim=1, columns=columns, keep=keep, mix=mix),))
    moves = () if shift is None else (OffsetFold(weight="w", dim=1, columns=columns, offset=shift),)
    moved = TensorEdit(tensor="b", keep={}, offsets=moves)
    return apply_edit(edit, weight, {"w": weight}), apply_edit(moved, bias, {"w": weight})


def mean_square(rows: torch.Tensor) -> float:
    return float(rows.square().sum(1).mean())


@given(seed=seeds, channels=st.integers(2, 8), out=st.integers(1, 5), kept=st.integers(1, 7), offset=st.booleans())
@quick
def test_joint_site_error(seed: int, channels: int, out: int, kept: int, offset: bool) -> None:
    z, weight, bias = correlated(seed, 40, channels), draw(seed + 3, out, channels), draw(seed + 4, out)
    keep = torch.arange(min(kept, channels))
    mix = draw(seed + 5, keep.numel(), channels)
    shift = draw(seed + 6, channels) if offset else None
    folded, moved = fold(weight, bias, keep, mix, shift)
    change = (z @ weight.T + bias) - (z[:, keep] @ folded.T + moved)
    moments = moments_of(z)
    residual = residual_gram(moments.covariance(), moments.mean, keep, mix, shift)
    torch.testing.assert_close(site_diag(weight, residual), change.square().mean(0), rtol=1e-7, atol=1e-9)


@given(seed=seeds, channels=st.integers(2, 8), out=st.integers(1, 10), centred=st.booleans())
@quick
def test_error_curve(seed: int, channels: int, out: int, centred: bool) -> None:
    z, weight = correlated(seed, 40, channels), draw(seed + 3, out, channels)
    moments = moments_of(z)
    gram = moments.covariance() if centred else moments.second_moment()
    scaling = draw(seed + 4, channels).abs() + 0.1
    for factor in (pivoted_cholesky(gram, weights_C=scaling), ordered_cholesky(gram, torch.arange(channels))):
        curve = joint_error_curve(weight, factor)
        for k in range(1, channels + 1):
            keep = factor.order[:k].sort().values
            mix, shift = fit_mix(gram, keep, mean_C=moments.mean if centred else None)
            error = z - z[:, keep] @ mix - (0.0 if shift is None else shift)
            assert float(curve[k]) == pytest.approx(mean_square(error @ weight.T), rel=1e-5, abs=1e-7 * float(curve[0]))
    torch.testing.assert_close(factor.factor @ factor.factor.T, gram, rtol=1e-9, atol=1e-9)


@given(seed=seeds, taps=st.integers(1, 6), same=st.booleans())
@quick
def test_several_taps(seed: int, taps: int, same: bool) -> None:
    error = draw(seed, 30, 4, 1).repeat(1, 1, taps) if same else draw(seed, 30, 4, taps)
    weight = draw(seed + 1, 3, 4, 1).repeat(1, 1, taps) if same else draw(seed + 1, 3, 4, taps)
    exact = mean_square(torch.einsum("ocp,ncp->no", weight, error))
    pairs = torch.einsum("ncp,ndq->pqcd", error, error) / 30
    joint = torch.einsum("ocp,pqcd,odq->", weight, pairs, weight)
    assert exact == pytest.approx(float(joint), rel=1e-9)
    apart = sum(float(site_diag(weight[:, :, p], pairs[p, p]).sum()) for p in range(taps))
    assert exact <= taps * apart * (1 + 1e-9)
    if same:
        assert exact == pytest.approx(taps * apart, rel=1e-9)


@given(seed=seeds, channels=st.integers(2, 8), kept=st.integers(1, 7))
@quick
def test_batchnorm_after_the_consumer(seed: int, channels: int, kept: int) -> None:
    z, weight = correlated(seed, 60, channels), draw(seed + 3, 5, channels)
    moments, keep = moments_of(z), torch.arange(min(kept, channels))
    mix, shift = fit_mix(moments.covariance(), keep, mean_C=moments.mean)
    old, new = z @ weight.T, (z[:, keep] @ mix + shift) @ weight.T
    residual = residual_gram(moments.covariance(), moments.mean, keep, mix, shift)
    torch.testing.assert_close(new.mean(0), old.mean(0), rtol=1e-9, atol=1e-9)
    want = old.var(0, correction=0) - site_diag(weight, residual)
    torch.testing.assert_close(new.var(0, correction=0), want, rtol=1e-7, atol=1e-7)
    assert float(new.var(0).sum()) <= float(old.var(0).sum()) * (1 + 1e-9)


@pytest.mark.parametrize("name", NEURON_TYPES)
@given(seed=seeds, s=st.floats(1e-3, 1e3))
@settings(max_examples=15, deadline=None)
def test_merge_of_positively_homogeneous_neurons(name: str, seed: int, s: float) -> None:
    kind = neuron_type(name)
    if not kind.symmetry(*kind.defaults).homogeneous:
        s = 1.0
    w, x = draw(seed, 4), draw(seed + 1, 20, 4) * 3
    torch.testing.assert_close(kind.phi(x @ (s * w), *kind.defaults), s * kind.phi(x @ w, *kind.defaults))


@pytest.mark.parametrize("name", [n for n, k in NEURON_TYPES.items() if k.symmetry(*k.defaults).reflection is not None])
@given(seed=seeds)
@settings(max_examples=15, deadline=None)
def test_merge_of_odd_and_point_symmetric_neurons(name: str, seed: int) -> None:
    kind = neuron_type(name)
    centre = kind.symmetry(*kind.defaults).reflection
    u = draw(seed, 20, 4) @ draw(seed + 1, 4) * 3
    torch.testing.assert_close(kind.phi(-u, *kind.defaults), centre - kind.phi(u, *kind.defaults))


@pytest.mark.parametrize("name", NEURON_TYPES)
@given(seed=seeds, bias=st.floats(-5, 5))
@settings(max_examples=10, deadline=None)
def test_constant_neurons(name: str, seed: int, bias: float) -> None:
    kind = neuron_type(name)
    incoming = torch.tensor([0.0, 0.0, bias], dtype=torch.float64)
    x = torch.cat([draw(seed, 20, 2), torch.ones(20, 1, dtype=torch.float64)], 1)
    value = kind.phi(torch.tensor(bias, dtype=torch.float64), *kind.defaults)
    # atol: 1 + erf(u) cancels for negative u, and vectors and single numbers are computed by different code
    torch.testing.assert_close(kind.phi(x @ incoming, *kind.defaults), value.expand(20), rtol=1e-14, atol=2e-15)


@given(seed=seeds, s=st.floats(0, 100), c=st.floats(-5, 5))
@quick
def test_merges_through_max_pooling(seed: int, s: float, c: float) -> None:
    u = draw(seed, 1, 2, 6, 6)
    torch.testing.assert_close(F.max_pool2d(s * u + c, 2), s * F.max_pool2d(u, 2) + c)
    assert not torch.allclose(F.max_pool2d(-u, 2), -F.max_pool2d(u, 2))


@given(seed=seeds, t=st.floats(0.1, 10), sign=st.sampled_from([1.0, -1.0]), s=st.floats(0.1, 10))
@quick
def test_batchnorm_inside_the_group(seed: int, t: float, sign: float, s: float) -> None:
    x, w, b, mean, bias = draw(seed, 50, 4), draw(seed + 1, 4), draw(seed + 2, 2), draw(seed + 3, 1), draw(seed + 4, 1)
    var = draw(seed + 5, 1).square() + 0.5
    raw = torch.stack([w, sign * t * w])  # neuron 1 is a scaled, perhaps mirrored copy of neuron 0
    gamma, beta = torch.tensor([1.0, s * sign], dtype=torch.float64), torch.cat([bias, s * bias])
    # Running statistics that belong to the weights: those of neuron 1 follow from those of neuron 0.
    running_mean = torch.cat([mean, sign * t * (mean - b[0]) + b[1]])
    running_var = torch.cat([var, t**2 * var])
    u = x @ raw.T + b
    for training in (False, True):
        stats_in = (running_mean.clone(), running_var.clone())
        z = F.relu(F.batch_norm(u, *stats_in, gamma, beta, training=training, eps=1e-12))
        torch.testing.assert_close(z[:, 1], s * z[:, 0], rtol=1e-6, atol=1e-6 * s)
    scale = gamma / running_var.sqrt()
    folded = torch.cat([raw * scale[:, None], ((b - running_mean) * scale + beta)[:, None]], 1)
    torch.testing.assert_close(folded[1], s * folded[0], rtol=1e-9, atol=1e-9 * s)


EXACT = [("relu", 2.5), ("leaky_relu", 0.3), ("tanh", -1.0), ("sigmoid", -1.0), ("identity", -3.0), ("gelu", 1.0)]


@pytest.mark.parametrize(("name", "s"), EXACT)
@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_chain_rule_of_an_exact_merge(name: str, s: float, seed: int) -> None:
    kind = neuron_type(name)
    x = torch.cat([draw(seed, 30, 3), torch.ones(30, 1, dtype=torch.float64)], 1)
    w = draw(seed + 1, 2, 4)
    w = torch.cat([w, s * w[:1]]).requires_grad_()  # neuron 2 goes into neuron 0
    consumer = draw(seed + 2, 3, 3).requires_grad_()
    target = draw(seed + 3, 30, 3)
    offset = consumer.detach()[:, 2] * (kind.symmetry(*kind.defaults).reflection or 0.0) if s < 0 else 0.0
    (kind.phi(x @ w.T, *kind.defaults) @ consumer.T - target).square().mean().backward()
    mix = torch.tensor([[1.0, 0.0, s], [0.0, 1.0, 0.0]], dtype=torch.float64)
    small = w.detach()[:2].requires_grad_()
    folded = (consumer.detach() @ mix.T).requires_grad_()
    (kind.phi(x @ small.T, *kind.defaults) @ folded.T + offset - target).square().mean().backward()
    assert w.grad is not None
    assert consumer.grad is not None
    torch.testing.assert_close(small.grad, mix @ w.grad)
    torch.testing.assert_close(folded.grad, consumer.grad[:, :2])


@given(seed=seeds)
@quick
def test_dead_neurons(seed: int) -> None:
    x, w, consumer, target = draw(seed, 30, 3), draw(seed + 1, 4, 3), draw(seed + 2, 2, 4), draw(seed + 3, 30, 2)
    bias = torch.tensor([0.1, -0.2, 0.3, -1e3], dtype=torch.float64)  # the last never fires
    grads = []
    for keep in (torch.arange(4), torch.arange(3)):
        parts = [w[keep].clone().requires_grad_(), consumer[:, keep].clone().requires_grad_()]
        (F.relu(x @ parts[0].T + bias[keep]) @ parts[1].T - target).square().mean().backward()
        grads.append((parts[0].grad, parts[1].grad))
    torch.testing.assert_close(grads[0][0][:3], grads[1][0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(grads[0][1][:, :3], grads[1][1], rtol=1e-12, atol=1e-13)
    assert not grads[0][0][3].any()
    assert not grads[0][1][:, 3].any()


@given(seed=seeds, places=st.integers(1, 4), kept=st.integers(1, 4))
@quick
def test_tied_weights(seed: int, places: int, kept: int) -> None:
    rows = [correlated(seed + 10 * i, 30, 5) for i in range(places)]
    weight, keep = draw(seed + 3, 4, 5), torch.arange(kept)
    moments = moments_of(torch.cat(rows))
    mix, shift = fit_mix(moments.covariance(), keep, mean_C=moments.mean)
    assert shift is not None
    total = sum(mean_square((z - z[:, keep] @ mix - shift) @ weight.T) for z in rows)
    pooled = residual_gram(moments.covariance(), moments.mean, keep, mix, shift)
    assert total == pytest.approx(places * float(site_diag(weight, pooled).sum()), rel=1e-7, abs=1e-9)
    other = mix + 0.1 * draw(seed + 7, kept, 5)
    assert total <= sum(mean_square((z - z[:, keep] @ other - shift) @ weight.T) for z in rows) + 1e-9


@given(seed=seeds, p=st.sampled_from([0.1, 0.5]))
@settings(max_examples=6, deadline=None)
def test_dropout_correction(seed: int, p: float) -> None:
    z = correlated(seed, 3, 3).repeat(40_000, 1)
    mask = (torch.rand(z.shape, generator=torch.Generator().manual_seed(seed + 1)) >= p).double() / (1 - p)
    plain, seen = moments_of(z), moments_of(z * mask)
    scale = float(plain.second_moment().diagonal().max())
    corrected = seen.without_dropout(p)
    torch.testing.assert_close(corrected.second_moment(), plain.second_moment(), rtol=0.0, atol=0.05 * scale)
    diagonal = seen.second_moment().diagonal() * (1 - p)
    torch.testing.assert_close(diagonal, plain.second_moment().diagonal(), rtol=0.0, atol=0.05 * scale)
    torch.testing.assert_close(corrected.mean, seen.mean)
    mix, offset, keep, weight = draw(seed + 2, 2, 3), draw(seed + 3, 3), torch.tensor([0, 2]), draw(seed + 4, 4, 3)
    behind, without = (
        float(site_diag(weight, residual_gram(m.covariance(), m.mean, keep, mix, offset)).sum()) for m in (seen, plain)
    )
    assert behind >= without * 0.98


@pytest.mark.parametrize("name", NEURON_TYPES)
@given(seed=seeds, near=st.floats(0, 1))
@settings(max_examples=15, deadline=None)
def test_worst_case_bound(name: str, seed: int, near: float) -> None:
    kind = neuron_type(name)
    args = kind.defaults
    symmetry = kind.symmetry(*args)
    w = draw(seed, 2, 4)
    s, centre = (2.0, 0.0) if symmetry.homogeneous else (1.0, 0.0)
    if symmetry.reflection is not None and seed % 2:
        s, centre = -1.0, symmetry.reflection
    w = torch.cat([w, s * w[:1] + near * draw(seed + 1, 1, 4)])  # neuron 2 is nearly s times neuron 0
    consumer = draw(seed + 2, 3, 3)
    x = torch.cat([draw(seed + 3, 200, 3), torch.ones(200, 1, dtype=torch.float64)], 1)
    z = kind.phi(x @ w.T, *args)
    standing = z.clone()
    standing[:, 2] = s * z[:, 0] + centre
    deviation = torch.tensor([0.0, 0.0, kind.lipschitz(*args) * float((w[2] - s * w[0]).norm())])
    jump = torch.tensor([0.0, 0.0, kind.jump(*args) + 1e-9])
    limit = bounds.worst_case_site_error(consumer, deviation, float(x.norm(dim=1).max()), jump)
    change = (z - standing) @ consumer.T
    assert float(change.norm(dim=1).max()) <= limit + 1e-9


@given(seed=seeds, classes=st.integers(2, 6), size=st.floats(0, 3))
@quick
def test_margin(seed: int, classes: int, size: float) -> None:
    before = draw(seed, 50, classes)
    after = before + size * draw(seed + 1, 50, classes)
    found = bounds.compare_logits(before, after)
    assert found.flips <= found.at_risk
    labels = torch.randint(0, classes, (50,), generator=torch.Generator().manual_seed(seed))
    lost = int((before.argmax(1) == labels).sum()) - int((after.argmax(1) == labels).sum())
    assert lost <= found.flips
    top = before.topk(2, dim=1).values
    safe = top[:, 0] - top[:, 1] > 2 * (after - before).abs().amax(1)
    assert torch.equal(before.argmax(1)[safe], after.argmax(1)[safe])


@given(rows=st.integers(1, 300), p=st.sampled_from([0.0, 1.0]) | st.floats(1e-9, 1 - 1e-9), alpha=st.floats(0.001, 0.4))
@quick
def test_clopper_pearson(rows: int, p: float, alpha: float) -> None:
    # Coverage, summed exactly over everything that can be drawn.
    covered = sum(
        float(stats.binom.pmf(k, rows, p)) for k in range(rows + 1) if p <= bounds.clopper_pearson_upper(k, rows, alpha)
    )
    assert covered >= 1 - alpha - 1e-9


@given(p=st.just(0.0) | st.floats(1e-9, 0.05), reuse=st.integers(0, 3))
@settings(max_examples=10, deadline=None)
def test_alpha_spending(p: float, reuse: int) -> None:
    alpha, rows = 0.2, 60
    assert sum(bounds.alpha_for_attempt(i, alpha) for i in range(1, 2000)) <= alpha
    # The worst adversary: among 2^reuse removals, try the one whose rows look best. All must be covered at once.
    level = bounds.alpha_for_attempt(1, alpha, earlier_results=reuse)
    miss = sum(
        float(stats.binom.pmf(k, rows, p)) for k in range(rows + 1) if p > bounds.clopper_pearson_upper(k, rows, level)
    )
    assert 2**reuse * miss <= bounds.alpha_for_attempt(1, alpha) + 1e-9


@given(seed=seeds, removals=st.integers(1, 5), size=st.floats(0, 1))
@quick
def test_ledger_sum(seed: int, removals: int, size: float) -> None:
    labels = torch.randint(0, 4, (80,), generator=torch.Generator().manual_seed(seed))
    inputs = torch.zeros(80, 1)
    on_training, on_probe = AcceptanceTest(None, None), AcceptanceTest(None, make_probe((inputs, labels), inputs[:2]))
    logits, lost = draw(seed, 80, 4), 0.0
    spent: dict[AcceptanceTest, float] = {}
    for i in range(removals):
        after = logits + size * draw(seed + i + 1, 80, 4)
        for test, truth in ((on_training, None), (on_probe, labels)):
            part = test.examples(((inputs,), {}))
            assert part.probe is not None
            rows = slice(0, 80) if truth is None else slice(*test.error_budget.next_rows())
            found = compare([logits[rows]], [after[rows]], part.probe.labels, None)
            test.record(test.check(part, replace(found, moved=0.0)))  # the sanity limit is another matter
            fell = (logits.argmax(1) == labels)[rows].double() - (after.argmax(1) == labels)[rows].double()
            spent[test] = spent.get(test, 0.0) + float(fell.mean())
        lost += float((logits.argmax(1) == labels).double().mean() - (after.argmax(1) == labels).double().mean())
        logits = after + draw(seed + i + 50, 80, 4)  # training goes on in between
    assert lost == pytest.approx(spent[on_training])
    assert spent[on_training] <= on_training.training_flips + 1e-12
    assert spent[on_probe] <= on_probe.error_budget.spent + 1e-12


@given(seed=seeds, least_squares=st.booleans())
@quick
def test_compounding(seed: int, least_squares: bool) -> None:
    z, weight = correlated(seed, 60, 8), draw(seed + 3, 5, 8)
    first = z @ weight.T
    sigma = mean_square(first - first.mean(0)) ** 0.5
    errors, product = [], 1.0
    channels = 8
    for _ in range(3):  # take one or two channels away, again and again; never all, which surgery refuses
        moments, keep = moments_of(z), torch.arange(channels - 1 - (seed + channels) % 2)
        mix, shift = fit_mix(moments.covariance(), keep, mean_C=moments.mean)
        if not least_squares:
            mix = torch.eye(channels, dtype=torch.float64)[keep]
        old = z @ weight.T
        folded, moved = fold(weight, torch.zeros(5).double(), keep, mix, shift if least_squares else None)
        new = z[:, keep] @ folded.T + moved
        errors.append((mean_square(old - new) / mean_square(old - old.mean(0))) ** 0.5)
        product *= 1 + errors[-1]
        if moved is not None:  # keep what was folded into the bias: shift the rows by a channel that is always one
            first = first - moved
        z, weight, channels = z[:, keep], folded, keep.numel()
    total = mean_square(first - z @ weight.T) ** 0.5 / sigma
    limit = math.fsum(errors) if least_squares else product - 1
    assert total <= limit * (1 + 1e-9) + 1e-9


@given(seed=seeds, channels=st.integers(2, 7), kept=st.integers(1, 6), heads=st.integers(1, 2))
@quick
def test_products_of_activations(seed: int, channels: int, kept: int, heads: int) -> None:
    left, x = correlated(seed, 20, channels * heads), draw(seed + 3, 15, 4)
    weight, bias = draw(seed + 4, channels * heads, 4), draw(seed + 5, channels * heads)
    right = x @ weight.T + bias
    sums = np.repeat(np.arange(heads), channels)[:, None]
    inside = torch.from_numpy(sums == sums.T)
    keep = torch.cat([torch.arange(min(kept, channels)) + head * channels for head in range(heads)])
    mix = torch.where(inside[keep], draw(seed + 6, keep.numel(), channels * heads), 0.0)
    rows = np.arange(channels * heads)[:, None]
    edit = TensorEdit(tensor="v", keep={0: keep}, folds=(ColumnFold(dim=0, columns=rows, keep=keep, mix=mix),))
    moved = x @ apply_edit(edit, weight, {"v": weight}).T + apply_edit(edit, bias, {"v": bias})

    def scores(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """All rows of one operand with all rows of the other, by head."""
        a, b = (t.reshape(len(t), heads, -1).transpose(0, 1) for t in (a, b))
        return a @ b.mT

    before, second = scores(left, right), [t.T @ t / len(t) for t in (left, right)]
    change = float((before - scores(left[:, keep], moved)).square().mean((1, 2)).sum())
    energy = float(before.square().mean((1, 2)).sum())
    assert product_error(*second, sums, keep, mix) == pytest.approx(change, rel=1e-8, abs=1e-9 * energy)
    gone = ~torch.isin(torch.arange(channels * heads), keep)
    lost = float(scores(left * gone, right).square().mean((1, 2)).sum())
    assert float(joint(*second, sums)[gone][:, gone].sum()) == pytest.approx(lost, rel=1e-8, abs=1e-9 * energy)
    centred = right - right.mean(0)
    related = float(torch.where(inside, second[0] * (centred.T @ centred / len(right)), 0.0).sum())
    assert related == pytest.approx(float(before.var(2, correction=0).mean(1).sum()), rel=1e-8)
    assert related <= float(before.flatten(1).var(1, correction=0).sum()) * (1 + 1e-12)


@given(
    seed=seeds,
    kernel=st.integers(3, 4),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    transposed=st.booleans(),
    constant=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_zero_padding(seed: int, kernel: int, stride: int, dilation: int, transposed: bool, constant: bool) -> None:
    kept, channels, out = 3, 5, 4
    z = draw(seed, 4, kept, 9, 9) + 1.0
    more = torch.einsum("nkhw,kc->nchw", z, draw(seed + 1, kept, channels - kept))
    z = torch.cat([z, more + 0.5 * constant], 1)
    weight, bias = draw(seed + 2, out, channels, kernel, kernel), draw(seed + 3, out)
    padding = 0 if transposed else (kernel - 1) * dilation
    apply, dim = (F.conv_transpose2d, 0) if transposed else (F.conv2d, 1)
    weight = weight.transpose(0, 1).contiguous() if transposed else weight

    def run(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return apply(x, w, b, stride=stride, padding=padding, dilation=dilation)

    rows = z.movedim(1, -1).reshape(-1, channels)
    moments, keep = moments_of(rows), torch.arange(kept)
    if constant:  # the fit with an offset
        mix, shift = fit_mix(moments.covariance(), keep, mean_C=moments.mean)
    else:
        mix, shift = fit_mix(moments.second_moment(), keep)
    columns = np.arange(channels)[:, None]
    edit = TensorEdit(tensor="w", keep={dim: keep}, folds=(ColumnFold(dim=dim, columns=columns, keep=keep, mix=mix),))
    moves = () if shift is None else (OffsetFold(weight="w", dim=dim, columns=columns, offset=shift),)
    moved = apply_edit(TensorEdit(tensor="b", keep={}, offsets=moves), bias, {"w": weight})
    change = run(z, weight, bias) - run(z[:, :kept], apply_edit(edit, weight, {"w": weight}), moved)
    full = run(torch.ones_like(z), torch.ones_like(weight), torch.zeros_like(bias))[0, 0]
    border = full < full.max()  # outputs that read fewer taps
    assert bool(border.any())
    scale = float(run(z, weight, bias).abs().max())
    at_border, inside = (float(change[..., where].abs().sum()) / scale for where in (border, ~border))
    assert (at_border > 1e-6) if constant else (at_border <= 1e-10)
    assert inside <= 1e-10 or (constant and transposed)


@given(seed=seeds, heads=st.integers(1, 3), size=st.integers(2, 6), kept=st.integers(1, 5))
@quick
def test_scale_of_the_scores(seed: int, heads: int, size: int, kept: int) -> None:
    kept = min(kept, size - 1)
    keep = torch.cat([torch.arange(kept) + head * size for head in range(heads)])
    row_of = torch.arange(heads * size) // size
    mix = torch.where(row_of[keep][:, None] == row_of, draw(seed, keep.numel(), heads * size), 0.0)
    mix[:, keep] = torch.eye(keep.numel(), dtype=torch.float64)
    x, value = draw(seed + 1, 2, 7, 5), draw(seed + 2, 2, heads, 7, 3)
    (wq, wk), (bq, bk) = draw(seed + 3, 2, heads * size, 5), draw(seed + 4, 2, heads * size)
    wq, bq = mix.T @ wq[keep], mix.T @ bq[keep]  # queries of which only `keep` say anything
    columns = np.arange(heads * size)[:, None]
    fold = ColumnFold(dim=0, columns=columns, keep=keep, mix=mix)
    scale = RowScale(dim=0, positions=columns, factor=math.sqrt(kept / size))
    left = TensorEdit(tensor="q", keep={0: keep}, scales=(scale,))
    right = TensorEdit(tensor="k", keep={0: keep}, folds=(fold,))

    def attend(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        w, b, v, c = tensors
        query, key = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (F.linear(x, w, b), F.linear(x, v, c)))
        return F.scaled_dot_product_attention(query, key, value)

    old = (wq, bq, wk, bk)
    new = tuple(apply_edit(edit, t, {}) for edit, t in zip((left, left, right, right), old, strict=True))
    torch.testing.assert_close(attend(new), attend(old), rtol=1e-9, atol=1e-10)


@given(seed=seeds, heads=st.integers(2, 4), size=st.integers(1, 4), factor=st.floats(-3, 3), exact=st.booleans())
@quick
def test_whole_heads(seed: int, heads: int, size: int, factor: float, exact: bool) -> None:
    x = draw(seed, 3, 6, 5)
    weights, biases = draw(seed + 1, 3, heads, size, 5), draw(seed + 2, 3, heads, size)
    mix = draw(seed + 3, heads - 1, heads)
    if exact:  # the last head has the scores of the first, and multiples of its values
        weights[:2, -1], biases[:2, -1] = weights[:2, 0], biases[:2, 0]
        weights[2, -1], biases[2, -1] = factor * weights[2, 0], factor * biases[2, 0]
        mix = torch.eye(heads, dtype=torch.float64)[:-1]
        mix[0, -1] = factor
    keep = torch.arange(heads - 1)
    out, bias = draw(seed + 4, 4, heads * size), draw(seed + 5, 4)

    def attend(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        q, k, v = (torch.einsum("nti,hdi->nhtd", x, one) + c[:, None] for one, c in zip(w, b, strict=True))
        return F.scaled_dot_product_attention(q, k, v)  # (batch, heads, time, size)

    def project(z: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.linear(z.transpose(1, 2).flatten(2), w, bias)

    columns = np.arange(heads * size).reshape(heads, size)
    positions = torch.from_numpy(columns)[keep].reshape(-1)
    fold = ColumnFold(dim=1, columns=columns, keep=keep, mix=mix)
    folded = apply_edit(TensorEdit(tensor="o", keep={1: positions}, folds=(fold,)), out, {"o": out})
    z = attend(weights, biases)
    after = project(attend(weights[:, :-1], biases[:, :-1]), folded)
    missing = z - torch.einsum("nktd,kh->nhtd", z[:, :-1], mix)
    lost = F.linear(missing.transpose(1, 2).flatten(2), out)
    torch.testing.assert_close(project(z, out) - after, lost, rtol=1e-9, atol=1e-9)
    if exact:
        assert float(lost.abs().max()) <= 1e-9


def affine_copies(seed: int, kept: int, gone: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix (kept, channels) with one entry per column, and constants: the channels that went come last."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.cat([torch.eye(kept, dtype=torch.float64), torch.zeros(kept, gone, dtype=torch.float64)], 1)
    constants = torch.zeros(kept + gone, dtype=torch.float64)
    slopes = torch.randn(gone, generator=generator, dtype=torch.float64)
    for j in range(gone):
        partner = int(torch.randint(0, kept, (1,), generator=generator))
        mix[partner, kept + j] = {"copies": 1.0, "multiples": float(slopes[j]), "constants": 0.0}.get(
            kind, float(slopes[j])
        )
    if kind == "constants":
        constants[kept:] = float(slopes[0])
    elif kind == "any":
        constants[kept:] = torch.randn(gone, generator=generator, dtype=torch.float64)
    return mix, constants


@given(seed=seeds, kept=st.integers(2, 6), gone=st.integers(1, 4), rms=st.booleans(), far=st.sampled_from([0.0, 1e3]))
@quick
def test_statistics_of_a_norm(seed: int, kept: int, gone: int, rms: bool, far: float) -> None:
    first, constants = affine_copies(seed, kept, gone, "any")
    second, others = affine_copies(seed + 1, kept - 1, 1, "any")
    x = draw(seed + 2, 9, kept - 1) + far
    middle = x @ second + others
    full = middle @ first + constants
    norm = nn.RMSNorm(kept + gone, eps=1e-3) if rms else nn.LayerNorm(kept + gone, eps=1e-3)
    norm.double()
    norm.weight.data = draw(seed + 3, kept + gone)
    expected = norm(full)[:, : kept - 1].detach()
    for mix, shift in ((first, constants), (second, others)):
        num = mix.shape[0]
        changes = norm_changes(norm, NormEdit(module="n", mix=mix, offset=shift, plain=False))
        for parameter in norm.parameters():
            parameter.data = parameter.data[:num]
        for name, value in changes.items():
            setattr(norm, name, value)
    torch.testing.assert_close(norm(x).detach(), expected, rtol=1e-9 * max(far, 1.0), atol=1e-9 * max(far, 1.0))


@given(
    seed=seeds,
    kept=st.integers(3, 6),
    gone=st.integers(1, 3),
    kind=st.sampled_from(["copies", "multiples", "constants"]),
)
@quick
def test_behind_a_norm(seed: int, kept: int, gone: int, kind: str) -> None:
    mix, constants = affine_copies(seed, kept, gone, kind)
    x = draw(seed + 1, 40, kept) + draw(seed + 2, kept)
    full, num = x @ mix + constants, kept + gone
    weight, bias = draw(seed + 3, num), draw(seed + 4, num)
    weight = torch.where(weight.abs() < 0.1, 1.0, weight)
    if kind != "constants":
        rms = F.rms_norm(full, (num,), weight, 1e-3)
        slopes = mix * weight / weight[:kept, None]
        torch.testing.assert_close(rms, rms[:, :kept] @ slopes, rtol=1e-9, atol=1e-9)
    normed = F.layer_norm(full, (num,), None, None, 1e-3)
    sums, total = mix.sum(1), constants.sum()
    if kind == "multiples" and abs(num - float(sums.sum())) < 0.1:
        return
    slope = mix.sum(0)  # every column has one entry
    if kind == "copies":
        share = torch.zeros(num, dtype=torch.float64)
    else:
        share = (slope - 1.0) / (num - sums.sum())
    torch.testing.assert_close(constants, -share * total, rtol=1e-9, atol=1e-9)  # the condition of the theorem
    z = normed[:, :kept]
    expected = z @ mix + torch.outer(z @ sums, share)
    torch.testing.assert_close(normed, expected, rtol=1e-8, atol=1e-8)
    y, fitted = normed * weight + bias, expected * weight + bias
    torch.testing.assert_close(y, fitted, rtol=1e-7, atol=1e-7)


@given(seed=seeds, kept=st.integers(1, 6), gone=st.integers(1, 4), eps=st.floats(1e-6, 0.5))
@quick
def test_root_mean_square_of_fewer_channels(seed: int, kept: int, gone: int, eps: float) -> None:
    num = kept + gone
    x = torch.cat([draw(seed, 7, kept), torch.zeros(7, gone, dtype=torch.float64)], 1)
    old = nn.RMSNorm(num, eps=eps).double()
    old.weight.data = draw(seed + 1, num)
    new = nn.RMSNorm(kept, eps=eps).double()
    keep = torch.arange(kept)
    scale = RowScale(dim=0, positions=np.arange(num), factor=math.sqrt(num / kept), follow=True)
    edit = TensorEdit(tensor="w", keep={0: keep}, scales=(scale,))
    new.weight.data = apply_edit(edit, old.weight, {})
    new.eps = norm_changes(old, NormEdit(module="n", mix=torch.eye(kept, num), offset=None, plain=True))["eps"]
    before, after = old(x), new(x[:, :kept])
    torch.testing.assert_close(after, before[:, :kept], rtol=1e-9, atol=1e-12)
    direction = draw(seed + 2, 7, kept)
    (before[:, :kept] * direction).sum().backward()
    (after * direction).sum().backward()
    torch.testing.assert_close(new.weight.grad, merge_like(edit, old.weight.grad), rtol=1e-9, atol=1e-12)


@given(seed=seeds, kept=st.integers(1, 5), gone=st.integers(1, 4), eps=st.floats(1e-6, 0.5))
@quick
def test_global_response_norm(seed: int, kept: int, gone: int, eps: float) -> None:
    num, x = kept + gone, draw(seed, 2, 3, 4, kept)
    mix = torch.eye(kept, num, dtype=torch.float64)
    mix[torch.arange(gone) % kept, torch.arange(kept, num)] = draw(seed + 1, gone)
    layout = Response(axis=-1, eps=eps, gain="weight", bias="bias")
    gain, bias = draw(seed + 2, num), draw(seed + 3, num)
    factor, of = mix[:, kept:].sum(0), torch.arange(gone) % kept
    gain[kept:] = gain[of] / factor.abs()
    whole = response(x @ mix, layout, gain, bias, torch.ones(num), num)
    weights = Statistics.plain(num).after(mix.abs(), None).mean_weights
    found = response(x, layout, gain[:kept], bias[:kept], weights, num)
    torch.testing.assert_close(found, whole[..., :kept], rtol=1e-8, atol=1e-9)
    others = factor * (found[..., of] - bias[of]) + bias[kept:]
    torch.testing.assert_close(others, whole[..., kept:], rtol=1e-8, atol=1e-9)


@given(
    seed=seeds, size=st.integers(2, 6), kept=st.integers(1, 5), early=st.floats(-1, 1), late=st.floats(-1, 1),
    bias=st.booleans(),
)  # fmt: skip
@quick
def test_numbers_that_follow_a_size(seed: int, size: int, kept: int, early: float, late: float, bias: bool) -> None:
    kept = min(kept, size - 1)
    positions = np.arange(kept)
    x, y = draw(seed, 7, 5), draw(seed + 1, 9, 5)
    (wl, wr), (bl, br) = draw(seed + 2, 2, size, 5), draw(seed + 3, 2, size) * bias
    wl[kept:] = bl[kept:] = 0.0  # what goes adds nothing to the sums

    def readings(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = F.linear(x, tensors[0], tensors[1]), F.linear(y, tensors[2], tensors[3])
        d = left.shape[-1]
        sums = (left * d**early) @ right.mT  # a number on the way to the product, and two readings behind it
        return sums.mul(d**late).softmax(-1), (sums / d**-late).cos()

    old = tuple(t.clone().requires_grad_() for t in (wl, bl, wr, br))
    factor = (size / kept) ** (early + late)
    scale = RowScale(dim=0, positions=positions, factor=factor)
    scales = ((scale,), (scale,), (), ())
    edits = [TensorEdit(tensor="w", keep={0: torch.arange(kept)}, scales=found) for found in scales]
    new = tuple(apply_edit(edit, t, {}).requires_grad_() for edit, t in zip(edits, old, strict=True))
    for a, b in zip(readings(new), readings(old), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    for tensors in (old, new):
        sum(reading.sin().sum() for reading in readings(tensors)).backward()
    for i in range(2):
        expected, found = old[i].grad, new[i].grad
        assert expected is not None
        assert found is not None
        torch.testing.assert_close(found * factor, expected[:kept], rtol=1e-7, atol=1e-8)


@given(seed=seeds, channels=st.integers(1, 6), rows=st.integers(1, 40), ridge=st.floats(1e-3, 10))
@quick
def test_what_the_loss_sees(seed: int, channels: int, rows: int, ridge: float) -> None:
    g, r = correlated(seed, rows, channels), correlated(seed + 3, rows, channels)
    grad_factor, errors = g.T @ g / rows, r.T @ r / rows
    for metric in (
        grad_factor + ridge * torch.eye(channels, dtype=torch.float64),
        ridge * torch.eye(channels) + 0.0 * grad_factor,
    ):
        first = torch.linalg.solve(metric, grad_factor).trace()
        bound = (first * (errors * metric).sum()).sqrt()
        assert float((g * r).sum(1).abs().mean()) <= float(bound) * (1 + 1e-9)
    exact = grad_factor + 1e-12 * grad_factor.trace() * torch.eye(channels, dtype=torch.float64)
    assert float(torch.linalg.solve(exact, grad_factor).trace()) <= channels + 1e-6
    # every pair of a gradient and an error equally often: uncorrelated by construction
    pairs = (g @ r.T).square().mean()
    torch.testing.assert_close(pairs, (errors * grad_factor).sum(), rtol=1e-9, atol=1e-12)


@given(seed=seeds, channels=st.integers(1, 5), rows=st.integers(1, 30), size=st.integers(2, 12))
@quick
def test_sketched_rows(seed: int, channels: int, rows: int, size: int) -> None:
    g = correlated(seed, rows, channels)
    x = correlated(seed + 1, 1, channels)[0]
    whole = float((g @ x).square().sum())
    draws = torch.Generator().manual_seed(seed % 2**31)
    found = []
    for _ in range(400):
        sketch = Sketch(channels, size=size)
        sketch.add(g, draws)
        found.append(float((sketch.rows().double() @ x).square().sum()))
    energies = torch.tensor(found, dtype=torch.float64)
    if rows <= size:
        torch.testing.assert_close(energies, torch.full_like(energies, whole), rtol=1e-4, atol=1e-12)
    bound = (2 / size) ** 0.5 * whole
    assert abs(float(energies.mean()) - whole) <= 6 * bound / 400**0.5 + 1e-4 * whole
    assert float((energies - whole).square().mean()) <= bound**2 * 2.5 + (1e-4 * whole) ** 2  # of 400 draws


@given(seed=seeds, kept=st.integers(2, 6), gone=st.integers(1, 4), centred=st.booleans())
@quick
def test_rows_of_a_fixed_size(seed: int, kept: int, gone: int, centred: bool) -> None:
    draws = torch.Generator().manual_seed(seed % 2**31)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    def less_mean(rows: torch.Tensor) -> torch.Tensor:
        return rows - rows.mean(1, keepdim=True) if centred else rows

    def used(rows: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return gain[:, None] * less_mean(rows) / less_mean(rows).norm(dim=1, keepdim=True)

    mix = torch.cat([torch.eye(kept, dtype=torch.float64), random(kept, gone)], 1)
    if centred:
        mix[0] += 1.0 - mix.sum(0)
    z = random(7, kept)
    w, g = random(3, kept + gone), random(3)
    folded = less_mean(w) @ mix.T
    gain = g * folded.norm(dim=1) / less_mean(w).norm(dim=1)
    scale = 1e-9 * (1.0 + float(mix.abs().max())) ** 2
    torch.testing.assert_close(used(folded, gain) @ z.T, used(w, g) @ (z @ mix).T, rtol=1e-9, atol=scale)
