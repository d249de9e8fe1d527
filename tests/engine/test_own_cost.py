"""What is not computed twice: captures at construction, factorisations of offers, trials whose outcome is known."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from apoptosis import Apoptosis
from apoptosis.criteria import get_criterion
from apoptosis.planner import Request, Why, make_plan
from apoptosis.planner.offers import make_offers
from apoptosis.planner.sampling import sample
from apoptosis.surgery.target import Target


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 3))


def _seen(net: nn.Sequential):
    call = ((torch.randn(512, 12),), {})
    target = Target(model=net, optimizers=(), call=call)
    structure = target.capture()
    _, seen = sample(net, structure.open_groups, [call], tolerance=0.1, modes=1, seed=0)
    request = Request(criterion=get_criterion("interpolative"), tolerance=0.1, align=4, max_drop=0.9, seed=0)
    return structure, seen, request


def test_construction_captures_once_beside_the_rehearsal():
    net = _network()
    apo = Apoptosis(net, torch.optim.Adam(net.parameters()), torch.randn(4, 12), total_steps=400)
    assert len(apo._target.capture_seconds) == 2
    assert apo.calibration > 0


def test_a_plan_reuses_the_factorisations_of_its_offers_and_releases_them():
    net = _network()
    structure, seen, request = _seen(net)
    rankings = {}
    offers = make_offers(net, structure, seen, request, rankings=rankings)
    assert sorted(rankings) == ["0", "2"]
    assert all(ranking.factor is not None for ranking in rankings.values())
    widths = {"0": 24, "2": 16}
    without = {name: replace(ranking, factor=None) for name, ranking in rankings.items()}
    held = dict(rankings)  # of groups that the plan leaves out, too
    make_plan(net, structure, seen, replace(request, widths={}, waiting={"0": Why("goal", "waits")}), rankings=held)
    assert all(ranking.factor is None for ranking in held.values())
    fast = make_plan(net, structure, seen, replace(request, widths=widths), rankings=rankings)
    plain = make_plan(net, structure, seen, replace(request, widths=widths), rankings=without)
    assert all(ranking.factor is None for ranking in rankings.values())
    for one, other in zip(fast.reductions, plain.reductions, strict=True):
        assert torch.equal(one.keep, other.keep)
        for key in one.sites:  # the ridge of the plain solve, and a window in float32
            assert torch.allclose(one.sites[key].mix, other.sites[key].mix, atol=1e-3)
    for name, errors in fast.errors.items():
        for key, error in errors.items():
            assert abs(error - plain.errors[name][key]) <= 1e-3 * error
    assert all(unit.trials for sets in offers.tasks for units in sets for unit in units)


def test_units_whose_loss_is_known_get_no_trials():
    net = _network()
    structure, seen, request = _seen(net)
    offers = make_offers(net, structure, seen, request, rankings={}, known={"2": [(0.1, 0.01)]})
    found = {unit.name: unit for sets in offers.tasks for units in sets for unit in units}
    assert len(found["0"].trials) == 1
    assert not found["2"].trials
    assert found["2"].widths == make_offers(net, structure, seen, request, rankings={}).tasks[1][0][0].widths
