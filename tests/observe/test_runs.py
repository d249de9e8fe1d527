"""Whole runs on networks with sites that only a second run of a pass shows: events, resumption, one-shot surgery."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import apoptosis
from apoptosis import shrink_

HEADS, SIZE, SHAPE = 3, 4, (5, 6)


class Attention(nn.Module):
    """Attention by hand with a functional consumer behind it."""

    def __init__(self, shared=1):
        super().__init__()
        torch.manual_seed(0)
        self.shared, keys = shared, HEADS // shared * SIZE
        self.q, self.k = nn.Linear(6, HEADS * SIZE), nn.Linear(6, keys)
        self.v, self.o = nn.Linear(6, keys), nn.Linear(HEADS * SIZE, 6)
        self.up, self.down = nn.Linear(6, 8), nn.Parameter(torch.randn(4, 8) / 3)
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        q = self.q(x).view(*x.shape[:2], HEADS, -1).transpose(1, 2)
        k, v = (f(x).view(*x.shape[:2], HEADS // self.shared, -1).transpose(1, 2) for f in (self.k, self.v))
        k, v = k.repeat_interleave(self.shared, 1), v.repeat_interleave(self.shared, 1)
        mixed = (q @ k.transpose(-1, -2) / SIZE**0.5).softmax(-1) @ v
        h = torch.tanh(self.up(self.o(mixed.transpose(1, 2).flatten(2)).mean(1)))
        return functional.linear(self.drop(h), self.down)


def planted(shared=1):
    """Half of the queries of every head follow the other half; a quarter of the hidden units are copies."""
    net = Attention(shared)
    with torch.no_grad():
        for leaf in (net.q.weight, net.q.bias):
            for head in range(HEADS):
                row = head * SIZE
                leaf[row + 2 : row + 4] = 2.0 * leaf[row : row + 2]
        for leaf in (net.up.weight, net.up.bias):
            leaf[6:] = leaf[:2]
    return net


@pytest.mark.parametrize("shared", [1, 3])
def test_one_surgery_finds_what_was_planted_and_changes_no_output(runs, shared):
    net = planted(shared).double().eval()
    x = runs.inputs(300, 3, SHAPE).double()
    before = net(x).detach()
    event = shrink_(net, x[:2], [x], tolerance=0.0)
    channels = HEADS // shared * SIZE
    assert event.groups["q"] == (channels, channels // 2)
    assert event.groups["up"] == (8, 6)
    assert torch.allclose(net(x), before, rtol=0, atol=1e-10)
    assert any("scores" in certificate.note for certificate in event.certificates)
    assert not shrink_(net, x[:2], [x], tolerance=0.0)


def train(runs, net, apo, optimizer, first, last):
    events = []
    for step in range(first, last):
        torch.manual_seed(step)  # dropout's
        x = runs.inputs(32, step, SHAPE)
        loss = (net(x) - x[:, 0, :4]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if event := apo.step():
            events.append((step, event.groups))
    return events


def started(runs, net):
    optimizer = torch.optim.SGD(net.parameters(), 1e-4)  # so slow that what was planted stays
    return optimizer, runs.start(net, optimizer, runs.inputs(2, 0, SHAPE), tolerance=0.02, total_steps=100)


def test_a_run_shrinks_and_resumes_exactly_in_the_middle_of_a_window(runs, tmp_path):
    whole = planted()
    optimizer, apo = started(runs, whole)
    events = train(runs, whole, apo, optimizer, 0, 100)
    assert events[0][1]["q"] == (HEADS * SIZE, HEADS * SIZE // 2)
    assert events[0][1]["up"] == (8, 6)
    assert 0.0 < apo.hook_seconds < apo.seconds
    assert runs.num_hooks(whole) == 0
    stop = events[0][0] - 3
    half = planted()
    optimizer, apo = started(runs, half)
    train(runs, half, apo, optimizer, 0, stop)
    assert runs.num_hooks(half) > 0  # a window is open
    apoptosis.save(tmp_path / "run.safetensors", half, optimizer, apo)
    fresh = planted()
    optimizer, apo = started(runs, fresh)
    apoptosis.load(tmp_path / "run.safetensors", fresh, optimizer, apo)
    assert train(runs, fresh, apo, optimizer, stop, 100) == events
    assert runs.same(dict(fresh.state_dict()), dict(whole.state_dict()))


def test_a_run_without_events_is_the_run_without_apoptosis(runs):
    def weights(tolerance):
        net = Attention()
        optimizer = torch.optim.SGD(net.parameters(), 1e-4)
        apo = runs.start(net, optimizer, runs.inputs(2, 0, SHAPE), tolerance=tolerance, total_steps=100)
        if tolerance is None:
            apo.close()
        assert train(runs, net, apo, optimizer, 0, 40) == []
        assert (apo.hook_seconds > 0.0) == (tolerance is not None)
        return dict(net.state_dict())

    assert runs.same(weights(0.0), weights(None))


class Auxiliary(nn.Module):
    """A head that runs in training mode only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.inner, self.outer = nn.Linear(8, 10), nn.Linear(10, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        h = torch.tanh(self.norm(self.body(x)))
        return (self.head(h), self.outer(self.drop(torch.tanh(self.inner(h))))) if self.training else self.head(h)


def test_what_runs_in_training_mode_only_is_seen_there(runs):
    net = Auxiliary().double()
    with torch.no_grad():
        for layer, count in ((net.body, 2), (net.inner, 3)):
            for leaf in (layer.weight, layer.bias):
                leaf[-count:] = leaf[:count]
    net.drop.p = 0.0
    x = runs.inputs(300, 3).double()
    net.train()
    before = [y.detach() for y in net(x)]
    kept = {name: value.clone() for name, value in net.named_buffers()}
    net.drop.p = 0.5
    event = shrink_(net, x[:4], [x[:150], x[150:]], tolerance=0.0)
    assert event.groups == {"body": (8, 6), "inner": (10, 7)}
    assert net.drop.training
    net.drop.p = 0.0
    assert all(torch.equal(kept[name][: len(value)] if value.dim() else kept[name], value)
               for name, value in net.named_buffers())  # fmt: skip
    for old, new in zip(before, net(x), strict=True):
        assert torch.allclose(old, new, rtol=0, atol=1e-9)


def test_a_batch_that_cannot_be_trained_on_leaves_the_rest_as_it_is(runs):
    net = Auxiliary().double()
    with torch.no_grad():
        for leaf in (net.inner.weight, net.inner.bias):
            leaf[7:] = leaf[:3]
    event = shrink_(net, runs.inputs(4, 0).double(), [runs.inputs(1, 1).double()], tolerance=0.0)
    assert not event
    assert any(note.startswith("inner: not observed") for note in event.notes)
