"""Momentum encoders and target networks inside the model: what they average stays, by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from apoptosis import Apoptosis


def encoder():
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 8))


class Momentum(nn.Module):
    """Two encoders, one of which is an average of the other (MoCo, BYOL), and a head of its own."""

    def __init__(self, runs_copy):
        super().__init__()
        self.query = encoder()
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        self.runs_copy = runs_copy

    def forward(self, x):
        y = self.head(self.query(x))
        if self.runs_copy:
            with torch.no_grad():
                target = self.key(x).mean(1, keepdim=True)
            y = y + target
        return y

    @torch.no_grad()
    def update(self):
        for k, q in zip(self.key.parameters(), self.query.parameters(), strict=True):
            k.mul_(0.9).add_(q, alpha=0.1)


@pytest.mark.parametrize("runs_copy", [True, False])
def test_what_a_momentum_encoder_follows_stays_and_training_goes_on(runs_copy):
    torch.manual_seed(0)
    net = Momentum(runs_copy)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    apo = Apoptosis(net, optimizer, torch.zeros(2, 6), tolerance=0.1, total_steps=60, align=1, calibration=1.0)
    assert [group.name for group in apo.groups()] == ["head.0"]
    pin = next(pin for pin in apo.pins() if pin.group == "query.0")
    assert "'query.0.weight' is followed by the frozen copy 'key'" in str(pin) or "'query.0.bias'" in str(pin)
    assert "apo.follow(copy)" in str(pin)
    events = 0
    for _ in range(60):
        x = torch.randn(128, 6)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()
        net.update()
        events += bool(apo.step())
    assert events
    assert net.query[0].out_features == 32 > net.head[0].out_features


def test_layers_that_were_trained_apart_are_no_averages():
    """A stack of like layers, the first of which is frozen for fine-tuning."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
                        nn.Linear(32, 2))  # fmt: skip
    net[2].requires_grad_(False)
    apo = Apoptosis(net, torch.optim.SGD(net.parameters(), 0.1), torch.zeros(2, 6), total_steps=60)
    assert [group.name for group in apo.groups()] == ["4"]


class InBuffers(nn.Module):
    """An average whose tensors are buffers under names of their own."""

    def __init__(self, net):
        super().__init__()
        for name, p in net.named_parameters():
            self.register_buffer(name.replace(".", ""), p.detach().clone())

    def update(self, net):
        for name, p in net.named_parameters():
            getattr(self, name.replace(".", "")).lerp_(p.detach(), 0.1)


class InModule(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.copy = AveragedModel(net)

    def update(self, net):
        self.copy.update_parameters(net)


class InDictionary(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.old = {"weights": [p.detach().clone() for p in net.parameters()]}

    def update(self, net):
        for old, p in zip(self.old["weights"], net.parameters(), strict=True):
            old.lerp_(p.detach(), 0.1)


class Held(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.head = encoder(), nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        self.average = kind(self.body)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (InBuffers, "'body.0.weight' has a copy in the buffer 'average.0weight'"),
        (InModule, "is followed by the unread copy 'average.copy.module'"),
        (InDictionary, "'body.0.weight' has a copy in the attribute 'average.old'"),
    ],
)
def test_what_an_unread_copy_inside_the_model_is_of_stays_and_training_goes_on(kind, reason):
    torch.manual_seed(0)
    net = Held(kind)
    optimizer = torch.optim.Adam([*net.body.parameters(), *net.head.parameters()], 1e-2)
    apo = Apoptosis(net, optimizer, torch.zeros(2, 6), tolerance=0.1, total_steps=60, align=1, calibration=1.0)
    assert [group.name for group in apo.groups()] == ["head.0"]
    assert reason in str(next(pin for pin in apo.pins() if pin.group == "body.0"))
    events = 0
    for _ in range(60):
        x = torch.randn(128, 6)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()
        net.average.update(net.body)
        events += bool(apo.step())
    assert events
    assert net.body[0].out_features == 32 > net.head[0].out_features
    loose = Apoptosis(net, optimizer, torch.zeros(2, 6), total_steps=60, frozen="cut")
    assert "body.0" in [group.name for group in loose.groups()]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("computes", [nn.utils.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.2)])
def test_a_weight_that_hooks_compute_is_no_copy(computes):
    net = encoder()
    computes(net[0])
    net.eval()(torch.zeros(2, 6))
    apo = Apoptosis(net.train(), torch.optim.SGD(net.parameters(), 0.1), torch.zeros(2, 6), total_steps=60)
    assert [group.name for group in apo.groups()] == ["0"]
