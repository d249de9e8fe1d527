"""What else happens to the same model, optimizer and inputs: other settings, other hands, inputs written to."""

import gc

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from apoptosis import Apoptosis, load, save, shrink_
from apoptosis.errors import ArgumentError, CheckpointError


class Writes(nn.Module):
    """A forward pass that changes its input in place."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        x.sub_(1.0).mul_(0.5)
        return self.body(x)


def test_a_given_calibration_is_what_decides(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    first = Apoptosis(net, optimizer, runs.inputs(4, 0), total_steps=60, tolerance=0.1, calibration=12345.0)
    assert first.calibration == 12345.0
    measured = Apoptosis(net, optimizer, runs.inputs(4, 0), total_steps=60, tolerance=0.1).calibration
    assert measured > 0
    dear = Apoptosis(net, optimizer, runs.inputs(4, 0), total_steps=60, tolerance=0.1, calibration=1e30)
    assert runs.train(net, optimizer, dear) == []


def test_a_forward_pass_may_write_to_its_input(runs):
    example, held_out = runs.inputs(4, 1), runs.inputs(64, 2)
    before = example.clone(), held_out.clone()
    net = Writes(runs.mlp())
    optimizer = runs.adam(net)
    apo = Apoptosis(net, optimizer, example, total_steps=60, tolerance=0.1, probe=held_out, align=1, calibration=1.0)
    events = runs.train(net, optimizer, apo)
    assert events
    assert torch.equal(example, before[0])
    assert torch.equal(held_out, before[1])
    batch = runs.inputs(256, 3)
    kept = batch.clone()
    shrink_(net, example, [batch], tolerance=0.05)
    assert torch.equal(batch, kept)


def test_a_longer_run_goes_on_shrinking(runs, tmp_path):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer, total_steps=20)
    runs.train(net, optimizer, apo, steps=20)
    assert apo.decision.at_step is None
    save(tmp_path / "a", net, optimizer, apo)
    again = runs.mlp(seed=1)
    optimizer = runs.adam(again)
    longer = Apoptosis(again, optimizer, runs.inputs(4, 99), total_steps=400, tolerance=0.1, align=1)
    load(tmp_path / "a", again, optimizer, longer)
    assert longer.decision.at_step is not None
    assert longer.decision.at_step > 20


def test_other_settings_leave_a_half_filled_window_behind(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)
    runs.train(net, optimizer, apo, steps=7)
    assert apo.state_dict()["window"] is not None
    twin = runs.mlp()
    other = Apoptosis(twin, runs.adam(twin), runs.inputs(4, 99), total_steps=60, tolerance=0.2, align=1)
    other.load_state_dict(apo.state_dict())
    assert runs.num_hooks(twin) == 0
    assert other.decision.tolerance == pytest.approx(0.2)
    apo.close()


def test_followers_of_other_widths_are_named_when_a_state_is_loaded(runs, tmp_path):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)
    assert runs.train(net, optimizer, apo)
    save(tmp_path / "a", net, optimizer, apo)
    again = runs.mlp()
    optimizer = runs.adam(again)
    second = runs.start(again, optimizer)
    second.follow(AveragedModel(again))
    before = runs.everything(again)
    with pytest.raises((ArgumentError, CheckpointError), match="averaged copy"):
        load(tmp_path / "a", again, optimizer, second)
    assert runs.same(runs.everything(again), before)


def test_hooks_go_with_the_object(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)
    runs.train(net, optimizer, apo, steps=7)
    assert runs.num_hooks(net) > 0
    del apo
    gc.collect()
    assert runs.num_hooks(net) == 0


def test_shapes_changed_by_other_hands_are_met_at_the_next_window(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer, total_steps=390)
    runs.train(net, optimizer, apo, steps=3)
    event = shrink_(net, runs.inputs(4, 99), [runs.inputs(512, 5)], tolerance=0.2, optimizer=optimizer)
    assert event
    assert runs.train(net, optimizer, apo, first=3, steps=100)
    assert all(g.num_channels == net[int(g.name)].out_features for g in apo.groups())


def test_batches_that_do_not_fit_are_one_clear_error(runs):
    net = runs.mlp()
    before = runs.everything(net)
    with pytest.raises(ArgumentError, match="batch 0"):
        shrink_(net, runs.inputs(4, 0), [torch.zeros(8, 7)], tolerance=0.1)
    with pytest.raises(ArgumentError, match="batches: its tensors hold no example"):
        shrink_(net, runs.inputs(4, 0), [torch.zeros(0, 6)], tolerance=0.1)
    with pytest.raises(ArgumentError, match=r"x for x, in loader"):
        shrink_(net, runs.inputs(4, 0), [[torch.zeros(8, 6)]], tolerance=0.1)
    assert runs.same(runs.everything(net), before)


class Tempered(nn.Module):
    """A forward pass with a number that the training loop moves."""

    def __init__(self, body):
        super().__init__()
        self.body, self.temperature = body, 2.0

    def forward(self, x):
        return self.body(x) / self.temperature


def test_a_number_that_the_loop_schedules_pins_nothing(runs):
    net = Tempered(runs.mlp())
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)

    def anneal(step):
        net.temperature = 2.0 - step / 100

    assert runs.train(net, optimizer, apo, after=anneal)
    assert all("number" not in pin.reason for pin in apo.pins())
