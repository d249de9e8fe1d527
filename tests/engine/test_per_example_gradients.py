"""Gradients that are taken example by example are refused at construction, whatever they are wrapped in."""

import pytest
import torch
from torch import nn

from apoptosis import Apoptosis, shrink_
from apoptosis.errors import ArgumentError, UnsupportedOptimizerError

opacus = pytest.importorskip("opacus")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def test_a_grad_sample_module_is_refused_by_name(runs):
    net = runs.mlp()
    wrapped = opacus.GradSampleModule(net)
    with pytest.raises(ArgumentError, match="the model is a GradSampleModule: gradients are taken example by example"):
        Apoptosis(wrapped, runs.adam(wrapped), runs.inputs(4, 0))
    with pytest.raises(ArgumentError, match="example by example"):
        shrink_(net, runs.inputs(4, 0), [runs.inputs(64, 0)], tolerance=0.1)  # its hooks are still there
    wrapped.to_standard_module()
    Apoptosis(net, runs.adam(net), runs.inputs(4, 0)).close()


def test_one_inside_of_the_model_is_named(runs):
    net = nn.Sequential(nn.Linear(6, 6), opacus.GradSampleModule(runs.mlp()))
    with pytest.raises(ArgumentError, match="module '1' is a GradSampleModule"):
        Apoptosis(net, runs.adam(net), runs.inputs(4, 0))


def test_the_optimizer_of_a_privacy_engine_is_refused_by_name(runs):
    net = runs.mlp()
    optimizer = opacus.optimizers.DPOptimizer(
        runs.adam(net), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4
    )
    for p in net.parameters():
        if hasattr(p, "grad_sample"):
            del p.grad_sample
    with pytest.raises(UnsupportedOptimizerError, match=r"DPOptimizer cannot follow.*per-example gradients"):
        Apoptosis(net, optimizer, torch.zeros(4, 6))
