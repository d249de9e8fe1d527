"""One checker over all criteria: whatever they answer obeys the one certificate formula."""

from __future__ import annotations

import math
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
    dropped_variance,
    get_criterion,
    register_criterion,
    relative_error,
)
from apoptosis.criteria.baselines import dropping_curve
from apoptosis.criteria.views import output_variance
from apoptosis.errors import ArgumentError, NonFiniteError, ShapeError
from apoptosis.numerics.linalg import roundoff_floor
from apoptosis.numerics.moments import Moments
from apoptosis.records import Reduction
from criteria.samples import draw, moments_of

seeds = st.integers(0, 2**32 - 1)
every_criterion = pytest.mark.parametrize("name", criteria())


class Sample:
    """A small ReLU layer with redundant, dead and parallel neurons, its rows, and views of its consumers."""

    def __init__(self, seed: int, channels: int = 12, centred: tuple[bool, ...] = (True,), data: bool = True) -> None:
        incoming = draw(seed, channels, 5)
        incoming[1] = 2.0 * incoming[0]
        incoming[2] = 0.0
        incoming[2, -1] = 0.7
        x = draw(seed + 1, 80, 4)
        self.z = (x @ incoming[:, :-1].T + incoming[:, -1]).relu()
        self.weights = [draw(seed + 2 + i, 6, channels, 1) for i in range(len(centred))]
        sites = [
            SiteView(key=f"site{i}", weight=w, moments=moments_of(self.z) if data else None, centred=c)
            for i, (w, c) in enumerate(zip(self.weights, centred, strict=True))
        ]
        neuron = NeuronView(incoming=incoming, activation="relu")
        self.view = GroupView(name="fc", num_channels=channels, sites=tuple(sites), neuron=neuron, seed=seed)

    def measured(self, site: int, reduction: Reduction) -> tuple[torch.Tensor, float]:
        """Mean squared error of every output, and the relative rms, from the rows themselves."""
        found = reduction.sites[f"site{site}"]
        offset = 0.0 if found.offset is None else found.offset
        error = self.z - self.z[:, reduction.keep] @ found.mix - offset
        weight = self.weights[site][:, :, 0]
        per_output = (error @ weight.T).square().mean(0)
        output_variance = ((self.z - self.z.mean(0)) @ weight.T).square().mean(0).sum()
        return per_output, float((per_output.sum() / output_variance).sqrt())


@every_criterion
@given(seed=seeds, centred=st.lists(st.booleans(), min_size=1, max_size=2), kept=st.integers(1, 11))
@settings(max_examples=15, deadline=None)
def test_the_certificate_is_the_error_measured_on_the_rows(
    name: str, seed: int, centred: list[bool], kept: int
) -> None:
    sample = Sample(seed, centred=tuple(centred))
    criterion = get_criterion(name)
    ranking = criterion.rank(sample.view)
    assert sorted(ranking.order.tolist()) == list(range(12))
    kept = max(kept, ranking.min_keep)
    keep = ranking.order[:kept].sort().values
    reduction = criterion.reduce(sample.view, keep)
    assert torch.equal(reduction.keep, keep)
    assert set(reduction.sites) == {site.key for site in sample.view.sites}
    for i, site in enumerate(sample.view.sites):
        found = reduction.sites[site.key]
        assert found.mix.shape == (kept, 12)
        assert torch.equal(found.mix[:, keep], torch.eye(kept, dtype=torch.float64))
        assert found.offset is None or not found.offset[keep].any()
        assert site.centred or found.offset is None or not found.offset.any()
        per_output, relative = sample.measured(i, reduction)
        torch.testing.assert_close(dropped_variance(site, keep, found), per_output, rtol=1e-6, atol=1e-9)
        assert relative_error(site, keep, found) == pytest.approx(relative, rel=1e-6, abs=1e-6)


@every_criterion
@given(seed=seeds, centred=st.lists(st.booleans(), min_size=1, max_size=2))
@settings(max_examples=6, deadline=None)
def test_curves_are_the_certificate_for_every_number_kept(name: str, seed: int, centred: list[bool]) -> None:
    sample = Sample(seed, centred=tuple(centred))
    criterion = get_criterion(name)
    ranking = criterion.rank(sample.view)
    for kept in range(max(1, ranking.min_keep), 13):
        reduction = criterion.reduce(sample.view, ranking.order[:kept].sort().values)
        for site in sample.view.sites:
            if site.key in ranking.curves:
                got = float(ranking.curves[site.key][kept])
                want = relative_error(site, reduction.keep, reduction.sites[site.key])
                assert got == pytest.approx(want, rel=1e-5, abs=2e-6)


@every_criterion
@given(seed=seeds, limit=st.sampled_from([0.0, 0.03, 0.3, 0.9]), align=st.sampled_from([1, 4]))
@settings(max_examples=8, deadline=None)
def test_choose_stays_within_the_limit_and_is_deterministic(name: str, seed: int, limit: float, align: int) -> None:
    sample = Sample(seed, centred=(True, True))
    proposal = choose(get_criterion(name), sample.view, {"site0": limit, "site1": 0.9}, align=align, min_keep=2)
    again = choose(get_criterion(name), sample.view, {"site0": limit, "site1": 0.9}, align=align, min_keep=2)
    if proposal is None:
        assert again is None
        return
    assert again is not None
    kept = proposal.reduction.keep
    assert torch.equal(kept, again.reduction.keep)
    assert 2 <= kept.numel() < 12
    assert kept.numel() % align == 0
    assert proposal.kind == "empirical"
    for i, cap in enumerate((limit, 0.9)):
        relative = sample.measured(i, proposal.reduction)[1]
        assert relative <= max(cap, roundoff_floor(12)) * (1 + 1e-6)
        assert proposal.errors[f"site{i}"] == pytest.approx(relative, rel=1e-6, abs=1e-6)
    certificates = proposal.certificates(sample.view)
    assert [(c.kind, c.rows) for c in certificates] == [("empirical", 80)] * 2


@pytest.mark.parametrize("name", ["interpolative", "greedy", "constant", "duplicate", "pairwise"])
def test_what_is_redundant_goes_at_tolerance_zero(name: str) -> None:
    sample = Sample(11)
    proposal = choose(get_criterion(name), sample.view, 0.0)
    assert proposal is not None
    gone = set(range(12)) - set(proposal.reduction.keep.tolist())
    assert 2 in gone  # the neuron without inputs
    if name != "constant":
        assert gone & {0, 1}  # one of the parallel pair
        assert not {0, 1} <= gone


def test_interpolative_needs_no_more_channels_than_any_other() -> None:
    for seed in range(5):
        sample = Sample(seed, channels=20)
        kept = {}
        for name in criteria():
            proposal = choose(get_criterion(name), sample.view, 0.1)
            kept[name] = 20 if proposal is None else proposal.reduction.keep.numel()
        least_squares = min(kept["interpolative"], kept["greedy"])
        assert least_squares <= min(kept.values())
        assert least_squares < kept["random"]


def test_dropping_curve_equals_brute_force() -> None:
    gram, weight, order = draw(0, 7, 7), draw(1, 3, 7), torch.randperm(7, generator=torch.Generator().manual_seed(2))
    gram = gram @ gram.T
    curve = dropping_curve(gram, weight, order)
    for k in range(8):
        gone = order[k:]
        want = torch.trace(weight[:, gone] @ gram[gone][:, gone] @ weight[:, gone].T)
        assert float(curve[k]) == pytest.approx(float(want), rel=1e-9, abs=1e-12)


def test_channels_are_added_back_until_a_measured_site_meets_its_limit() -> None:
    sample = Sample(5, channels=20)
    plain = sample.view.sites[0]
    worse = replace(  # the positions this site reads are worse off than the pooled moments say
        plain,
        measure=lambda keep, found: 9.0 * float(dropped_variance(plain, keep, found).sum()),
        scale=output_variance(plain),
    )
    view = replace(sample.view, sites=(worse,))
    loose = choose(get_criterion("interpolative"), sample.view, 0.2)
    tight = choose(get_criterion("interpolative"), view, 0.2)
    assert loose is not None
    assert tight is not None
    assert tight.reduction.keep.numel() > loose.reduction.keep.numel()
    assert tight.errors["site0"] <= 0.2


def test_sites_count_relative_to_their_own_energy() -> None:
    sample = Sample(7, channels=20, centred=(True, True))
    first, second = sample.view.sites
    louder = replace(sample.view, sites=(replace(first, weight=1e6 * first.weight), second))
    for name in ("interpolative", "greedy", "constant", "duplicate"):
        rank = get_criterion(name).rank
        assert torch.equal(rank(louder).order, rank(sample.view).order)


@every_criterion
def test_a_criterion_that_needs_data_says_so(name: str) -> None:
    criterion = get_criterion(name)
    view = Sample(0, data=False).view
    if criterion.needs_data:
        with pytest.raises(ArgumentError, match="needs"):
            choose(criterion, view, 0.1)
    elif name == "pairwise":
        proposal = choose(criterion, view, 0.05)
        assert proposal is not None
        assert proposal.kind == "worst_case"
        assert max(proposal.errors.values()) <= 0.05
    else:
        with pytest.raises(ArgumentError, match="without data"):
            choose(criterion, view, 0.1)


def test_registry_refuses_duplicates_and_lists_what_there_is() -> None:
    with pytest.raises(ArgumentError, match="registered already"):
        register_criterion(get_criterion("random"))
    with pytest.raises(ArgumentError, match="interpolative, reconstruction, greedy"):
        get_criterion("no such thing")
    assert all(isinstance(get_criterion(name), Criterion) and get_criterion(name).summary for name in criteria())


def test_views_refuse_what_does_not_fit() -> None:
    weight = torch.zeros(2, 3, 1)
    with pytest.raises(ShapeError, match="expected"):
        SiteView(key="s", weight=torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="moments"):
        SiteView(key="s", weight=weight, moments=Moments(2))
    with pytest.raises(ArgumentError, match="together"):
        SiteView(key="s", weight=weight, measure=lambda keep, found: 0.0)
    with pytest.raises(ArgumentError, match="no consumer"):
        GroupView(name="g", num_channels=3, sites=())
    with pytest.raises(ShapeError, match="others"):
        GroupView(name="g", num_channels=4, sites=(SiteView(key="s", weight=weight),))
    with pytest.raises(ShapeError, match="rows"):
        GroupView(name="g", num_channels=3, sites=(SiteView(key="s", weight=weight),), rows=2)
    with pytest.raises(ArgumentError, match="no limit"):
        choose(get_criterion("interpolative"), Sample(0).view, {})


def test_random_depends_on_seed_and_name_alone() -> None:
    view = Sample(0).view
    rank = get_criterion("random").rank
    assert torch.equal(rank(view).order, rank(view).order)
    assert not torch.equal(rank(view).order, rank(replace(view, seed=1)).order)
    assert not torch.equal(rank(view).order, rank(replace(view, name="other")).order)


def test_non_finite_weights_are_refused() -> None:
    sample = Sample(0)
    broken = draw(0, 6, 12, 1)
    broken[0, 0] = math.nan
    view = replace(sample.view, sites=(replace(sample.view.sites[0], weight=broken),))
    with pytest.raises(NonFiniteError):
        choose(get_criterion("interpolative"), view, 0.1)
