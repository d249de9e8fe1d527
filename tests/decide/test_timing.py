"""What a training step takes: measured once, as a table that answers for other widths."""

import json
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

from apoptosis.decide.contractions import recorded
from apoptosis.decide.timing import measure_timings
from apoptosis.graph import analyse
from apoptosis.planner import Costs
from apoptosis.records import Curve, Structure, Timings


class Net(nn.Module):
    """Every kind of convolution, a weight read by a function, one that is shared, and a norm."""

    def __init__(self, width=16):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.depth = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.point, self.blocks = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, 32, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(32, 24, 2, stride=2)
        self.last = nn.Parameter(torch.randn(16, 24) * 0.1)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        h = torch.relu(self.depth(torch.relu(self.norm(self.stem(x)))))
        h = torch.relu(self.up(torch.relu(self.blocks(torch.relu(self.point(h))))))
        return self.head(torch.relu(functional.linear(h.mean((2, 3)), self.last)))


def call_of(*shape):
    return (torch.randn(*shape),), {}


def mlp(*widths):
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b, bias=False), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def table(*curves, weights, **plain):
    zero = {"per_mac": 0.0, "per_element": 0.0, "per_parameter": 0.0, "fixed": 0.0, "step": 0.0}
    return Timings(device="cpu", threads=1, rows=4, curves=curves, weights=weights, **(zero | plain))


# ------------------------------------------------------------------ what is found


def test_every_contraction_that_can_shrink_is_found_with_its_multiply_adds():
    net, call = Net(), call_of(2, 3, 8, 8)
    structure = analyse(net, *call)
    found = recorded(net, call, structure)
    assert set(found.weights) == {name for name, p in net.named_parameters() if p.dim() > 1}
    assert sum(one.macs * n for calls in found.weights.values() for one, n in calls.items()) == structure.macs
    (depth,), (blocks,), (up,), (last,) = (found.weights[f"{n}.weight" if n != "last" else n]
                                           for n in ("depth", "blocks", "up", "last"))  # fmt: skip
    assert depth.narrowed(0.5) == (8, 8)
    assert (blocks.blocks, blocks.narrowed(0.5), blocks.macs_at(*blocks.narrowed(0.5))) == (
        4,
        (16, 16),
        blocks.macs / 4,
    )
    assert (up.narrow, up.narrowed(0.5), last.narrowed(0.5)) == ((True, True), (16, 16), (8, 16))


def test_the_input_of_the_network_and_frozen_weights_need_no_gradient():
    net = mlp(32, 16, 16, 4)
    net[2].weight.requires_grad_(False)
    found = recorded(net, call_of(8, 32), analyse(net, *call_of(8, 32), frozen="cut"))
    grads = {name: one.grads for name, calls in found.weights.items() for one in calls}
    assert grads == {"0.weight": (False, True), "2.weight": (True, False), "4.weight": (True, True)}


def test_weights_of_gpt_2_lie_the_other_way_round():
    class Flipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(12, 32)), nn.Linear(32, 4)

        def forward(self, x):
            return self.b(torch.relu(x @ self.a))

    net, call = Flipped(), call_of(8, 12)
    (one,) = recorded(net, call, analyse(net, *call)).weights["a"]
    assert (one.flipped, one.ins, one.outs, one.narrow) == (True, 12, 32, (True, False))
    assert one.step(8, 16, 12)()[0].shape == (12, 16)


def test_casts_of_autocast_are_followed_to_their_weights():
    net, call = mlp(32, 64, 4), call_of(8, 32)
    structure = analyse(net, *call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = recorded(net, call, structure)
    assert {one.dtype for calls in found.weights.values() for one in calls} == {torch.bfloat16}
    assert set(found.weights) == {"0.weight", "2.weight"}


@pytest.mark.parametrize("name", ["stem", "depth", "point", "blocks", "up", "last", "head"])
def test_contractions_run_by_themselves_at_their_width_and_narrower(name):
    net, call = Net(), call_of(2, 3, 8, 8)
    found = recorded(net, call, analyse(net, *call)).weights[name if name == "last" else f"{name}.weight"]
    (one,) = found
    for outs, ins in {one.narrowed(share) for share in (1.0, 0.5)}:
        grads = one.step(one.rows, outs, ins)()
        assert len(grads) == sum(one.grads) + one.bias
        assert grads[0].shape[1 if one.grads[0] else 0] == (ins if one.grads[0] else outs)
    assert one.forward(one.rows)().shape[1] == one.outs


# ------------------------------------------------------------------ the table


def test_layers_of_one_shape_share_a_curve_and_nothing_of_the_users_changes():
    torch.manual_seed(0)
    net, call = nn.Sequential(*[mlp(16, 64, 16) for _ in range(3)], nn.Dropout(), nn.BatchNorm1d(16)), call_of(32, 16)
    structure = analyse(net, *call)
    net[0][0].weight.grad = torch.ones(64, 16)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    state, modes = torch.get_rng_state(), [m.training for m in net.modules()]
    optimizer = torch.optim.Adam(net.parameters())
    found = measure_timings(net, call, structure, [optimizer])
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == modes
    assert not optimizer.state
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["0.0.weight"]
    assert found.weights["1.0.weight"] == found.weights["2.0.weight"]
    assert found.weights["0.2.weight"] == found.weights["1.2.weight"]
    assert len(set(found.weights.values())) <= 4  # first, last and what lies between, there and back
    assert (found.rows, found.per_parameter > 0, found.per_mac > 0) == (32, True, True)


def test_a_table_is_plain_json_and_reads_back():
    net, call = Net(), call_of(2, 3, 8, 8)
    found = measure_timings(net, call, analyse(net, *call), rows=4)
    assert Timings.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    assert found.rows == 4
    assert found.step == Costs(analyse(net, *call), found).of({}).seconds > 0


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"version": 2}, "of version 2"),
        ({"fixed": -1.0}, ">= 0"),
        ({"per_mac": float("nan")}, "finite"),
        ({"curves": []}, "not there"),
        ({"curves": [{"macs": 1.0, "shares": [1.0, 0.5], "seconds": [1.0, 2.0]}]}, "ascend"),
        ({"curves": [{"macs": 1.0, "shares": [0.5, 1.0], "seconds": [1.0]}]}, "more shares"),
        ({"weights": None}, "lack"),
    ],
)
def test_a_damaged_table_is_refused(change, what):
    good = table(Curve(10.0, (0.5, 1.0), (1.0, 2.0)), weights={"w": 0}).as_dict()
    assert Timings.from_dict(good).weights == {"w": 0}
    with pytest.raises(ValueError, match=what):
        Timings.from_dict(good | change)


# ------------------------------------------------------------------ seconds at other widths


def test_seconds_lie_on_the_curves_and_in_proportion():
    net, call = mlp(4, 16, 2), call_of(5, 4)
    structure = analyse(net, *call)
    curves = Curve(5 * 64.0, (0.25, 0.5, 1.0), (3.0, 4.0, 8.0)), Curve(5 * 32.0, (0.5, 1.0), (1.0, 2.0))
    costs = Costs(structure, table(*curves, weights={"0.weight": 0, "2.weight": 1}, fixed=10.0))
    seconds = [costs.of({"0": width}).seconds for width in (16, 12, 8, 4, 2)]
    assert seconds == pytest.approx([20.0, 17.5, 15.0, 13.5, 12.75])
    assert costs.of({"0": 0}).seconds == 10.0  # what is not computed costs nothing
    plain = {"per_mac": 2.0, "per_parameter": 3.0, "per_element": 5.0}
    costs = Costs(structure, table(weights={}, **plain))
    assert structure.elements == 5 * 16  # of the ReLU
    assert costs.of({}).seconds == 2 * structure.macs + 3 * 96 + 5 * 80
    assert costs.of({"0": 4}).seconds == (2 * structure.macs + 3 * 96 + 5 * 80) / 4


def test_a_narrower_layer_is_never_slower_than_a_wider_one():
    net, call = mlp(4, 16, 2), call_of(5, 4)
    noisy = table(Curve(320.0, (0.25, 0.5, 1.0), (5.0, 4.0, 8.0)), weights={"0.weight": 0})
    costs = Costs(analyse(net, *call), noisy)
    seconds = [costs.of({"0": width}).seconds for width in range(17)]
    assert seconds == sorted(seconds)


def test_a_table_measured_before_events_answers_after_them():
    call = call_of(6, 3, 8, 8)
    wide, narrow = Net(16), Net(8)
    structure, later = analyse(wide, *call), analyse(narrow, *call)
    timings = measure_timings(wide, call, structure)
    keeps = {g.name: g.num_channels // 2 for g in structure.open_groups if g.name in ("stem", "point")}
    assert len(keeps) == 2
    before, after = Costs(structure, timings).of(keeps), Costs(later, timings).of({})
    assert (before.macs, before.parameters) == (after.macs, after.parameters)
    assert before.seconds == pytest.approx(after.seconds, rel=0.02)  # single numbers that no channel carries


def test_without_a_table_seconds_are_not_known():
    net, call = mlp(4, 16, 2), call_of(5, 4)
    assert Costs(analyse(net, *call)).of({}).seconds != Costs(analyse(net, *call)).of({}).seconds


def test_nothing_that_can_shrink_still_costs_time():
    net, call = nn.Linear(4, 2), call_of(5, 4)
    structure = analyse(net, *call)
    found = measure_timings(net, call, structure)
    assert (found.curves, found.weights) == ((), {})
    assert Costs(structure, found).of({}).seconds > 0


def test_a_network_of_half_the_width_is_told_to_be_faster():
    net, call = mlp(256, 1024, 1024, 10), call_of(128, 256)
    structure = analyse(net, *call)
    costs = Costs(structure, measure_timings(net, call, structure, [torch.optim.SGD(net.parameters(), 0.1)]))
    full, half = costs.of({}).seconds, costs.of({"0": 512, "2": 512}).seconds
    assert 0.15 < half / full < 0.75  # 0.3 of the multiply-adds
    assert costs.of({"0": 512}).seconds < full


def test_a_weight_read_again_and_again_adds_up():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x):
            for _ in range(5):
                x = x + self.b(torch.relu(self.a(x)))
            return x

    net, call = Loop(), call_of(64, 8)
    structure = analyse(net, *call)
    found = recorded(net, call, structure)
    assert found.weights["b.weight"].total() == 5
    timings = measure_timings(net, call, structure)
    assert timings.curves[timings.weights["b.weight"]].macs == 5 * 64 * 8 * 32


def test_the_structure_alone_is_enough_to_ask():
    assert Costs(Structure(groups=(), macs=6.0, shapes={}), table(weights={}, per_mac=2.0)).of({}).seconds == 12.0
