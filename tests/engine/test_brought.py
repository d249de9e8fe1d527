"""What a user may bring to the door, and what he is told: models without data, models in which nothing may shrink."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from apoptosis import Apoptosis, shrink_
from apoptosis.errors import ArgumentError


def on_meta(make):
    with torch.device("meta"):
        return make()


def faked(make):
    with FakeTensorMode():
        return make()


def buffers_on_meta(make):
    net = nn.Sequential(make(), nn.BatchNorm1d(4))
    net[1].running_mean = net[1].running_mean.to("meta")
    return net


@pytest.mark.parametrize(
    ("without", "what"),
    [
        (on_meta, "parameter '0.weight' lies on the meta device"),
        (faked, "parameter '0.weight' is a FakeTensor"),
        (buffers_on_meta, "buffer '1.running_mean' lies on the meta device"),
    ],
)
def test_models_without_data_are_refused_by_name(runs, without, what):
    net = without(runs.mlp)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for call in (
        lambda: Apoptosis(net, optimizer, runs.inputs(4, 0)),
        lambda: shrink_(net, runs.inputs(4, 0), [runs.inputs(64, 1)], tolerance=0.1),
    ):
        with pytest.raises(ArgumentError, match=rf"{what}.*to_empty.*inspect"):
            call()


def test_lazy_parameters_and_buffers_are_refused(runs):
    for net, what in (
        (nn.Sequential(nn.LazyLinear(3)), "parameter '0.weight' is lazy"),
        (nn.Sequential(nn.Linear(6, 4), nn.LazyBatchNorm1d(affine=False)), "buffer '1.running_mean' is lazy"),
    ):
        with pytest.raises(ArgumentError, match=what):
            shrink_(net, runs.inputs(4, 0), [runs.inputs(64, 1)], tolerance=0.1)


class Normed(nn.Module):
    """A residual stream under a LayerNorm, whose only hidden layer is cut short by a sort."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.up = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 16)
        self.down, self.head = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        h = self.norm(self.stem(x))
        return self.head(h + self.down(self.up(h).sort(-1).values))


def test_nothing_removable_is_said_once_and_plainly(runs):
    net = Normed()
    optimizer = runs.adam(net)
    with pytest.warns(UserWarning, match="nothing can be removed from Normed") as told:
        apo = Apoptosis(net, optimizer, runs.inputs(4, 0))
    assert len(told) == 1
    text = str(told[0].message)
    assert told[0].filename == __file__
    assert "'stem' (8 channels): operator aten.native_layer_norm in 'norm'" in text
    assert "aten.sort" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert runs.train(net, optimizer, apo) == []  # and training goes on without another word
        assert apo.groups() == ()
        assert apo.decision.reason == "no group can be pruned"
        event = shrink_(net, runs.inputs(4, 0), [runs.inputs(64, 1)], tolerance=0.1)
    assert not event
    assert any("'up' (16 channels)" in note for note in event.notes)


def test_leaving_everything_out_is_no_surprise_to_the_user(runs):
    net = runs.mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apo = Apoptosis(net, runs.adam(net), runs.inputs(4, 0), exclude=("*",))
    assert apo.groups() == ()


def test_a_model_that_takes_keywords_and_returns_a_dict(runs):
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = runs.mlp()

        def forward(self, *, pixels, scale):
            return {"logits": self.body(pixels) * scale}

    net = Asking()
    runs.doubled(net.body, 0)
    example = {"pixels": runs.inputs(4, 0), "scale": torch.ones(4, 1)}
    batches = [{"pixels": runs.inputs(512, 1), "scale": torch.ones(512, 1)}]
    assert shrink_(net, example, batches, tolerance=0).groups == {"body.0": (32, 16)}
