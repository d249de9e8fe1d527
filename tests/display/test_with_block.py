"""`with Apoptosis(...) as apo`: what leaving the block ends, and what stays."""

import pytest
import torch

from apoptosis.errors import ArgumentError


def hooks(net):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules())


def opened(runs, net, optimizer, apo):
    """Train until a window is open."""
    for step in range(runs.STEPS):
        if apo.watching:
            return
        runs.train(net, optimizer, apo, first=step, steps=step + 1)
    raise AssertionError("no window opened")


def test_leaving_by_an_error_takes_the_hooks_off_and_changes_nothing(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo, before = runs.start(net, optimizer), {}

    def block():
        with apo:
            opened(runs, net, optimizer, apo)
            assert hooks(net)
            before.update({name: tensor.clone() for name, tensor in net.state_dict().items()})
            raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        block()
    assert hooks(net) == 0
    assert not apo.watching
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net(runs.inputs(3, 0)).shape == (3, 4)
    step = apo.state_dict()["memory"]["step"]
    for call in (apo.step, lambda: apo.load_state_dict(apo.state_dict())):
        with pytest.raises(ArgumentError, match="after the end of its with block") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert apo.state_dict()["memory"]["step"] == step
    assert "left" in apo.status()


def test_a_block_that_is_entered_again_goes_on_as_if_it_had_not_been_left(runs):
    whole, parted = runs.mlp(), runs.mlp()
    optimizers = runs.adam(whole), runs.adam(parted)
    alone = runs.start(whole, optimizers[0])
    expected = runs.train(whole, optimizers[0], alone)
    apo = runs.start(parted, optimizers[1])
    with apo as same:
        assert same is apo
    with apo:
        events = runs.train(parted, optimizers[1], apo)
    assert [e.groups for e in events] == [e.groups for e in expected] != []
    state = apo.state_dict()  # what was left can be saved, and goes on elsewhere
    assert not state["memory"]["closed"]


def test_close_stays_what_it_was(runs):
    net = runs.mlp()
    with runs.start(net, runs.adam(net)) as apo:
        apo.close()
        assert apo.step() is None
    assert apo.step() is None
    assert "closed" in apo.status()
