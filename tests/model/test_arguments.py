"""Wrong input is refused at the door, by name, and nothing has changed."""

import json
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.cuda import graphs

from apoptosis import Apoptosis, shrink_
from apoptosis.errors import ArgumentError, CaptureError, UnsupportedOptimizerError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tolerance", -0.1),
        ("tolerance", 1.0),
        ("tolerance", float("nan")),
        ("tolerance", "small"),
        ("tolerance", True),
        ("align", 0),
        ("align", 2.5),
        ("total_steps", 0),
        ("total_steps", 10.0),
        ("budget", 0.0),
        ("budget", 1.5),
        ("criterion", "best"),
        ("criterion", None),
        ("exclude", "0"),
        ("exclude", ("typo",)),
        ("exclude", 3),
        ("exclude", (3,)),
        ("log", "file"),
        ("logits", 3),
        ("seed", -1),
        ("seed", 1.5),
        ("seed", 2**62),
        ("calibration", -5.0),
        ("calibration", float("nan")),
        ("calibration", "x"),
        ("probe", "x"),
        ("probe", torch.zeros(0, 6)),
        ("probe", torch.zeros(8, 5)),
        ("probe", (torch.zeros(8, 6), torch.zeros(7))),
        ("probe", (torch.zeros(8, 6), torch.zeros(8))),
        ("tolerance", np.float32(1.5)),
        ("align", np.int64(0)),
        ("align", np.bool_(True)),
    ],
)
def test_wrong_arguments_are_named(runs, name, value):
    net = runs.mlp()
    optimizer = runs.adam(net)
    before = runs.everything(net, optimizer)
    with pytest.raises(ArgumentError, match=name if name != "criterion" else "criterion"):
        Apoptosis(net, optimizer, runs.inputs(4, 0), **{name: value})
    assert runs.same(runs.everything(net, optimizer), before)


def test_wrong_model_optimizer_and_example(runs):
    net = runs.mlp()
    optimizer, x = runs.adam(net), runs.inputs(4, 0)
    for model in (None, net.state_dict(), nn.Linear):
        with pytest.raises(ArgumentError, match="model"):
            Apoptosis(model, optimizer, x)
    for wrong in (None, (), "adam", torch.optim.Adam, [optimizer, "sgd"], runs.adam(runs.mlp())):
        with pytest.raises(ArgumentError, match="optimizer"):
            Apoptosis(net, wrong, x)
    with pytest.raises(ArgumentError, match="lazy"):
        Apoptosis(nn.Sequential(nn.LazyLinear(3)), optimizer, x)
    with pytest.raises(UnsupportedOptimizerError, match="LBFGS"):
        Apoptosis(net, torch.optim.LBFGS(net.parameters()), x)
    for example in ([x], "x", None, {1: x}):
        with pytest.raises(ArgumentError, match="example"):
            Apoptosis(net, optimizer, example)
    with pytest.raises(CaptureError, match="example_input"):
        Apoptosis(net, optimizer, torch.zeros(4, 5))
    normed = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(CaptureError, match="two examples"):
        Apoptosis(normed, runs.adam(normed), torch.zeros(1, 6))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tolerance", None),
        ("tolerance", 1.0),
        ("align", 0),
        ("criterion", "best"),
        ("criterion", 5),
        ("exclude", "0"),
        ("exclude", ("typo",)),
        ("seed", None),
        ("optimizer", "adam"),
        ("probe", torch.zeros(8)),
        ("probe", torch.zeros(8, 5)),
    ],
)
def test_wrong_arguments_of_one_shot_use(runs, name, value):
    net = runs.mlp()
    before = runs.everything(net)
    given = {"tolerance": 0.1, name: value}
    with pytest.raises(ArgumentError, match=name):
        shrink_(net, runs.inputs(4, 0), [runs.inputs(512, 1)], **given)
    assert runs.same(runs.everything(net), before)


def test_numpy_scalars_are_numbers(runs):
    net = runs.mlp()
    x = runs.inputs(4000, 1)
    apo = Apoptosis(
        net,
        runs.adam(net),
        runs.inputs(4, 0),
        tolerance=np.float32(0.1),
        align=np.int64(8),
        total_steps=np.int32(100),
        budget=np.float64(0.1),
        probe=(x, runs.labels(x)),
        seed=np.uint8(3),
    )
    assert type(apo.ledger().budget) is float
    json.dumps(apo.ledger().as_dict())
    event = shrink_(
        net, runs.inputs(4, 0), [runs.inputs(512, 1)], tolerance=np.float32(0.1), align=np.int64(8), seed=np.int64(1)
    )
    assert type(event.tolerance) is float


def test_an_example_without_examples_is_refused(runs):
    net = runs.mlp()
    with pytest.raises(ArgumentError, match="no example"):
        Apoptosis(net, runs.adam(net), torch.zeros(0, 6))


def test_a_module_that_replays_a_cuda_graph_is_refused_by_name(runs):
    net = runs.mlp()
    codes = graphs.make_graphed_callables.__code__.co_consts  # torch's own closure: recording needs a device
    code = next(c for c in codes if isinstance(c, types.CodeType) and c.co_name == "make_graphed_forward")
    net[2].forward = types.FunctionType(code, vars(graphs))(net[2], True, net[2].forward, net[2].forward)
    with pytest.raises(ArgumentError, match="module '2' replays a CUDA graph"):
        Apoptosis(net, runs.adam(net), runs.inputs(4, 0))
