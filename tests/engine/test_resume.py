"""A run that is saved anywhere and taken up in a freshly built full-width network goes on bitwise the same."""

import copy

import pytest
import torch
from torch import nn

from apoptosis import Apoptosis, load, save
from apoptosis.checkpoint.file import read_file
from apoptosis.errors import CheckpointError

SHAPE = (2, 6, 6)


def convolutional(runs, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(12 * 9, 24), nn.ReLU(), nn.Linear(24, 4),
    )  # fmt: skip


CASES = {"mlp": (lambda runs: runs.mlp(), (6,)), "cnn": (convolutional, SHAPE)}


def begin(runs, name):
    build, shape = CASES[name]
    net = build(runs)
    optimizer = runs.adam(net)
    torch.manual_seed(1)
    return net, optimizer, runs.start(net, optimizer, runs.inputs(4, 1, shape), tolerance=0.15), shape


def comparable(apo):
    state = apo.state_dict()
    for name in ("own_seconds", "hook_seconds"):
        del state["memory"][name]
    return state


@pytest.mark.parametrize("name", CASES)
def test_resume_anywhere_is_bitwise_the_uninterrupted_run(runs, name, tmp_path):
    net, optimizer, apo, shape = begin(runs, name)
    in_window, after_event, num_events = [], [], []

    def note(step):
        num_events.append(apo.ledger().events)
        (in_window if runs.num_hooks(net) else after_event if num_events[-1] else []).append(step)
        save(tmp_path / f"{step}", net, optimizer, apo, rng=torch.get_rng_state())

    events = runs.train(net, optimizer, apo, shape=shape, after=note)
    assert events
    middles = [step for step in in_window if step - 1 in in_window]  # something was seen already
    assert middles
    stops = [2, middles[0], *[s for s in middles if num_events[s]][:1], after_event[0]]
    for stop in stops:
        fresh, other, again, _ = begin(runs, name)
        extra = load(tmp_path / f"{stop}", fresh, other, again)
        torch.set_rng_state(extra["rng"])
        done = [e for e in events if e.step <= stop + 1]
        more = runs.train(fresh, other, again, first=stop + 1, shape=shape)
        assert [(e.step, e.groups) for e in done + more] == [(e.step, e.groups) for e in events]
        assert [e.certificates for e in done + more] == [e.certificates for e in events]
        assert [e.measured for e in done + more] == [e.measured for e in events]
        assert runs.same(runs.everything(fresh)["tensors"], runs.everything(net)["tensors"])
        assert runs.same(other.state_dict(), optimizer.state_dict())
        assert runs.same(comparable(again), comparable(apo))


def test_hooks_of_a_window_are_put_on_again(runs, tmp_path):
    net, optimizer, apo, _ = begin(runs, "mlp")
    runs.train(net, optimizer, apo, steps=7)
    assert runs.num_hooks(net) > 0
    save(tmp_path / "a", net, optimizer, apo)
    fresh, other, again, _ = begin(runs, "mlp")
    load(tmp_path / "a", fresh, other, again)
    assert runs.num_hooks(fresh) == runs.num_hooks(net)
    again.close()
    assert runs.num_hooks(fresh) == 0


def test_full_shapes_are_saved_and_survive_a_resume(runs, tmp_path):
    net, optimizer, apo, _ = begin(runs, "mlp")
    full = {name: list(p.shape) for name, p in net.named_parameters()}
    assert runs.train(net, optimizer, apo)
    save(tmp_path / "a", net, optimizer, apo)
    assert read_file(tmp_path / "a")[0]["model"]["full"] == full
    shrunk = runs.mlp()
    load(tmp_path / "a", shrunk)
    other = runs.adam(shrunk)
    again = Apoptosis(shrunk, other, runs.inputs(4, 1), total_steps=runs.STEPS)  # built on the shrunk network
    load(tmp_path / "a", shrunk, other, again)
    assert again.ledger().parameters == apo.ledger().parameters
    save(tmp_path / "b", shrunk, other, again)
    assert read_file(tmp_path / "b")[0]["model"]["full"] == full
    load(tmp_path / "b", runs.mlp())


def test_pins_and_exclusions_survive(runs):
    net, optimizer, apo, _ = begin(runs, "mlp")
    state = apo.state_dict()
    broken = {"group": "2", "num_channels": 32, "reason": "it broke", "where": "", "remedy": ""}
    state["pins"].append(broken)
    other = runs.start(net, optimizer, exclude=("0",))
    other.load_state_dict(state)
    assert {pin.group: pin.reason for pin in other.pins()}["2"] == "it broke"
    assert "exclude" in {pin.group: pin.reason for pin in other.pins()}["0"]
    assert other.groups() == ()


def damaged(state):
    """Every way of breaking a state at one place."""
    yield "not a mapping", [1]
    for key in state:
        yield f"without {key}", {k: v for k, v in state.items() if k != key}
    yield "newer", state | {"version": 99}
    yield "another network", state | {"widths": {"0": 5}}
    yield "widths of the wrong type", state | {"widths": 5}
    yield "plain", state | {"memory": {}}
    yield "a number that is none", state | {"memory": state["memory"] | {"step": "x"}}
    yield "history", state | {"memory": state["memory"] | {"history": [{"step": 1}]}}
    yield "pins", state | {"pins": [{"x": 1}]}
    yield "verdict", state | {"verdict": {"account": {}, "training_flips": 0.0}}
    window = state["window"]
    yield "window of other groups", state | {"window": window | {"watches": window["watches"][:1]}}
    cut = [entry | {"moments": {}} for entry in window["watches"]]
    yield "moments", state | {"window": window | {"watches": cut}}
    yield "generator", state | {"window": window | {"generator": torch.zeros(3, dtype=torch.uint8)}}


def test_a_damaged_state_is_one_error_and_changes_nothing(runs):
    net, optimizer, apo, _ = begin(runs, "mlp")
    runs.train(net, optimizer, apo, steps=7)
    state = apo.state_dict()
    assert state["window"] is not None
    other, second, target, _ = begin(runs, "mlp")
    runs.train(other, second, target, steps=3)
    before = comparable(target)
    structure, tensors = target.structure, runs.everything(other, second)
    for what, wrong in damaged(state):
        with pytest.raises(CheckpointError):
            target.load_state_dict(wrong)
        assert runs.same(comparable(target), before), what
        assert target.structure is structure, what
        assert runs.same(runs.everything(other, second), tensors), what
    runs.train(other, second, target, first=3)
    twin, third, untouched, _ = begin(runs, "mlp")
    runs.train(twin, third, untouched)
    assert runs.same(comparable(target), comparable(untouched))


def test_load_of_a_damaged_state_leaves_model_optimizer_and_apoptosis_together(runs, tmp_path):
    net, optimizer, apo, _ = begin(runs, "mlp")
    runs.train(net, optimizer, apo)
    state = apo.state_dict()
    state["memory"]["history"] = [{"nonsense": 1}]

    class Spoiled:
        full_shapes = apo.full_shapes

        def state_dict(self):
            return state

        def load_state_dict(self, given):
            raise NotImplementedError

    save(tmp_path / "a", net, optimizer, Spoiled())
    fresh, other, again, _ = begin(runs, "mlp")
    runs.train(fresh, other, again, steps=7)
    assert runs.num_hooks(fresh) > 0
    before, held = runs.everything(fresh, other), comparable(again)
    with pytest.raises(CheckpointError):
        load(tmp_path / "a", fresh, other, again)
    assert runs.same(runs.everything(fresh, other), before)
    assert runs.same(comparable(again), held)
    assert runs.train(fresh, other, again, first=7)


def test_state_of_another_network_is_refused(runs, tmp_path):
    net, optimizer, apo, _ = begin(runs, "mlp")
    runs.train(net, optimizer, apo)
    wider = runs.mlp(width=48)
    target = runs.start(wider, runs.adam(wider))
    with pytest.raises(CheckpointError, match="of other widths"):
        target.load_state_dict(apo.state_dict())
    save(tmp_path / "a", net, optimizer, apo)
    deeper = nn.Sequential(*runs.mlp(), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(CheckpointError, match="another network"):
        load(tmp_path / "a", deeper)


def test_a_state_outlives_the_run_it_came_from(runs):
    net, optimizer, apo, _ = begin(runs, "mlp")
    runs.train(net, optimizer, apo, steps=7)
    state = apo.state_dict()
    before = copy.deepcopy(state)
    runs.train(net, optimizer, apo, first=7)
    assert runs.same(state, before)
