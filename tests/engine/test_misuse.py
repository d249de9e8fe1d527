"""What is given in the wrong place, or changed by other code, is one clear line; nothing has changed then."""

import copy
import warnings

import pytest
import torch
from torch import nn

from apoptosis import (
    Apoptosis,
    load,
    load_sharded,
    register_activation,
    register_attributes,
    register_criterion,
    register_rule,
    save,
    save_sharded,
    shrink_,
)
from apoptosis.distributed.ddp import rebuild_ddp
from apoptosis.errors import ArgumentError, CaptureError, CheckpointError


class Around:
    """No optimizer, but around one."""

    def __init__(self, optimizer):
        self.base = optimizer


@pytest.mark.parametrize("function", [save, load, save_sharded, load_sharded])
def test_arguments_of_save_and_load_are_named(runs, tmp_path, function):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)
    other = runs.mlp()
    path = tmp_path / "a"
    (save if function in (save, load) else save_sharded)(path, net, optimizer, apo)
    before = runs.everything(net, optimizer)
    for model in (None, 3, optimizer, "net", {}, nn.Linear, apo):
        with pytest.raises(ArgumentError, match=f"{function.__name__}: model is a .* path, model, optimizer, apo"):
            function(path, model)
    for wrong in (None, 3, net):
        with pytest.raises(ArgumentError, match="path is a"):
            function(wrong, net)
    for wrong in (net, "opt", [optimizer, "opt"], torch.optim.Adam, apo):
        with pytest.raises(ArgumentError, match="optimizer is a"):
            function(path, net, wrong)
    with pytest.raises(ArgumentError, match="holds no parameter of the model"):
        function(path, net, runs.adam(other))
    for wrong in (3, optimizer, net, Apoptosis):
        with pytest.raises(ArgumentError, match="apo is a"):
            function(path, net, optimizer, wrong)
    with pytest.raises(ArgumentError, match="run of another Sequential"):
        function(path, net, optimizer, runs.start(other, runs.adam(other)))
    assert runs.same(runs.everything(net, optimizer), before)
    function(path, net, optimizer, apo)


def test_optimizers_that_are_none(runs):
    net = runs.mlp()
    optimizer, x = runs.adam(net), runs.inputs(4, 0)
    for wrong in ("opt", b"opt", torch.optim.Adam, {"a": optimizer}, Around(optimizer)):
        kind = type(wrong).__name__
        with pytest.raises(ArgumentError, match=f"optimizer is a {kind}, not a torch.optim.Optimizer"):
            Apoptosis(net, wrong, x)
        with pytest.raises(ArgumentError, match=f"optimizer is a {kind}, not a torch.optim.Optimizer"):
            shrink_(net, x, [runs.inputs(64, 1)], tolerance=0.1, optimizer=wrong)
    with pytest.raises(ArgumentError, match=r"Give its \.base \(Adam\)"):
        Apoptosis(net, Around(optimizer), x)
    with pytest.raises(ArgumentError, match=r"StepLR.*Give its \.optimizer \(Adam\)"):
        Apoptosis(net, torch.optim.lr_scheduler.StepLR(optimizer, 1), x)
    for wrong in (runs.adam(runs.mlp()), []):
        with pytest.raises(ArgumentError, match="optimizer: none"):
            shrink_(net, x, [runs.inputs(64, 1)], tolerance=0.1, optimizer=wrong)


def test_an_optimizer_given_twice_counts_once(runs):
    net = runs.mlp()
    runs.doubled(net, 0)
    optimizer = runs.adam(net)
    assert runs.train(net, optimizer, runs.start(net, [optimizer, optimizer]))


def test_what_is_registered_is_checked():
    for call, match in (
        (lambda: register_rule(3, lambda call: None), "operator is a int"),
        (lambda: register_criterion(3), "is no criterion"),
        (lambda: register_criterion(nn.Linear), "is no criterion"),
        (lambda: register_attributes(type("Own", (nn.Module,), {}), 3), "rows is a int"),
        (lambda: register_activation(3, torch.relu, module_type=type("A", (nn.Module,), {}), lipschitz=1), "name=3"),
        (lambda: register_activation("a", 3, module_type=type("A", (nn.Module,), {}), lipschitz=1), "phi=3"),
        (lambda: register_activation("a", torch.relu, module_type=type("A", (nn.Module,), {}), lipschitz=[]), "lips"),
        (lambda: rebuild_ddp(None), "model is a NoneType"),
    ):
        with pytest.raises(ArgumentError, match=match):
            call()


def test_a_follower_of_other_shapes_is_told_what_it_is(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo, early = runs.start(net, optimizer), copy.deepcopy(net)
    with pytest.raises(ArgumentError, match=r"'0.weight'.*copy of another network"):
        apo.follow(runs.mlp(8))
    assert runs.train(net, optimizer, apo)
    with pytest.raises(ArgumentError, match=r"'0.weight'.*lost channels since.*as it is now"):
        apo.follow(early)
    apo.follow(copy.deepcopy(net))


def test_a_checkpoint_from_before_removals_is_not_called_another_network(runs, tmp_path):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)
    runs.train(net, optimizer, apo, steps=2)
    save(tmp_path / "early", net, optimizer, apo)
    state = apo.state_dict()
    assert runs.train(net, optimizer, apo, first=2)
    with pytest.raises(CheckpointError, match=r"saved before channels went.*'0.weight'.*full width"):
        load(tmp_path / "early", copy.deepcopy(net))  # of which nothing is known but what it is
    with pytest.raises(CheckpointError, match="of other widths: '0' had 32 channels and has"):
        apo.load_state_dict(state)
    load(tmp_path / "early", net, optimizer, apo)  # what shrank in this process becomes wide again
    assert net[0].out_features == 32
    with pytest.raises(CheckpointError, match="another network"):
        load(tmp_path / "early", runs.mlp(40))


@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.append(nn.Linear(4, 4)),
        lambda net: net.insert(2, nn.Linear(32, 32)),
        lambda net: net.__setitem__(2, nn.Linear(32, 32)),
        lambda net: net.__delitem__(slice(2, 4)),
    ],
)
def test_a_layer_that_is_added_or_taken_in_a_run_is_met_at_the_next_window(runs, change, steps):
    """Outside of a window (2 steps) and inside of one (6), whose event is then left out."""
    net = runs.mlp()
    for layer in (0, 2):
        runs.doubled(net, layer)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    apo = runs.start(net, optimizer)
    runs.train(net, optimizer, apo, steps=steps)
    assert apo.watching == (steps == 6)
    change(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        events = runs.train(net, optimizer, apo, first=steps)
    assert all("layers or types were changed otherwise" in str(w.message) for w in told)
    assert bool(told) == (steps == 6)
    assert events
    assert net[0].out_features < 32
    assert {name for name in apo.structure.shapes} == {name for name, _ in net.named_parameters()}


@pytest.mark.parametrize("steps", [2, 6])
def test_a_model_of_another_type_in_a_run_is_one_clear_error(runs, steps):
    net = runs.mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    apo = runs.start(net, optimizer)
    runs.train(net, optimizer, apo, steps=steps)
    net.double()

    def go_on():
        for step in range(steps, 40):
            x = runs.inputs(128, step).double()
            nn.functional.cross_entropy(net(x), runs.labels(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
            apo.step()

    with pytest.raises(CaptureError, match=r"changed in the course of the run.*Make a new Apoptosis"):
        go_on()
    assert net[0].out_features == 32
    net(runs.inputs(4, 0).double())
