"""Other networks in the loop: several inputs and outputs, sharing, convolutions of all sorts, checkpointing."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine.loops import finish, loop


class TwoByTwo(nn.Module):
    """Two inputs, two outputs, a residual, a module used twice, a tied weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(6, 24), nn.Linear(6, 24)
        self.shared = nn.Linear(24, 24)
        self.mix, self.out, self.score = nn.Linear(48, 16), nn.Linear(16, 4), nn.Linear(16, 1)

    def forward(self, a, b, scale=1.0):
        p, q = torch.relu(self.left(a)), torch.relu(self.right(b))
        p, q = p + torch.relu(self.shared(p)), q + torch.relu(self.shared(q))
        h = torch.relu(self.mix(torch.cat([p, q], 1)))
        return {"logits": self.out(h) * scale, "score": self.score(h)}


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_several_inputs_and_outputs(runs, form):
    net = TwoByTwo()
    optimizer = runs.adam(net)

    def call(rows, seed):
        a, b = runs.inputs(rows, seed), runs.inputs(rows, seed + 1000)
        return (a, b) if form == "tuple" else {"b": b, "a": a, "scale": 2.0}

    apo = runs.start(net, optimizer, call(4, 1))

    def step(number):
        given = call(runs.BATCH, number)
        out = net(*given) if form == "tuple" else net(**given)
        a = given[0] if form == "tuple" else given["a"]
        loss = nn.functional.cross_entropy(out["logits"], runs.labels(a)) + out["score"].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return apo.step()

    events = loop(runs, net, optimizer, apo, step)
    finish(net, apo, events, optimizer)
    for event in events:
        for c in event.certificates:  # the concatenation's one site stays within one tolerance
            assert c.kind != "empirical" or c.value <= event.tolerance * (1 + 1e-9)


def convolutional():
    yield "groups", nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ), (2, 6, 6)  # fmt: skip
    yield "depthwise", nn.Sequential(
        nn.Conv2d(2, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 12, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12 * 9, 4),
    ), (2, 6, 6)  # fmt: skip
    yield "transposed", nn.Sequential(
        nn.Conv2d(2, 16, 3, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 12, 2, stride=2), nn.Tanh(),
        nn.Dropout2d(0.1), nn.Conv2d(12, 4, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
    ), (2, 6, 6)  # fmt: skip
    yield "conv1d", nn.Sequential(
        nn.Conv1d(2, 16, 3), nn.BatchNorm1d(16), nn.GELU(), nn.Conv1d(16, 16, 3, padding=2), nn.ELU(),
        nn.MaxPool1d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16 * 4, 4),
    ), (2, 9)  # fmt: skip
    yield "conv3d", nn.Sequential(
        nn.Conv3d(1, 12, 2), nn.ReLU(), nn.Conv3d(12, 8, 2), nn.BatchNorm3d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 8, 4),
    ), (1, 4, 4, 4)  # fmt: skip
    yield "vgg head", nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(16 * 9, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4),
    ), (2, 6, 6)  # fmt: skip


with torch.random.fork_rng():
    torch.manual_seed(0)
    CONVOLUTIONAL = {name: (net, shape) for name, net, shape in convolutional()}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutional_networks(runs, name):
    net, shape = copy.deepcopy(CONVOLUTIONAL[name])
    with torch.no_grad():  # pairs of channels start alike, and hardly part in a few small steps
        for module in (net[0], *([net[2]] if name == "depthwise" else [])):
            module.weight[1::2] = module.weight[::2]
            module.bias[1::2] = module.bias[::2]
    torch.manual_seed(2)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    apo = runs.start(net, optimizer, runs.inputs(4, 1, shape), tolerance=0.02)
    width = net[0].out_channels
    events = runs.train(net, optimizer, apo, steps=30, shape=shape)
    finish(net, apo, events, optimizer)
    assert net[0].out_channels <= width // 2
    assert all(c.value <= event.tolerance * (1 + 1e-6) for event in events for c in event.certificates
               if c.kind == "empirical")  # fmt: skip


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in passes without gradients
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(runs, reentrant):
    class Segments(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = runs.mlp()

        def forward(self, x):
            h = self.body[:2](x)
            h = checkpoint(self.body[2:4], h, use_reentrant=reentrant)
            return self.body[4](h)

    net, plain = Segments(), runs.mlp()
    optimizer, other = runs.adam(net), runs.adam(plain)
    apo, twin = runs.start(net, optimizer), runs.start(plain, other)
    events, expected = runs.train(net, optimizer, apo), runs.train(plain, other, twin)
    finish(net, apo, events, optimizer)
    assert [list(e.groups.values()) for e in events] == [list(e.groups.values()) for e in expected]
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
