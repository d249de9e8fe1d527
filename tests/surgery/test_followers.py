"""Averages of several libraries and of none: objects that hold a copy, dicts by name, lists in order."""

import copy
import types

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from apoptosis import Apoptosis
from apoptosis.errors import ArgumentError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv1d(3, 32, 3), nn.BatchNorm1d(32), nn.Linear(32 * 6, 32)
        self.fixed, self.head = nn.Linear(32, 32), nn.Linear(32, 2)
        self.fixed.bias.requires_grad_(False)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).flatten(1)
        return self.head(torch.tanh(self.fixed(torch.relu(self.fc(x)))))


class Held(nn.Module):
    """As ema_pytorch's EMA: a copy, and buffers of its own."""

    def __init__(self, net):
        super().__init__()
        self.ema_model = copy.deepcopy(net).requires_grad_(False)
        self.register_buffer("step", torch.tensor(0))


def by_name(net):
    average = {name: x.detach().clone() for name, x in net.state_dict().items()}

    def update():  # with new tensors
        for name, x in net.state_dict().items():
            average[name] = torch.lerp(average[name].float(), x.float(), 0.5)

    return average, update, lambda: average


def in_order(trained):
    def build(net):
        chosen = [(n, p) for n, p in net.named_parameters() if p.requires_grad or not trained]
        average = [p.detach().clone() for _, p in chosen]

        def update():
            for x, (_, p) in zip(average, chosen, strict=True):
                x.lerp_(p.detach(), 0.5)

        return average, update, lambda: {n: x for (n, _), x in zip(chosen, average, strict=True)}

    return build


def shadow(net):
    average, update, named = in_order(True)(net)
    return types.SimpleNamespace(shadow_params=average, decay=0.5), update, named


def holder(net):
    average = Held(net)

    def update():
        for x, p in zip(average.ema_model.parameters(), net.parameters(), strict=True):
            x.lerp_(p.detach(), 0.5)

    return average, update, lambda: dict(average.ema_model.named_parameters())


@pytest.mark.parametrize("kind", [by_name, in_order(False), in_order(True), shadow, holder])
def test_it_has_the_shapes_of_the_model_and_the_values_of_its_own(kind):
    torch.manual_seed(0)
    net = Net()
    average, update, named = kind(net)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    apo = Apoptosis(net, optimizer, torch.zeros(2, 3, 8), tolerance=0.2, total_steps=40, align=1, calibration=0.0)
    apo.follow(average)
    twin = copy.deepcopy(net)
    apo.follow(twin)
    events = 0
    for _ in range(40):
        x = torch.randn(64, 3, 8)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), (x[:, 0, 0] > 0).long()).backward()
        optimizer.step()
        update()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.copy_(named().get(name, net.get_parameter(name)))
        if apo.step():
            events += 1
            held = dict(twin.named_parameters())
            assert all(torch.equal(t, held[name]) for name, t in named().items() if name in held)
            assert {name: t.shape for name, t in held.items()} == {n: p.shape for n, p in net.named_parameters()}
    assert events


def test_what_cannot_follow_is_named():
    net = Net()
    apo = Apoptosis(net, torch.optim.SGD(net.parameters(), 0.1), torch.zeros(2, 3, 8), total_steps=40)
    tensors = [p.detach().clone() for p in net.parameters()]
    for wrong, text in [
        (None, "an averaged copy is an AveragedModel"),
        ({}, "an averaged copy is an AveragedModel"),
        ({"a": torch.ones(2)}, "holds none of the model's tensors"),
        (tensors[:-1], "list of 9 tensors, but the model has 10 parameters|no copy of the model"),
        ([*tensors[:-1], torch.zeros(7)], r"'head.bias' has shape \(7,\) instead of \(2,\)"),
        ({"fc.weight": torch.zeros(3, 3)}, "'fc.weight' has shape"),
        (types.SimpleNamespace(shadow_params=[1, 2]), "an averaged copy is an AveragedModel"),
        (nn.Linear(2, 2), "is no copy of the model"),
    ]:
        with pytest.raises(ArgumentError, match=text):
            apo.follow(wrong)


def opened(net, *followers):
    apo = Apoptosis(net, torch.optim.SGD(net.parameters(), 0.1), torch.zeros(2, 3, 8), total_steps=40)
    for follower in followers:
        apo.follow(follower)
    while not apo.watching:
        apo.step()
    apo.close()


def test_an_average_that_nobody_registered_is_told_before_the_first_event():
    torch.manual_seed(0)
    net, other = Net(), Net()
    average = AveragedModel(net)
    opened(net, average)
    opened(other)
    with pytest.warns(RuntimeWarning, match=r"an AveragedModel averages this model and does not shrink.*apo.follow"):
        opened(net)
    average.module.conv = nn.Conv1d(3, 8, 3)
    opened(net)
