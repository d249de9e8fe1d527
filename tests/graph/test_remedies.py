"""Weights that are computed before they are used: how to take off what computes them."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrizations, prune

from apoptosis.graph.explain import layer_of, parametrized


def test_computed_weights_name_the_way_out() -> None:
    layer = parametrizations.weight_norm(nn.Linear(3, 2))
    remedy = "Take the parametrization (WeightNorm) off: parametrize.remove_parametrizations(a.b, 'weight')."
    assert parametrized([("a.b", layer)]) == remedy
    inner = [
        ("a.b.parametrizations.weight.0", layer.parametrizations.weight[0]),
        ("a.b.parametrizations.weight", layer.parametrizations.weight),
        ("a.b", layer),
    ]
    assert parametrized(inner) == remedy
    assert parametrized([("p", prune.identity(nn.Linear(3, 2), "weight"))]).endswith("prune.remove(p, 'weight').")
    assert parametrized([("c", nn.Linear(3, 2)), ("a.b", layer)]) == ""
    assert parametrized([]) == ""
    assert layer_of("parametrizations.weight.0") == ""
