"""Surgery on scores that are divided by a size: one transaction with the factor, in training and after it."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from apoptosis import Apoptosis, shrink_
from apoptosis.decide.acceptance import AcceptanceResult
from apoptosis.engine.applying import apply_reductions
from apoptosis.graph import analyse
from apoptosis.model.evaluate import make_probe
from apoptosis.records import Reduction, SiteReduction
from apoptosis.surgery.target import Target, exclude_pins, with_pins

HEADS, SIZE = 2, 6


class Net(nn.Module):
    """Attention over words, divided by the root of the size of a head; with `value`, of the values' size."""

    def __init__(self, *, value=False, bad=False):
        super().__init__()
        torch.manual_seed(0)
        self.value, self.bad = value, bad
        self.enter, self.q, self.k, self.v = nn.Linear(6, 9), nn.Linear(9, 12), nn.Linear(9, 12), nn.Linear(9, 12)
        self.o, self.up, self.out = nn.Linear(12, 9), nn.Linear(9, 16), nn.Linear(16, 4)

    def forward(self, x):
        h = self.enter(x.unflatten(-1, (-1, 6)) if x.dim() == 2 else x)
        q, k, v = (f(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) * (1.0 / math.sqrt((v if self.value else k).size(-1)))
        if self.bad:
            scores = scores.tanh() * (k.size(-1) + 1)
        h = h + self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return self.out(torch.tanh(self.up(h))).mean(1)


def accepted(change):
    return AcceptanceResult(change=change)


def data(rows, seed):
    return torch.randn(rows, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def redundant(net, *layers, num=2):
    """Make the last channels of every head multiples of the first ones."""
    with torch.no_grad():
        for layer in layers:
            for head in range(HEADS):
                for i in range(num):
                    row, other = head * SIZE + SIZE - 1 - i, head * SIZE + i
                    for tensor in (layer.weight, layer.bias):
                        tensor[row] = (1.5 + i) * tensor[other]
    return net


def target_of(net, optimizers=(), averaged_models=()):
    call = ((data(3, 9),), {})
    return Target(model=net, optimizers=optimizers, averaged_models=averaged_models, call=call), analyse(net, *call)


def cut(structure, *names, num=2):
    """Reductions that drop the last channels of every row, unmixed."""
    found = []
    for group in structure.groups:
        if group.name in names:
            length = group.num_channels // group.rows
            keep = torch.tensor([c for c in range(group.num_channels) if c % length < length - num])
            mix = torch.eye(group.num_channels, dtype=torch.float64)[keep]
            sites = {site.key: SiteReduction(mix=mix, offset=None) for site in group.sites}
            found.append(Reduction(group=group.name, keep=keep, sites=sites))
    return found


def silent(net, *layers, num=2):
    with torch.no_grad():
        for layer in layers:
            for tensor in (layer.weight, layer.bias):
                tensor.unflatten(0, (HEADS, SIZE))[:, SIZE - num :] = 0.0
    return net


@pytest.mark.parametrize("value", [False, True])
def test_planted_redundancy_goes_exactly_twice(value):
    net = Net(value=value).double()
    redundant(net, net.q, net.k, net.v)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
    net(data(8, 1)).square().sum().backward()
    optimizer.step()
    for left in (4, 3):
        before = copy.deepcopy(net)
        event = shrink_(net, data(3, 9), [data(300, 2)], tolerance=0, optimizer=optimizer)
        assert event.groups["q"][1] == event.groups["v"][1] == HEADS * left, event.notes
        assert net.q.out_features == net.k.out_features == HEADS * left
        for training in (True, False):
            with torch.no_grad():
                a, b = (m.train(training)(data(20, 3)) for m in (net, before))
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        with torch.no_grad():  # once more, in what is left
            for layer in (net.q, net.k, net.v):
                for tensor in (layer.weight, layer.bias):
                    tensor.unflatten(0, (HEADS, left))[:, -1] = 1.3 * tensor.unflatten(0, (HEADS, left))[:, 0]
    assert all(s["exp_avg"].shape == p.shape for p, s in optimizer.state.items())


def test_a_run_shrinks_while_it_trains(runs):
    net = Net().double()
    redundant(net, net.q, net.k, net.v)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    apo = runs.calibrated(Apoptosis(net, optimizer, data(3, 9), tolerance=1e-3, total_steps=60, align=1))
    events = []
    for step in range(60):
        optimizer.zero_grad()
        net(data(64, 100 + step)).square().mean().backward()
        optimizer.step()
        events += [event for event in [apo.step()] if event]
    assert any("q" in event.groups for event in events)
    assert net.q.out_features < 12
    assert not [pin for pin in apo.pins() if "uses the number" in pin.reason]


def test_averaged_copies_take_the_factor():
    net = Net().double()
    average = AveragedModel(net)
    silent(net, net.q, net.k)
    silent(average.module, average.module.q, average.module.k)
    with torch.no_grad():
        average.module.enter.weight.mul_(1.1)
    expected = [copy.deepcopy(m)(data(7, 4)) for m in (net, average)]
    target, structure = target_of(net, averaged_models=(average,))
    outcome = apply_reductions(target, structure, cut(structure, "q"), {}, None, accepted)
    assert outcome.committed
    assert net.q.out_features == average.module.q.weight.shape[0] == 8
    for m, before in zip((net, average), expected, strict=True):
        torch.testing.assert_close(m(data(7, 4)), before, rtol=1e-10, atol=1e-12)


def test_a_refused_change_takes_the_factor_back(runs):
    net = Net().double()
    optimizer = torch.optim.Adam(net.parameters())
    net(data(8, 1)).square().sum().backward()
    optimizer.step()
    target, structure = target_of(net, (optimizer,))
    before = runs.everything(net, optimizer)
    probe = make_probe(data(20, 5), data(3, 9))
    outcome = apply_reductions(
        target, structure, cut(structure, "q"), {}, probe, lambda change: AcceptanceResult(change=change, refused="no")
    )
    assert (outcome.committed, outcome.refused) == (False, "no")
    assert outcome.result is not None
    assert runs.same(runs.everything(net, optimizer), before)


def test_another_number_at_the_same_time_is_refused_and_pinned(runs):
    net = Net(bad=True).double()
    target, structure = target_of(net)
    before = runs.everything(net)
    outcome = apply_reductions(target, structure, cut(structure, "q"), {}, None, accepted)
    assert not outcome.committed
    (pin,) = outcome.pins
    assert pin.group == "q"
    assert "uses the number" in pin.reason
    assert "test_step_scores.py:" in pin.reason
    assert runs.same(runs.everything(net), before)
    outcome = apply_reductions(target, structure, cut(structure, "q", "up"), {}, None, accepted)
    assert [r.group for r in outcome.done] == ["up"]
    assert torch.equal(net.q.weight, before["tensors"]["q.weight"])


def test_weights_that_are_left_out_are_not_scaled():
    net = Net(value=True).double()
    target, structure = target_of(net)
    structure = with_pins(structure, exclude_pins(structure, ["q"]))
    weight = net.q.weight.detach().clone()
    outcome = apply_reductions(target, structure, cut(structure, "v"), {}, None, accepted)
    assert not outcome.committed
    assert "left out by exclude= could make up for" in outcome.refused
    assert torch.equal(net.q.weight, weight)


def test_a_number_that_the_training_loop_sets_is_looked_at_again():
    net = Net().double()
    silent(net, net.q, net.k)
    temperature = [1.0]
    net.o.register_forward_hook(lambda module, args, output: output * temperature[0])
    target, structure = target_of(net)
    temperature[0] = 0.5
    expected = net(data(7, 4)).detach()
    outcome = apply_reductions(target, structure, cut(structure, "q"), {}, None, accepted)
    assert outcome.committed
    torch.testing.assert_close(net(data(7, 4)).detach(), expected, rtol=1e-10, atol=1e-12)
