"""shrink_: one surgery on a trained network, whatever the batches come in."""

import copy

import pytest
import torch
from torch import nn

from apoptosis import shrink_
from apoptosis.errors import ArgumentError, CaptureError, NonFiniteError, UnsupportedOptimizerError


def redundant(runs, seed=0):
    net = runs.mlp(32, seed=seed)
    runs.doubled(net, 0)
    runs.doubled(net, 2)
    return net


def test_duplicates_go_and_the_outputs_stay(runs):
    net = redundant(runs)
    x = runs.inputs(512, 1)
    before = net(x).detach()
    event = shrink_(net, x[:4], [x], tolerance=1e-3)
    assert event
    assert event.groups == {"0": (32, 16), "2": (32, 16)}
    assert torch.allclose(net(x), before, atol=1e-4)
    assert event.measured["output_rms"] < 1e-3
    assert event.measured["flips"] == 0.0
    assert "512 of the given inputs" in str(event)
    assert event.bytes_freed == 4 * (event.parameters[0] - event.parameters[1])


@pytest.mark.parametrize("trains", [True, False])
def test_what_is_silent_in_one_mode_alone_stays_where_training_goes_on(trains):
    """Running statistics lag behind, so two channels are silent in evaluation, but neither in training nor alike."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).double()
    with torch.no_grad():
        net[0].weight[7], net[0].bias[7] = net[0].weight[6], net[0].bias[6]
        net[1].running_mean[:2] = 50.0
    x = torch.randn(512, 6, dtype=torch.float64)
    before = copy.deepcopy(net)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1) if trains else None
    event = shrink_(net, x[:4], [x], tolerance=0, optimizer=optimizer)
    assert event.groups == {"0": (8, 7 if trains else 5)}
    for mode in (False, True) if trains else (False,):
        torch.testing.assert_close(net.train(mode)(x), before.train(mode)(x), rtol=1e-9, atol=1e-10)
    assert event.measured["output_rms"] < 1e-10


@pytest.mark.parametrize("training", [False, True])
def test_batches_leave_no_trace(runs, training):
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))
    net.train(training)
    before = runs.everything(net)
    assert not shrink_(net, runs.inputs(4, 0), [runs.inputs(512, 1)], tolerance=0.0)
    assert runs.same(runs.everything(net), before)


def test_dropout_is_asleep_and_asks_for_no_correction(runs):
    def build(p):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(p), nn.Linear(32, 4))

    x = runs.inputs(512, 1)
    with_dropout, without = build(0.5), build(0.0)
    a, b = (shrink_(net, x[:4], [x], tolerance=0.1) for net in (with_dropout, without))
    assert a.groups == b.groups
    assert [c.value for c in a.certificates] == [c.value for c in b.certificates]
    assert runs.same(dict(with_dropout.state_dict()), dict(without.state_dict()))


def test_a_loader_of_inputs_and_labels_is_refused_with_the_remedy(runs):
    net = redundant(runs)
    x = runs.inputs(256, 1)
    for batch in ((x, runs.labels(x)), [x, runs.labels(x)]):
        with pytest.raises(ArgumentError, match=r"\(x for x, y in loader\)"):
            shrink_(net, x[:4], [batch], tolerance=0.1)
    assert net[0].out_features == 32
    assert shrink_(net, x[:4], (x for x, _ in [(x, runs.labels(x))]), tolerance=1e-3)


def test_empty_and_odd_batches(runs):
    net = redundant(runs)
    x = runs.inputs(256, 1)
    with pytest.raises(ArgumentError, match="empty"):
        shrink_(net, x[:4], [], tolerance=0.1)
    with pytest.raises(ArgumentError, match="batches"):
        shrink_(net, x[:4], [None], tolerance=0.1)
    with pytest.raises(ArgumentError, match="batches"):
        shrink_(net, x[:4], 3, tolerance=0.1)
    with pytest.raises(ArgumentError, match="without labels"):
        shrink_(net, (x[:4],), [(x, runs.labels(x))], tolerance=0.1)
    with pytest.raises(ArgumentError, match="dict"):
        shrink_(net, {"input": x[:4]}, [x], tolerance=0.1)
    with pytest.raises(CaptureError):
        shrink_(net, x[:4, :3], [x], tolerance=0.1)
    assert runs.num_hooks(net) == 0


def test_a_tensor_is_a_batch_and_no_sequence_of_them(runs):
    net = redundant(runs)
    with pytest.raises(ArgumentError, match=r"\[batch\]"):
        shrink_(net, runs.inputs(4, 0), runs.inputs(512, 1), tolerance=0.1)
    assert runs.num_hooks(net) == 0


def test_a_generator_is_read_only_as_far_as_needed(runs):
    net = redundant(runs)
    taken = []

    def batches():
        for seed in range(1000):
            taken.append(seed)
            yield runs.inputs(128, seed)

    assert shrink_(net, runs.inputs(4, 0), batches(), tolerance=1e-3)
    assert len(taken) == 2


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_batches_in_the_form_of_the_example(runs, form):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = redundant(runs), redundant(runs, seed=1)

        def forward(self, x, y, scale=1.0):
            return self.a(x) + scale * self.b(y)

    net = Two()

    def call(rows, seed):
        x, y = runs.inputs(rows, seed), runs.inputs(rows, seed + 50)
        return (x, y) if form == "tuple" else {"y": y, "x": x, "scale": 0.5}

    event = shrink_(net, call(4, 0), [call(256, 1)], tolerance=1e-3)
    assert set(event.groups) == {"a.0", "a.2", "b.0", "b.2"}
    assert all(before == 32 and after in (15, 16) for before, after in event.groups.values())  # one has a dead pair


def test_one_batch_of_images_suffices(runs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    runs.doubled(net, 0)
    runs.doubled(net, 2)
    x = runs.inputs(32, 1, (2, 6, 6))
    before = net(x).detach()
    event = shrink_(net, x[:2], [x], tolerance=1e-3)
    assert event.groups == {"0": (16, 8), "2": (16, 8)}
    assert torch.allclose(net(x), before, atol=1e-4)


def test_nothing_to_remove_is_falsy_and_says_why(runs):
    net = runs.mlp(8)
    event = shrink_(net, runs.inputs(4, 0), [runs.inputs(512, 1)], tolerance=0.0)
    assert not event
    assert event.groups == {}
    text = str(event)
    assert "nothing removed" in text
    assert "output" in "; ".join(event.notes)
    assert event.parameters[0] == event.parameters[1]
    few = shrink_(runs.mlp(64), runs.inputs(4, 0), [runs.inputs(40, 1)], tolerance=0.02)
    assert not few
    assert "40 rows were observed at" in str(few)


def test_a_large_tolerance_is_rolled_back_halved_and_noted(runs):
    net = runs.mlp(48)
    event = shrink_(net, runs.inputs(4, 0), [runs.inputs(512, 1)], tolerance=0.95, criterion="magnitude")
    assert event
    assert event.tolerance < 0.95
    assert any("rolled back at tolerance 0.95" in note for note in event.notes)
    assert event.measured["output_rms"] <= 0.25


def test_align_and_exclude(runs):
    net = redundant(runs)
    event = shrink_(net, runs.inputs(4, 0), [runs.inputs(512, 1)], tolerance=1e-3, align=12, exclude=["2"])
    assert event.groups == {"0": (32, 24)}
    with pytest.raises(ArgumentError, match="matches no group"):
        shrink_(net, runs.inputs(4, 0), [runs.inputs(512, 1)], tolerance=1e-3, exclude=["body.*"])


def test_probe_speaks_of_the_population(runs):
    net = redundant(runs)
    held = runs.inputs(2000, 7)
    event = shrink_(
        net, runs.inputs(4, 0), [runs.inputs(512, 1)], tolerance=1e-3, probe=(held, runs.labels(held))
    )  # fmt: skip
    (certificate,) = [c for c in event.certificates if c.kind == "accuracy"]
    assert certificate.population
    assert 0.0 < certificate.value < 0.05
    assert "held-out" in str(event)


def test_optimizer_state_follows(runs):
    net = runs.mlp(32)
    optimizer = runs.adam(net)
    runs.train(net, optimizer, None, steps=5)
    runs.doubled(net, 0)
    event = shrink_(net, runs.inputs(4, 0), [runs.inputs(512, 1)], tolerance=1e-3, optimizer=optimizer)
    assert event.groups["0"] == (32, 16)
    assert all(s["exp_avg"].shape == s["exp_avg_sq"].shape == p.shape for p, s in optimizer.state.items())
    runs.train(net, optimizer, None, first=5, steps=8)
    with pytest.raises(UnsupportedOptimizerError, match="LBFGS"):
        shrink_(
            net,
            runs.inputs(4, 0),
            [runs.inputs(512, 1)],
            tolerance=0.1,
            optimizer=torch.optim.LBFGS(net.parameters()),
        )


def test_broken_groups_are_pinned_and_noted(runs):
    class Literal(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.relu(self.a(x)).view(-1, 32))))

    torch.manual_seed(0)
    net = Literal()
    event = shrink_(net, runs.inputs(4, 0), [runs.inputs(512, 1)], tolerance=0.1)
    assert set(event.groups) == {"b"}
    assert any(note.startswith("'a'") and "broke the forward pass" in note for note in event.notes)


def test_inputs_that_are_not_finite(runs):
    net = redundant(runs)
    before = runs.everything(net)
    x = runs.inputs(512, 1)
    x[3] = float("nan")
    with pytest.raises(NonFiniteError):
        shrink_(net, x[4:8], [x], tolerance=0.1)
    assert runs.same(runs.everything(net), before)


@pytest.mark.parametrize("criterion", ["pairwise", "duplicate", "interpolative", "greedy"])
def test_criteria_find_duplicates(runs, criterion):
    net = redundant(runs)
    x = runs.inputs(512, 1)
    before = net(x).detach()
    event = shrink_(net, x[:4], [x], tolerance=1e-3, criterion=criterion)
    assert event.groups["0"] == (32, 16)
    assert torch.allclose(net(x), before, atol=1e-4)


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-5])
def test_a_small_signal_on_a_large_constant_is_no_round_off(size):
    """A BatchNorm makes the signal large again: what goes at tolerance 0 must be reproduced to round-off of it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 24), nn.SiLU(), nn.Linear(24, 8), nn.BatchNorm1d(8, eps=1e-12), nn.Linear(8, 3))
    net = net.double()
    with torch.no_grad():
        net[0].weight *= size
        net[0].bias.uniform_(-2, 2)
        net[0].weight[20:], net[0].bias[20:] = net[0].weight[:4], net[0].bias[:4]
        for _ in range(100):
            net(torch.randn(64, 4).double())
    net.eval()
    before = copy.deepcopy(net)
    event = shrink_(net, torch.zeros(4, 4).double(), [torch.randn(2000, 4).double()], tolerance=0)
    assert event.groups["0"][1] <= 20
    x = torch.randn(200, 4).double()
    for mode in (False, True):
        a, b = before.train(mode)(x).detach(), net.train(mode)(x).detach()
        assert float((a - b).norm() / a.norm()) < 1e-9


def test_a_group_at_fault_stays_and_the_others_go_at_tolerance_zero():
    """In float32, a signal of 1e-4 of its mean is lost in the round-off of the first layer, but not in the second."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 8), nn.BatchNorm1d(8), nn.ReLU()),
        *(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)),
    )
    with torch.no_grad():
        net[5].weight[16:], net[5].bias[16:] = net[5].weight[:16], net[5].bias[:16]
        for _ in range(100):
            net(1e5 + torch.randn(64, 16))
    net.eval()
    before = copy.deepcopy(net)
    event = shrink_(net, torch.zeros(4, 16), [1e5 + torch.randn(2000, 16)], tolerance=0)
    assert list(event.groups) == ["5"]
    assert event.groups["5"][1] <= 16
    assert len(event.notes) == len(set(event.notes))
    assert len([note for note in event.notes if "rolled back" in note]) == 1
    x = 1e5 + torch.randn(100, 16)
    torch.testing.assert_close(net(x), before(x), rtol=1e-4, atol=1e-4)
