"""The library's own passes are told from the user's: hooks of the user's run once per training pass, and may ask."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import nn

import apoptosis
from apoptosis import is_internal_forward, shrink_
from apoptosis.model.evaluate import make_probe, outputs
from apoptosis.model.passes import Eager, internal_passes, marked_internal


def test_hooks_run_once_in_every_training_pass(runs):
    net = runs.mlp()
    calls = {"user": 0, "own": 0, "backward": 0}

    def count(module, args, output):
        calls["own" if is_internal_forward() else "user"] += 1

    net[0].register_forward_hook(count)
    net[2].register_full_backward_hook(lambda *_: calls.update(backward=calls["backward"] + 1))
    optimizer = runs.adam(net)
    assert runs.train(net, optimizer, runs.start(net, optimizer))
    assert calls["user"] == calls["backward"] == runs.STEPS
    assert calls["own"] > 0
    assert len(net[0]._forward_hooks) == 1
    calls["own"] = 0
    shrink_(net, runs.inputs(4, 0), [runs.inputs(256, 1)], tolerance=0.1)
    assert calls["own"] > 0
    assert calls["user"] == runs.STEPS
    assert not is_internal_forward()


def test_a_hook_that_collects_features_for_the_loss(runs):
    """The features of an old pass hold its graph; those of captures would not fit those of the batch."""
    net = runs.mlp()
    features = []
    net[1].register_forward_hook(lambda m, x, y: None if is_internal_forward() else features.append(y))
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)
    events = []
    for step in range(runs.STEPS):
        x = runs.inputs(runs.BATCH, step)
        logits = net(x)
        loss = nn.functional.cross_entropy(logits, runs.labels(x)) + 1e-3 * sum(f.square().mean() for f in features)
        assert [len(f) for f in features] == [runs.BATCH]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if event := apo.step():
            events.append(event)
        features.clear()
    assert events


def test_hooks_that_change_the_output_take_part(runs):
    """They compute what the network computes, so captures and probes must run them."""
    net = runs.mlp()
    net[1].register_forward_hook(lambda module, args, output: output.flip(1))
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)
    before = {g.name: g.sites[0].columns.copy() for g in apo.groups()}
    assert before["0"][0].tolist() == [31]
    assert runs.train(net, optimizer, apo)


def test_one_context_holds_for_every_mode_and_within_itself():
    """Synchronised batch norm has no pass of its own on the CPU; inside, it normalises by the rows that it sees."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.SyncBatchNorm(6), nn.Linear(6, 3))
    plain = nn.Sequential(net[0], nn.BatchNorm1d(6), net[2]).train()
    x = torch.randn(8, 4)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    (found,) = outputs(net, make_probe(x, x), training=True)
    torch.testing.assert_close(found, plain(x))
    with internal_passes(net):
        with internal_passes(net, training=True, grad=True):
            assert net(x).requires_grad
        assert not net(x).requires_grad
        net(x)
    assert "forward" not in vars(net[1])
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_the_name_before_is_still_there():
    assert apoptosis.is_own_pass is is_internal_forward


def test_nested_and_per_thread():
    seen = []
    with marked_internal():
        with marked_internal():
            assert is_internal_forward()
        assert is_internal_forward()
        thread = threading.Thread(target=lambda: seen.append(is_internal_forward()))
        thread.start()
        thread.join()
    assert seen == [False]
    with pytest.raises(ZeroDivisionError), marked_internal():
        raise ZeroDivisionError
    assert not is_internal_forward()


@pytest.fixture
def _no_window_left():
    """Windows of other tests' runs, which nobody closed, hold the stance until they are collected."""
    gc.collect()


@pytest.mark.usefixtures("_no_window_left")
def test_the_stance_goes_back_and_a_later_one_stays():
    def stance():
        return torch._dynamo.eval_frame._stance.stance

    torch._dynamo.reset()
    eager = Eager()
    eager.begin()
    eager.begin()
    assert stance() == "force_eager"
    eager.end()
    assert stance() == "default"
    eager.end()
    eager.begin()
    later = torch.compiler.set_stance("eager_on_recompile")
    eager.end()
    assert stance() == "eager_on_recompile"
    later.__exit__(None, None, None)
    torch.compiler.set_stance("default")


@pytest.mark.usefixtures("_no_window_left")
def test_two_windows_that_overlap_leave_the_stance_as_it_was() -> None:
    first, second = Eager(), Eager()
    before = torch._dynamo.eval_frame._stance.stance
    first.begin()
    second.begin()
    first.end()  # not in the order in which they began
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    second.end()
    assert torch._dynamo.eval_frame._stance.stance == before == "default"


@pytest.mark.usefixtures("_no_window_left")
def test_a_window_that_nobody_closes_ends_with_its_owner() -> None:
    eager = Eager()
    eager.begin()
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    del eager
    gc.collect()
    assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.mark.usefixtures("_no_window_left")
def test_a_window_that_ends_inside_a_pass_of_the_library_lets_go_after_it() -> None:
    eager = Eager()
    eager.begin()
    with marked_internal():
        eager.end()
    assert torch._dynamo.eval_frame._stance.stance == "default"
