"""What a view demands of every criterion: rows of equal length, blocks that do not mix, sites of nothing but loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apoptosis.criteria import (
    Criterion,
    GroupView,
    NeuronView,
    SiteView,
    choose,
    criteria,
    get_criterion,
    relative_error,
)
from apoptosis.criteria.constraints import allowed, balanced, interleaved, step_between
from apoptosis.numerics.linalg import roundoff_floor
from apoptosis.numerics.moments import Moments
from apoptosis.records import Reduction, SiteReduction
from criteria.samples import draw, moments_of

every_criterion = pytest.mark.parametrize("name", criteria())
seeds = st.integers(0, 2**32 - 1)


def layer(seed: int, rows: int, per_row: int, *, data: bool = True) -> GroupView:
    """A ReLU layer whose redundant neurons are unevenly spread: most lie in the first row."""
    channels = rows * per_row
    incoming = draw(seed, channels, 6)
    copies = per_row // 2
    incoming[1 : copies + 1] = 2.0 * incoming[:1]
    incoming[-1] = incoming[-2]
    z = (draw(seed + 1, 40 * rows, 5) @ incoming[:, :-1].T + incoming[:, -1]).relu()
    site = SiteView(key="s", weight=draw(seed + 2, 7, channels, 1), moments=moments_of(z) if data else None)
    neuron = NeuronView(incoming=incoming, activation="relu")
    return GroupView(name="g", num_channels=channels, sites=(site,), neuron=neuron, seed=seed, rows=rows)


def counts(keep: torch.Tensor, view: GroupView) -> list[int]:
    return torch.bincount(keep // (view.num_channels // view.rows), minlength=view.rows).tolist()


@given(seed=seeds, rows=st.integers(1, 5), per_row=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_every_prefix_of_whole_turns_is_balanced(seed: int, rows: int, per_row: int) -> None:
    order = torch.randperm(rows * per_row, generator=torch.Generator().manual_seed(seed))
    found = balanced(order, rows)
    assert sorted(found.tolist()) == list(range(rows * per_row))
    for turns in range(per_row + 1):
        row = found[: turns * rows] // per_row
        assert torch.bincount(row, minlength=rows).tolist() == [turns] * rows
    for row in range(rows):  # within a row the order is the criterion's own
        mine = [c for c in order.tolist() if c // per_row == row]
        assert [c for c in found.tolist() if c // per_row == row] == mine


@every_criterion
@given(
    seed=seeds,
    rows=st.integers(2, 4),
    per_row=st.integers(2, 6),
    limit=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    align=st.sampled_from([1, 4, 6]),
)
@settings(max_examples=10, deadline=None)
def test_every_row_keeps_equally_many(name: str, seed: int, rows: int, per_row: int, limit: float, align: int) -> None:
    view = layer(seed, rows, per_row)
    proposal = choose(get_criterion(name), view, limit, align=align)
    if proposal is None:
        return
    keep = proposal.reduction.keep
    assert len(set(counts(keep, view))) == 1
    assert 0 < keep.numel() < view.num_channels
    site = view.sites[0]
    measured = relative_error(site, keep, proposal.reduction.sites["s"])
    assert proposal.errors["s"] == pytest.approx(measured)
    assert measured <= max(limit, roundoff_floor(view.num_channels))


@every_criterion
def test_rows_remove_something_where_something_can_go(name: str) -> None:
    view = layer(3, 2, 6)
    proposal = choose(get_criterion(name), view, 0.9)
    if name == "constant":  # nothing here is a constant
        return
    assert proposal is not None
    assert counts(proposal.reduction.keep, view)[0] < 6


def test_rows_without_data() -> None:
    view = layer(0, 2, 6, data=False)
    proposal = choose(get_criterion("pairwise"), view, 0.0)
    assert proposal is not None
    assert counts(proposal.reduction.keep, view) == [5, 5]  # three are copies in the first row, one in the second
    assert proposal.errors == {"s": pytest.approx(0.0, abs=1e-6)}


@every_criterion
@given(seed=seeds)
@settings(max_examples=5, deadline=None)
def test_curves_of_the_rearranged_order_are_the_certificate(name: str, seed: int) -> None:
    view = layer(seed, 3, 4)
    criterion = get_criterion(name)
    ranking = interleaved(criterion, view)
    for kept in range(max(3, ranking.min_keep), 12, 3):
        reduction = criterion.reduce(view, ranking.order[:kept].sort().values)
        for key, curve in ranking.curves.items():
            want = relative_error(view.sites[0], reduction.keep, reduction.sites[key])
            assert float(curve[kept]) == pytest.approx(want, rel=1e-5, abs=2e-6)


def test_a_criterion_without_curves_for_other_orders_is_tried() -> None:
    view = layer(1, 2, 8)
    plain = get_criterion("interpolative")
    own = Criterion(name="own", needs_data=True, rank=plain.rank, reduce=plain.reduce)
    a, b = (choose(criterion, view, 0.2) for criterion in (plain, own))
    assert a is not None
    assert b is not None
    assert a.reduction.keep.tolist() == b.reduction.keep.tolist()


@pytest.mark.parametrize(
    ("channels", "rows", "align", "step"),
    [(24, 3, 1, 3), (24, 3, 2, 6), (24, 3, 8, 12), (24, 3, 16, 12), (96, 3, 16, 48), (24, 1, 16, 16), (24, 3, 24, 24)],
)
def test_steps_are_multiples_of_rows_and_as_far_as_possible_of_align(
    channels: int, rows: int, align: int, step: int
) -> None:
    site = SiteView(key="s", weight=torch.ones(1, channels, 1))
    assert step_between(GroupView(name="g", num_channels=channels, sites=(site,), rows=rows), align) == step


def paired(seed: int, heads: int, size: int) -> tuple[GroupView, torch.Tensor]:
    """Copies across heads, which must not stand in for one another, and one zero channel in every head."""
    z = draw(seed, 200, heads, size)
    z[:, 1] = z[:, 0]
    z[:, :, -1] = 0.0
    z = z.reshape(200, -1)
    blocks = torch.arange(heads).repeat_interleave(size)
    second = (z.T @ z / 200) * (blocks[:, None] == blocks)
    moments = Moments(heads * size)
    moments.update(torch.linalg.cholesky(second + 1e-13 * torch.eye(len(second))).T * len(second) ** 0.5, exact=True)
    site = SiteView(
        key="s", weight=draw(seed + 1, 5, heads * size, 1), moments=moments, centred=False, blocks=blocks, note="scores"
    )
    return GroupView(name="g", num_channels=heads * size, sites=(site,), rows=heads), blocks


@every_criterion
def test_blocks_never_mix(name: str) -> None:
    view, blocks = paired(0, 3, 4)
    proposal = choose(get_criterion(name), view, 0.8)
    if name == "pairwise":  # nothing is known of the neurons
        assert proposal is None
        return
    assert proposal is not None
    found = proposal.reduction.sites["s"]
    other = blocks[proposal.reduction.keep][:, None] != blocks
    assert not found.mix[other].any()
    assert found.offset is None
    assert [c.note for c in proposal.certificates(view)] == ["scores"]


@every_criterion
def test_where_nothing_mixes_only_what_is_silent_goes(name: str) -> None:
    z = draw(0, 200, 8)
    z[:, 1] = z[:, 0]
    z[:, 5] = 0.0
    z[:, 7] *= 0.01
    moments = Moments(8)
    moments.update(torch.cat([z, -z]), exact=True)
    site = SiteView(key="s", weight=torch.ones(1, 8, 1).double(), moments=moments, centred=False, mixes=False)
    view = GroupView(name="g", num_channels=8, sites=(site,))
    exact = choose(get_criterion(name), view, 0.0)
    if name in ("pairwise", "random", "magnitude"):  # they do not look at what the channels hold
        assert exact is None
        return
    assert exact is not None
    assert exact.reduction.keep.tolist() == [0, 1, 2, 3, 4, 6, 7]
    found = exact.reduction.sites["s"].mix
    assert torch.equal(found, torch.eye(8, dtype=torch.float64)[exact.reduction.keep])
    loose = choose(get_criterion(name), view, 0.02)
    assert loose is not None
    assert loose.reduction.keep.tolist() == [0, 1, 2, 3, 4, 6]
    gone = z[:, [5, 7]].sum(1).square().mean() / z.sum(1).square().mean()
    assert loose.errors["s"] == pytest.approx(float(gone**0.5), rel=1e-6)


def test_what_is_not_allowed_is_cut_down() -> None:
    view, blocks = paired(0, 2, 3)
    keep = torch.tensor([0, 1, 3, 4])
    mix = draw(1, 4, 6)
    merge = mix.clone()
    given = Reduction(group="g", keep=keep, sites={"s": SiteReduction(mix=mix, offset=draw(2, 6))}, merge=merge)
    cut = allowed(view, given)
    assert cut.merge is None
    assert cut.sites["s"].offset is None
    assert torch.equal(cut.sites["s"].mix, mix * (blocks[keep][:, None] == blocks))
    free = replace(view, sites=(replace(view.sites[0], blocks=None, centred=True),))
    assert allowed(free, given).sites["s"].mix is mix
    assert allowed(free, given).merge is merge
