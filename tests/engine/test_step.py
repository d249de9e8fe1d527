"""Reductions applied and tested: whatever fails, model and optimizer are bitwise as before."""

import pytest
import torch
from torch import nn

from apoptosis import Apoptosis, shrink_
from apoptosis.decide.acceptance import AcceptanceResult
from apoptosis.engine.applying import apply_reductions
from apoptosis.errors import ArgumentError, UnsupportedOptimizerError
from apoptosis.graph import analyse
from apoptosis.model.evaluate import make_probe
from apoptosis.records import Pin, Reduction, SiteReduction
from apoptosis.surgery.target import Target, exclude_pins, with_pins


def target_of(net, optimizers=(), example=None):
    call = ((torch.zeros(4, 6) if example is None else example,), {})
    return Target(model=net, optimizers=optimizers, averaged_models=(), call=call), analyse(net, *call)


def accepted(change):
    return AcceptanceResult(change=change)


def cut(structure, *names, keep=8):
    """Reductions that keep the first channels and let the rest go unmixed."""
    found = []
    for group in structure.groups:
        if group.name in names:
            mix = torch.zeros(keep, group.num_channels, dtype=torch.float64)
            mix[:, :keep] = torch.eye(keep)
            sites = {site.key: SiteReduction(mix=mix, offset=None) for site in group.sites}
            found.append(Reduction(group=group.name, keep=torch.arange(keep), sites=sites))
    return found


def test_a_granted_change_is_committed_and_measured(runs):
    net = runs.mlp(16)
    target, structure = target_of(net)
    seen = []
    probe = make_probe(runs.inputs(50, 1), torch.zeros(4, 6))
    outcome = apply_reductions(
        target, structure, cut(structure, "0"), {}, probe, lambda change: seen.append(accepted(change)) or seen[-1]
    )
    assert outcome.committed
    assert outcome.refused == ""
    assert [r.group for r in outcome.done] == ["0"]
    assert net[0].out_features == 8
    assert {g.name: g.num_channels for g in outcome.structure.groups}["0"] == 8
    assert outcome.result is seen[0]
    assert seen[0].change.rms > 0
    assert seen[0].change.rows == 50


@pytest.mark.parametrize("how", ["refused", "judge raises"])
def test_a_refused_change_leaves_everything_bitwise(runs, how):
    net = nn.Sequential(*runs.mlp(16), nn.Dropout(0.5))
    optimizer = runs.adam(net)
    runs.train(net, optimizer, None, steps=3)
    target, structure = target_of(net, (optimizer,))
    before = runs.everything(net, optimizer)
    probe = make_probe(runs.inputs(50, 1), torch.zeros(4, 6))

    def accept(change):
        assert net[0].out_features == 8
        if how == "refused":
            return AcceptanceResult(change=change, refused="too much")
        raise ZeroDivisionError

    if how == "refused":
        outcome = apply_reductions(target, structure, cut(structure, "0", "2"), {}, probe, accept)
        assert not outcome.committed
        assert outcome.refused == "too much"
        assert outcome.structure is structure
    else:
        with pytest.raises(ZeroDivisionError):
            apply_reductions(target, structure, cut(structure, "0", "2"), {}, probe, accept)
    assert runs.same(runs.everything(net, optimizer), before)
    assert net[0].out_features == net[2].in_features == 16


@pytest.mark.parametrize("follows", [False, True])
def test_a_number_that_the_training_loop_set_is_no_width(runs, follows):
    """It was halved since the last capture, as a hidden group is now: no weight makes up for what the user wanted."""

    class Annealed(nn.Module):
        def __init__(self):
            super().__init__()
            self.heat = 2.0
            self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))
            self.wide, self.out = nn.Linear(6, 16), nn.Linear(16, 6)

        def forward(self, x):
            scores = self.q(x) @ self.k(x).mT / self.heat
            if follows:
                scores = scores / self.out.in_features
            return self.out(torch.relu(self.wide(x))) + self.o(scores.softmax(-1) @ self.v(x))

    torch.manual_seed(0)
    net = Annealed().double()
    x = torch.randn(20, 5, 6, dtype=torch.float64)
    target, structure = target_of(net, example=x[:2])
    with torch.no_grad():
        net.out.weight[:, 8:] = 0.0
    net.heat = 1.0
    expected, queries = net(x), net.q.weight.clone()
    outcome = apply_reductions(target, structure, cut(structure, "wide"), {}, make_probe(x, x[:2]), accepted)
    assert outcome.committed
    assert outcome.pins == ()
    assert net.wide.out_features == 8
    torch.testing.assert_close(net.q.weight, queries / 2 if follows else queries, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-12)


def test_a_forward_that_breaks_on_the_probe_alone_is_rolled_back_and_pinned(runs):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            h = torch.relu(self.a(x))
            if len(x) > 10 and h.shape[1] != 16:
                raise RuntimeError("16 wanted")
            return self.c(torch.relu(self.b(h)))

    net = Odd()
    target, structure = target_of(net)
    before = {name: p.clone() for name, p in net.named_parameters()}
    probe = make_probe(runs.inputs(50, 1), torch.zeros(4, 6))
    outcome = apply_reductions(target, structure, cut(structure, "a", "b"), {}, probe, accepted)
    assert outcome.committed
    assert [r.group for r in outcome.done] == ["b"]
    assert [pin.group for pin in outcome.pins] == ["a"]
    assert "16 wanted" in outcome.pins[0].reason
    assert torch.equal(net.a.weight, before["a.weight"])
    assert net.b.out_features == 8


def test_nothing_left_to_edit(runs):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)).view(-1, 16))

    net = Fixed()
    target, structure = target_of(net)
    before = runs.everything(net)
    outcome = apply_reductions(target, structure, cut(structure, "a"), {}, None, accepted)
    assert not outcome.committed
    assert "no group can be edited" in outcome.refused
    assert [g.pin is not None for g in outcome.structure.groups] == [True, True]
    assert runs.same(runs.everything(net), before)
    assert apply_reductions(target, structure, [], {}, None, accepted).refused == "nothing to remove"


def test_state_without_a_rule_raises_before_anything_changes(runs):
    class Strange(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for p in net.parameters():
                self.state[p]["sketch"] = torch.zeros(3, 3, 3)

    net = runs.mlp(16)
    optimizer = Strange(net.parameters(), lr=0.1)
    apo = Apoptosis(net, optimizer, runs.inputs(4, 0))  # there is no state yet that could be looked at
    runs.train(net, optimizer, apo, steps=2)
    before = runs.everything(net, optimizer)
    with pytest.raises(UnsupportedOptimizerError, match="sketch"):
        shrink_(net, runs.inputs(4, 0), [runs.inputs(256, 1)], tolerance=0.2, optimizer=optimizer)
    assert runs.same(runs.everything(net, optimizer), before)


def test_an_error_in_an_event_leaves_the_run_able_to_go_on(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    calls = []

    def logits(out):
        calls.append(1)
        if len(calls) == 2:  # 1: at construction; 2: while the first event is measured
            raise ZeroDivisionError
        return out

    apo = runs.start(net, optimizer, logits=logits)
    twin = runs.mlp()
    other = runs.adam(twin)
    failed = None
    events = []
    for step in range(runs.STEPS):
        try:
            events += runs.train(net, optimizer, apo, first=step, steps=step + 1)
        except ArgumentError:  # it names the error of the function
            failed = step
            runs.train(twin, other, None, steps=step + 1)
            assert runs.same(dict(net.state_dict()), dict(twin.state_dict()))
            assert runs.same(optimizer.state_dict(), other.state_dict())
            assert runs.num_hooks(net) == 0
    assert failed is not None
    assert events


def test_exclude_patterns(runs):
    _, structure = target_of(runs.mlp(16))
    assert set(exclude_pins(structure, ["0", "[24]"])) == {"0", "2", "4"}
    with pytest.raises(ArgumentError, match="the groups are: 0, 2, 4"):
        exclude_pins(structure, ["fc*"])
    pinned = with_pins(structure, {"4": Pin(group="4", num_channels=4, reason="mine")})
    assert "output" in pinned.groups[2].pin.reason  # a group that is pinned already keeps its own reason
