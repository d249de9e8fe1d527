"""The registry of criteria: names are taken once, a stranger's answer is checked, built-in ones are all there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from apoptosis import register_criterion, shrink_
from apoptosis.criteria import Criterion, GroupView, Ranking, criteria, get_criterion
from apoptosis.errors import ArgumentError
from apoptosis.records import Reduction, SiteReduction

pytestmark = pytest.mark.usefixtures("registries")
X = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model[2].weight.data[:, 5:] = 0.0
    return model


def rank(view: GroupView) -> Ranking:
    seen = sum(site.weight.double().square().sum((0, 2)) for site in view.sites)
    return Ranking(order=torch.as_tensor(seen).argsort(descending=True))


def reduce(view: GroupView, keep: Tensor) -> Reduction:
    mix = torch.eye(view.num_channels, dtype=torch.float64)[keep]
    return Reduction(group=view.name, keep=keep, sites={s.key: SiteReduction(mix=mix, offset=None) for s in view.sites})


MINE = Criterion(name="mine", needs_data=True, rank=rank, reduce=reduce)


def with_mix(change) -> Criterion:
    def changed(view: GroupView, keep: Tensor) -> Reduction:
        found = reduce(view, keep)
        return replace(found, sites={key: change(site) for key, site in found.sites.items()})

    return replace(MINE, reduce=changed)


def test_a_criterion_of_ones_own_is_used_and_listed() -> None:
    register_criterion(MINE)
    assert criteria()[-1] == "mine"
    model = net()
    before = model(X)
    event = shrink_(model, X[:2], [X], tolerance=0, criterion="mine")
    assert event.criterion == "mine"
    assert event.groups == {"0": (8, 5)}
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["interpolative", "mine", ""])
def test_a_name_is_taken_once_and_a_wrong_one_lists_what_there_is(name: str) -> None:
    register_criterion(MINE)
    with pytest.raises(ArgumentError, match=r"registered already; there are interpolative, .*mine"):
        register_criterion(replace(MINE, name=name))
    with pytest.raises(ArgumentError, match=r"no criterion 'mein'; there are interpolative, .*mine"):
        get_criterion("mein")


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (replace(MINE, rank=lambda view: Ranking(order=torch.zeros(8, dtype=torch.int64))), "rank .* each once"),
        (replace(MINE, rank=lambda view: Ranking(order=torch.arange(7))), "rank .* all 8 channels"),
        (replace(MINE, reduce=lambda view, keep: reduce(view, keep[1:])), "channels that were asked for"),
        (replace(MINE, reduce=lambda view, keep: replace(reduce(view, keep), group="other")), "that were asked for"),
        (replace(MINE, reduce=lambda view, keep: replace(reduce(view, keep), sites={})), "mix of shape"),
        (with_mix(lambda site: replace(site, mix=site.mix.T)), "mix of shape"),
        (with_mix(lambda site: replace(site, mix=site.mix * float("nan"))), "a finite mix"),
        (with_mix(lambda site: replace(site, offset=torch.zeros(3))), "finite offsets"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused_before_anything_changes(wrong: Criterion, text: str) -> None:
    register_criterion(wrong)
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=f"criterion 'mine': .*{text}"):
        shrink_(model, X[:2], [X], tolerance=0, criterion="mine")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_offset_where_none_can_be_folded_is_left_out() -> None:
    register_criterion(with_mix(lambda site: replace(site, offset=torch.ones(8, dtype=torch.float64))))
    model = net()
    model[2].bias = None
    before = model(X)
    assert shrink_(model, X[:2], [X], tolerance=0, criterion="mine").groups == {"0": (8, 5)}
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-6)


def test_answers_of_another_kind_are_refused_by_name() -> None:
    register_criterion(replace(get_criterion("constant"), name="no_ranking", rank=lambda view: torch.arange(8)))
    with pytest.raises(ArgumentError, match="'no_ranking': rank of group '0' must return a Ranking, not a Tensor"):
        shrink_(net(), X[:2], [X], tolerance=0.5, criterion="no_ranking")
    register_criterion(replace(get_criterion("constant"), name="no_reduction", reduce=lambda view, keep: None))
    with pytest.raises(ArgumentError, match="reduce of group '0' must return a Reduction, not a NoneType"):
        shrink_(net(), X[:2], [X], tolerance=0.5, criterion="no_reduction")
