"""Reductions and errors from the factorisation that ordered the channels: those of a second one, to round-off."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apoptosis.criteria import GroupView, SiteView, choose, get_criterion, interleaved
from apoptosis.criteria.certificate import relative_error
from apoptosis.criteria.factored import reduce_by_factor
from apoptosis.numerics.moments import Moments

INTERPOLATIVE = get_criterion("interpolative")


def view(seed, *, channels=48, rank=20, noise=0.05, centred=True, taps=1, grad=True, exact=False, dropout=0.0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(400, rank, generator=draw) @ torch.randn(rank, channels, generator=draw)
    rows = torch.relu(hidden + noise * torch.randn(400, channels, generator=draw)) + 0.3
    moments = Moments(channels)
    moments.update(rows.double() if exact else rows, exact=exact)
    if exact:
        moments.set_root(None)
    site = SiteView(
        key="s",
        weight=torch.randn(7, channels, taps, generator=draw),
        moments=moments,
        centred=centred,
        dropout=dropout,
        grad_factor=torch.randn(30, channels, generator=draw) if grad else None,
    )
    return GroupView(name="g", num_channels=channels, sites=(site,))


@given(
    seed=st.integers(0, 10_000),
    keep=st.integers(8, 47),
    centred=st.booleans(),
    taps=st.sampled_from([1, 4]),
    grad=st.booleans(),
    exact=st.booleans(),
    dropout=st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=60, deadline=None)
def test_the_same_reduction_and_error_as_from_moments(seed, keep, centred, taps, grad, exact, dropout):
    shown = view(seed, centred=centred, taps=taps, grad=grad, exact=exact, dropout=dropout)
    ranking = interleaved(INTERPOLATIVE, shown)
    assert ranking.factor is not None
    found = reduce_by_factor(shown, ranking, keep)
    if found is None:  # a kept channel is a mix of others, as far as the moments tell
        return
    (key, error), site = *found.errors.items(), shown.sites[0]
    other = INTERPOLATIVE.reduce(shown, found.reduction.keep)
    assert torch.equal(found.reduction.keep, ranking.order[:keep].sort().values)
    measured = relative_error(site, found.reduction.keep, found.reduction.sites[key])
    assert error == pytest.approx(measured, rel=2e-3, abs=2e-6)
    assert error >= measured * (1 - 1e-6) - 2e-6
    assert error <= relative_error(site, other.keep, other.sites[key]) * (1 + 1e-6) + 2e-6
    assert (found.reduction.sites[key].offset is None) == (not centred)
    if exact:
        assert torch.allclose(found.reduction.sites[key].mix, other.sites[key].mix, atol=1e-6)


def test_the_usual_layer_takes_this_way_and_the_choice_is_the_same():
    shown = view(3, channels=64, rank=24)
    ranking = interleaved(INTERPOLATIVE, shown)
    quick = choose(INTERPOLATIVE, shown, 0.2, align=4, ranking=ranking)
    slow = choose(INTERPOLATIVE, shown, 0.2, align=4, ranking=replace(ranking, factor=None))
    assert quick is not None
    assert slow is not None
    assert reduce_by_factor(shown, ranking, len(quick.reduction.keep)) is not None
    assert torch.equal(quick.reduction.keep, slow.reduction.keep)
    assert quick.errors["s"] == pytest.approx(slow.errors["s"], rel=1e-3)
    one, other = quick.reduction.sites["s"], slow.reduction.sites["s"]
    assert torch.allclose(one.mix, other.mix, atol=1e-3)
    assert torch.allclose(one.offset, other.offset, atol=1e-3)


def test_channels_that_the_moments_do_not_resolve_are_left_to_the_ridge():
    shown = view(5, channels=48, rank=6, noise=0.0)
    linear = Moments(48)
    draw = torch.Generator().manual_seed(1)
    linear.update(torch.randn(400, 6, generator=draw) @ torch.randn(6, 48, generator=draw))
    shown = replace(shown, sites=(replace(shown.sites[0], moments=linear),))
    ranking = interleaved(INTERPOLATIVE, shown)
    assert reduce_by_factor(shown, ranking, 6) is not None
    assert reduce_by_factor(shown, ranking, 20) is None
    assert choose(INTERPOLATIVE, shown, 0.01, ranking=ranking) is not None


def test_a_criterion_with_a_reduction_of_its_own_is_asked_for_it():
    shown, asked = view(3), []

    def own(group, keep):
        asked.append(len(keep))
        return INTERPOLATIVE.reduce(group, keep)

    assert choose(replace(INTERPOLATIVE, reduce=own), shown, 0.2) is not None
    assert asked


def test_no_factor_where_several_sites_or_rows_share_the_channels():
    shown = view(3)
    site = shown.sites[0]
    both = GroupView(name="g", num_channels=48, sites=(site, replace(site, key="t")))
    assert interleaved(INTERPOLATIVE, both).factor is None
    assert interleaved(INTERPOLATIVE, replace(shown, rows=4)).factor is None
    assert interleaved(INTERPOLATIVE, replace(shown, sites=(replace(site, mixes=False),))).factor is None
