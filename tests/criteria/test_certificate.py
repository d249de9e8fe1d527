"""The certificate where it is least obvious: several taps, dropout, constants, sites that disagree."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from apoptosis.criteria import (
    GroupView,
    NeuronView,
    SiteView,
    choose,
    criteria,
    dropped_variance,
    get_criterion,
    relative_error,
)
from apoptosis.criteria.views import roundoff_tolerance
from apoptosis.numerics.linalg import roundoff_floor
from apoptosis.numerics.moments import Moments
from apoptosis.records import SiteReduction
from criteria.samples import draw, moments_of

every_criterion = pytest.mark.parametrize("name", criteria())


def test_a_reduction_that_changes_kept_channels_pays_for_them():
    torch.manual_seed(0)
    z = torch.randn(200, 4, dtype=torch.float64)
    moments = Moments(4)
    moments.update(z, exact=True)
    weight = torch.randn(3, 4, 1, dtype=torch.float64)
    keep, mix = torch.tensor([0, 2]), torch.randn(2, 4, dtype=torch.float64)
    offset = torch.randn(4, dtype=torch.float64)
    found = SiteReduction(mix=mix, offset=offset)
    wrong = (z - z[:, keep] @ mix - offset) @ weight[:, :, 0].T
    for site in (SiteView(key="s", weight=weight, moments=moments),
                 SiteView(key="s", weight=weight, moments=moments, grad_factor=weight[:, :, 0].float())):  # fmt: skip
        scale = ((z - z.mean(0)) @ weight[:, :, 0].T).square().sum()
        expected = float((wrong.square().sum() / scale).sqrt())
        assert relative_error(site, keep, found) == pytest.approx(expected, rel=1e-5)


@every_criterion
def test_several_taps_are_measured_exactly_where_a_measure_is_given(name: str) -> None:
    taps, channels = 3, 10
    base = draw(5, 60, channels // 2)
    maps = torch.stack([torch.cat([base + 0.3 * draw(6 + p, 60, 5), base], 1) for p in range(taps)], 2)
    weight = draw(9, 4, channels, taps)
    pooled = moments_of(maps.permute(0, 2, 1).reshape(-1, channels))

    def energy_of(residual: torch.Tensor) -> float:
        return float(torch.einsum("ocp,ncp->no", weight, residual).square().sum(1).mean())

    def measure(keep: torch.Tensor, reduction) -> float:
        standing = torch.einsum("nkp,kc->ncp", maps[:, keep], reduction.mix)
        offset = 0.0 if reduction.offset is None else reduction.offset[:, None]
        return energy_of(maps - standing - offset)

    scale = energy_of(maps - maps.mean((0, 2), keepdim=True))
    neuron = NeuronView(incoming=draw(10, channels, 4), activation="tanh")
    plain = SiteView(key="conv", weight=weight, moments=pooled)
    exact = replace(plain, measure=measure, scale=scale)
    view = GroupView(name="conv", num_channels=channels, sites=(exact,), neuron=neuron)
    proposal = choose(get_criterion(name), view, 0.5)
    if proposal is not None:
        found = proposal.reduction.sites["conv"]
        assert proposal.errors["conv"] == pytest.approx((measure(proposal.reduction.keep, found) / scale) ** 0.5)
        assert proposal.errors["conv"] <= 0.5
        bound = taps * float(dropped_variance(plain, proposal.reduction.keep, found).sum())
        assert measure(proposal.reduction.keep, found) <= bound * (1 + 1e-9)  # Cauchy-Schwarz over taps


def test_more_is_removed_when_the_exact_value_is_known_than_by_the_bound_over_taps() -> None:
    base = draw(1, 200, 6)
    maps = torch.stack([base + 0.05 * draw(2 + p, 200, 6) for p in range(4)], 2)
    weight = draw(8, 3, 6, 4)
    pooled = moments_of(maps.permute(0, 2, 1).reshape(-1, 6))
    site = SiteView(key="s", weight=weight, moments=pooled)

    def measure(keep: torch.Tensor, reduction) -> float:
        error = maps - torch.einsum("nkp,kc->ncp", maps[:, keep], reduction.mix) - reduction.offset[:, None]
        return float(torch.einsum("ocp,ncp->no", weight, error).square().sum(1).mean())

    centred = maps - maps.mean((0, 2), keepdim=True)
    scale = float(torch.einsum("ocp,ncp->no", weight, centred).square().sum(1).mean())
    known = replace(site, measure=measure, scale=scale)
    tight, loose = (
        choose(get_criterion("interpolative"), GroupView(name="g", num_channels=6, sites=(s,)), 0.8)
        for s in (known, site)
    )
    assert tight is not None
    assert loose is None or tight.reduction.keep.numel() <= loose.reduction.keep.numel()


@every_criterion
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_behind_dropout_the_error_without_it_stays_within_the_limit(name: str, p: float) -> None:
    incoming = draw(3, 40, 9)
    x = draw(4, 2120, 8) * torch.arange(1, 9).double() ** -1.0
    z = (x @ incoming[:, :-1].T + incoming[:, -1]).relu()
    seen, fresh = z[:120], z[120:]
    mask = (torch.rand(seen.shape, generator=torch.Generator().manual_seed(5)) >= p).double() / (1 - p)
    weight = draw(6, 10, 40, 1)
    site = SiteView(key="s", weight=weight, moments=moments_of(seen * mask), dropout=p)
    view = GroupView(name="g", num_channels=40, sites=(site,), neuron=NeuronView(incoming=incoming, activation="relu"))
    proposal = choose(get_criterion(name), view, 0.4)
    if name in ("interpolative", "greedy"):
        assert proposal is not None
    if proposal is not None:
        found = proposal.reduction.sites["s"]
        offset = 0.0 if found.offset is None else found.offset
        error = (fresh - fresh[:, proposal.reduction.keep] @ found.mix - offset) @ weight[:, :, 0].T
        energy = (fresh - fresh.mean(0)) @ weight[:, :, 0].T
        assert (error.square().sum() / energy.square().sum()).sqrt() <= 0.4
        assert found.mix.abs().max() < 5


def test_several_taps_without_a_measure_cost_their_bound() -> None:
    maps = draw(0, 50, 4, 1).repeat(1, 1, 3)  # the same at every tap: the factor P is attained
    weight = draw(1, 2, 4, 1).repeat(1, 1, 3)
    site = SiteView(key="s", weight=weight, moments=moments_of(maps[:, :, 0]))
    view = GroupView(name="g", num_channels=4, sites=(site,))
    reduction = get_criterion("interpolative").reduce(view, torch.tensor([0, 1, 2]))
    found = reduction.sites["s"]
    assert found.offset is not None
    error = maps - torch.einsum("nkp,kc->ncp", maps[:, :3], found.mix) - found.offset[:, None]
    measured = float(torch.einsum("ocp,ncp->no", weight, error).square().sum(1).mean())
    pooled = moments_of(maps[:, :, 0]).covariance()
    estimate = float(torch.einsum("ocp,cd,odp->", weight, pooled, weight))
    assert relative_error(site, reduction.keep, found) ** 2 * estimate == pytest.approx(measured, rel=1e-9)


def test_round_off_around_a_large_mean_is_no_variation() -> None:
    z = 1e6 * (1 + 1e-15 * draw(0, 50, 4))
    site = SiteView(key="s", weight=torch.ones(2, 4, 1), moments=moments_of(z))
    view = GroupView(name="g", num_channels=4, sites=(site,))
    proposal = choose(get_criterion("constant"), view, 0.0)
    assert proposal is not None
    assert proposal.reduction.keep.numel() == 1


@every_criterion
def test_a_constant_output_costs_nothing_and_never_divides_by_zero(name: str) -> None:
    z = torch.full((20, 4), 3.0, dtype=torch.float64)
    site = SiteView(key="s", weight=draw(0, 2, 4, 1), moments=moments_of(z))
    neuron = NeuronView(incoming=torch.cat([torch.zeros(4, 2), torch.full((4, 1), 3.0)], 1), activation="relu")
    view = GroupView(name="g", num_channels=4, sites=(site,), neuron=neuron)
    proposal = choose(get_criterion(name), view, 0.01)
    if name in ("magnitude", "random"):  # they put nothing in its place: infinite error, so nothing goes
        assert proposal is None
    else:
        assert proposal is not None
        assert proposal.errors == {"s": 0.0}
        assert proposal.reduction.keep.numel() == 1


def test_limits_hold_for_every_site_where_sites_see_different_data() -> None:
    z = draw(0, 100, 8)
    first = SiteView(key="a", weight=draw(1, 3, 8, 1), moments=moments_of(z))
    second = SiteView(key="b", weight=draw(2, 3, 8, 1), moments=moments_of(z[:, :4].repeat(1, 2)))
    view = GroupView(name="g", num_channels=8, sites=(first, second))
    assert choose(get_criterion("interpolative"), view, 0.01) is None  # b alone would let half of them go
    alone = choose(get_criterion("interpolative"), replace(view, sites=(second,)), 0.01)
    assert alone is not None
    assert alone.reduction.keep.numel() == 4


def test_duplicates_are_found_though_the_sites_weigh_them_differently() -> None:
    z = draw(0, 300, 8).tanh()
    z[:, 5:] = z[:, :3]
    first, second = draw(1, 5, 8, 1), draw(2, 5, 8, 1)
    first[:, :3] *= 5.0
    second[:, 5:] *= 5.0
    sites = tuple(SiteView(key=str(i), weight=w, moments=moments_of(z)) for i, w in enumerate((first, second)))
    for name in ("interpolative", "greedy", "duplicate"):
        proposal = choose(get_criterion(name), GroupView(name="g", num_channels=8, sites=sites), 0.0)
        assert proposal is not None
        assert proposal.reduction.keep.numel() == 5


@pytest.mark.parametrize("name", ["interpolative", "greedy", "duplicate"])
@pytest.mark.parametrize("mean", [0.0, 10.0, 1000.0])
def test_duplicates_around_a_large_mean_go_at_tolerance_zero_without_an_offset(name: str, mean: float) -> None:
    z = draw(0, 400, 16) + mean
    z[:, 12:] = z[:, :4]
    site = SiteView(key="s", weight=draw(1, 7, 16, 1), moments=moments_of(z), centred=False)
    proposal = choose(get_criterion(name), GroupView(name="g", num_channels=16, sites=(site,)), 0.0)
    assert proposal is not None
    assert proposal.reduction.keep.numel() == 12
    assert proposal.errors["s"] <= roundoff_tolerance(site)
    assert roundoff_tolerance(site) == pytest.approx(roundoff_floor(16) * (1 + mean**2) ** 0.5, rel=0.7)
    assert roundoff_tolerance(replace(site, centred=True)) == roundoff_floor(16)
