"""Networks that keep tensors in attributes between passes: hidden states, membrane potentials, caches, memories."""

from __future__ import annotations

import copy
import dataclasses
from collections import deque

import pytest
import torch
from torch import nn

from apoptosis import Apoptosis, load, save, shrink_
from apoptosis.decide.acceptance import AcceptanceResult
from apoptosis.engine.applying import apply_reductions
from apoptosis.errors import CaptureError
from apoptosis.graph import analyse
from apoptosis.model.evaluate import as_probe
from apoptosis.records import Reduction, SiteReduction
from apoptosis.surgery.target import Target

ROWS = 24


class Net(nn.Module):
    """Keeps something of the last pass; `stateless` forgets it before every pass."""

    example: tuple[int, ...] = (ROWS, 5)
    rows = 0  # the axis of the input that counts examples

    def __init__(self, *, stateless=False):
        super().__init__()
        self.stateless = stateless
        self.build()
        self.reset()

    def build(self):
        self.first, self.back, self.last = nn.Linear(5, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 3)

    def reset(self):
        self.hidden = None

    def forward(self, x):
        if self.stateless:
            self.reset()
        return self.run(x)


class Elman(Net):
    example = (ROWS, 4, 5)

    def run(self, x):
        h = torch.zeros(x.shape[0], self.first.out_features, dtype=x.dtype) if self.hidden is None else self.hidden
        outs, h = [], h.detach()  # truncated back-propagation through time
        for t in range(x.shape[1]):
            h = torch.tanh(self.first(x[:, t]) + self.back(h))
            outs.append(self.last(h))
        self.hidden = h
        return torch.stack(outs, 1)


class GRU(Elman):
    def build(self):
        self.gates, self.last = nn.ModuleList(nn.Linear(5, 16) for _ in range(3)), nn.Linear(16, 3)
        self.backs = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def run(self, x):
        h = x.new_zeros(x.shape[0], self.gates[0].out_features) if self.hidden is None else self.hidden.detach()
        outs = []
        for step in x.unbind(1):
            r, z = (torch.sigmoid(self.gates[i](step) + self.backs[i](h)) for i in (0, 1))
            n = torch.tanh(self.gates[2](step) + r * self.backs[2](h))
            h = (1 - z) * n + z * h
            outs.append(self.last(h))
        self.hidden = h
        return torch.stack(outs, 1)


class StackedLSTM(Net):
    example = (ROWS, 4, 5)

    def build(self):
        self.lstm, self.last = nn.LSTM(5, 16, num_layers=2, batch_first=True), nn.Linear(16, 3)

    def run(self, x):
        y, hidden = self.lstm(x, self.hidden)
        self.hidden = tuple(h.detach() for h in hidden)
        return self.last(y)


class TimeFirstGRU(Net):
    example, rows = (4, ROWS, 5), 1

    def build(self):
        self.gru, self.last = nn.GRU(5, 16), nn.Linear(16, 3)

    def run(self, x):
        y, self.hidden = self.gru(x, None if self.hidden is None else self.hidden.detach())
        return self.last(y)


class Cells(Net):
    """A list of states, one a layer."""

    def build(self):
        self.cells, self.last = nn.ModuleList((nn.LSTMCell(5, 16), nn.LSTMCell(16, 12))), nn.Linear(12, 3)

    def reset(self):
        self.states = [None, None]

    def run(self, x):
        for i, cell in enumerate(self.cells):
            state = self.states[i]
            h, c = cell(x, None if state is None else tuple(s.detach() for s in state))
            self.states[i], x = (h, c), h
        return self.last(x)


class InDict(Net):
    def reset(self):
        self.state = {}

    def run(self, x):
        h = self.first(x)
        if "h" in self.state:
            h = h + self.back(self.state["h"])
        self.state["h"] = torch.tanh(h).detach()
        return self.last(torch.tanh(h))


@dataclasses.dataclass(frozen=True)
class StorageMap:
    value: torch.Tensor
    steps: int


class InDataclass(Net):
    def run(self, x):
        h = self.first(x)
        if self.hidden is not None:
            h = h + self.back(self.hidden.value)
        self.hidden = StorageMap(torch.tanh(h).detach(), 1)
        return self.last(torch.tanh(h))


class Leaky(nn.Module):
    def __init__(self):
        super().__init__()
        self.mem = None

    def forward(self, x):
        before = torch.zeros_like(x) if self.mem is None else self.mem.detach()
        mem = 0.8 * before + x
        spike = torch.sigmoid(8 * (mem - 1))
        self.mem = mem - spike.detach()
        return spike


class Spiking(Net):
    def build(self):
        self.net = nn.Sequential(nn.Linear(5, 16), Leaky(), nn.Linear(16, 12), Leaky(), nn.Linear(12, 3))

    def reset(self):
        self.net[1].mem = self.net[3].mem = None

    def run(self, x):
        return self.net(x)


class SpikingConv(Spiking):
    example = (ROWS, 2, 6, 6)

    def build(self):
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
        self.net = nn.Sequential(nn.Conv2d(2, 8, 3), Leaky(), nn.Conv2d(8, 8, 3), Leaky(), *head)


class StreamingConv(Net):
    """A causal convolution that keeps the last inputs of its window, laid out before the first pass."""

    example = (ROWS, 5, 7)

    def build(self):
        self.first, self.conv, self.last = nn.Conv1d(5, 16, 1), nn.Conv1d(16, 8, 3), nn.Conv1d(8, 3, 1)

    def reset(self):
        self.cache = None

    def run(self, x):
        y = torch.relu(self.first(x))
        before = (
            torch.zeros(x.shape[0], self.first.out_channels, 2, dtype=x.dtype) if self.cache is None else self.cache
        )
        y = torch.cat((before, y), -1)
        self.cache = y[..., -2:].detach()
        return self.last(torch.relu(self.conv(y)))


class StepwiseConv(StreamingConv):
    """One step at a time: the window is filled over several passes, in place."""

    example = (ROWS, 5, 1)

    def run(self, x):
        y = torch.relu(self.first(x))
        if self.cache is None:
            self.cache = torch.zeros(x.shape[0], self.first.out_channels, 3, dtype=x.dtype)
        self.cache = torch.roll(self.cache, -1, -1)
        self.cache[..., -1:] = y.detach()
        return self.last(torch.relu(self.conv(torch.cat((self.cache[..., :-1], y), -1))))


class Delayed(Net):
    """Reads what the last three passes left."""

    def reset(self):
        self.past = deque(maxlen=3)

    def run(self, x):
        h = self.first(x)
        for before in self.past:
            h = h + self.back(before)
        h = torch.tanh(h)
        self.past.append(h.detach())
        return self.last(h)


class Buffer(Net):
    def reset(self):
        if "hidden" in self._buffers:
            self.hidden = self.hidden.new_zeros(self.hidden.shape)
        else:
            self.register_buffer("hidden", torch.zeros(ROWS, 16, dtype=torch.float64), persistent=False)

    def run(self, x):
        h = torch.tanh(self.first(x) + self.back(self.hidden.to(x.dtype)))
        self.hidden = h.detach()
        return self.last(h)


class BufferInPlace(Buffer):
    def run(self, x):
        h = torch.tanh(self.first(x) + self.back(self.hidden.clone()))
        with torch.no_grad():
            self.hidden.copy_(h)
        return self.last(h)


class OneExample(StackedLSTM):
    example = (1, 4, 5)

    def build(self):
        self.lstm, self.last = nn.LSTM(5, 16, batch_first=True, bidirectional=True), nn.Linear(32, 3)


class ConvLSTM(Net):
    example = (ROWS, 2, 5, 5)

    def build(self):
        self.gates, self.last = nn.Conv2d(2 + 8, 32, 3, padding=1), nn.Conv2d(8, 3, 1)

    def run(self, x):
        if self.hidden is None:
            self.hidden = (x.new_zeros(x.shape[0], self.last.in_channels, *x.shape[2:]),) * 2
        h, c = (s.detach() for s in self.hidden)
        i, f, o, g = self.gates(torch.cat((x, h), 1)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        self.hidden = torch.sigmoid(o) * torch.tanh(c), c
        return self.last(self.hidden[0])


class Flattened(Net):
    """Several positions of each channel side by side."""

    example = (ROWS, 2, 5, 5)

    def build(self):
        self.conv, self.last = nn.Conv2d(2, 8, 3), nn.Linear(72, 3)

    def run(self, x):
        y = torch.relu(self.conv(x)).flatten(1)
        y = y if self.hidden is None else y + 0.5 * self.hidden
        self.hidden = y.detach()
        return self.last(y)


class SideBySide(Net):
    """Two states in one tensor."""

    def run(self, x):
        width = self.first.out_features
        h, c = (x.new_zeros(len(x), 2 * width) if self.hidden is None else self.hidden).chunk(2, 1)
        c = 0.5 * c + torch.tanh(self.first(x) + self.back(h))
        self.hidden = torch.cat((torch.relu(c), c), 1).detach()
        return self.last(torch.relu(c))


class KeyValueCache(Net):
    """Attention over the last few positions; scores are divided by the root of a head's size."""

    example = (ROWS, 3, 8)

    def build(self):
        self.q, self.k, self.v = (nn.Linear(8, 16) for _ in range(3))
        self.out, self.last = nn.Linear(16, 8), nn.Linear(8, 3)

    def reset(self):
        self.cache = None

    def run(self, x):
        q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.cache is not None:
            k, v = (torch.cat(both, 2) for both in zip(self.cache, (k, v), strict=True))
        self.cache = k[:, :, -5:].detach(), v[:, :, -5:].detach()
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.last(torch.relu(self.out(y.transpose(1, 2).flatten(2))))


class SizedBuffers(Spiking):
    """Buffers that are empty before the first pass, and begin anew for a batch of another size."""

    def build(self):
        super().build()
        self.net[1], self.net[3] = SizedBuffer(), SizedBuffer()

    def reset(self):
        self.net[1].mem = self.net[3].mem = torch.zeros(0)


class SizedBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mem", torch.zeros(0), persistent=False)

    def forward(self, x):
        before = self.mem if self.mem.shape == x.shape else torch.zeros_like(x)
        mem = 0.8 * before + x
        spike = torch.sigmoid(8 * (mem - 1))
        self.mem = (mem - spike).detach()
        return spike


class Memories(Spiking):
    """Keeps what it remembers in a dict of its own, behind attributes; a plain number before the first pass."""

    def build(self):
        super().build()
        self.net[1], self.net[3] = Remembering(), Remembering()

    def reset(self):
        self.net[1].v = self.net[3].v = 0.0


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.state = {"v": 0.0}

    def __getattr__(self, name):
        state = self.__dict__.get("state", {})
        return state[name] if name in state else super().__getattr__(name)

    def __setattr__(self, name, value):
        state = self.__dict__.get("state", {})
        state.__setitem__(name, value) if name in state else super().__setattr__(name, value)

    def forward(self, x):
        self.v = self.v + (x - self.v) / 2
        spike = torch.sigmoid(4 * (self.v - 1))
        self.v = self.v.detach() * (1 - spike.detach())
        return spike


class RunningBuffer(Net):
    """A memory without a row for each example."""

    def reset(self):
        self.register_buffer("hidden", torch.zeros(self.first.out_features, dtype=torch.float64))

    def run(self, x):
        h = torch.relu(self.first(x))
        out = self.last(h + self.back(h * 0) + self.hidden)
        self.hidden = 0.9 * self.hidden + 0.1 * h.detach().mean(0)
        return out


RESETS = (Elman, GRU, StackedLSTM, TimeFirstGRU, Cells, InDict, InDataclass, Spiking, SpikingConv, StreamingConv)
MORE = (OneExample, ConvLSTM, Flattened, SideBySide, KeyValueCache, SizedBuffers, Memories)
KINDS = (*RESETS, *MORE, StepwiseConv, Delayed, Buffer, BufferInPlace, RunningBuffer)


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def inputs(kind, rows=None):
    shape = list(kind.example)
    shape[kind.rows] = rows or shape[kind.rows]
    return torch.randn(shape)


def widths(structure):
    return {g.name: (g.num_channels, g.pin is None) for g in structure.groups}


def plant_(net, structure):
    """Make the second channel of every row of every open group a copy of the first."""
    tensors = dict(net.named_parameters()) | dict(net.named_buffers())
    with torch.no_grad():
        for group in structure.groups:
            for member in group.members if group.pin is None and ":heads" not in group.name else ():
                along, row = tensors[member.tensor].movedim(member.dim, 0), group.num_channels // group.rows
                for first in range(0, group.num_channels, row):
                    at, copy_at = (torch.from_numpy(member.positions[place]) for place in (first, first + 1))
                    along[copy_at] = along[at].clone()
    return [group.name for group in structure.groups if group.pin is None and ":heads" not in group.name]


def planted(kind, passes=3):
    """A network with a copy in every open group, in mid-sequence."""
    net = kind()
    names = plant_(net, analyse(net, (inputs(kind),)))
    for _ in range(passes):
        net(inputs(kind))
    return net, names


def kept(net):
    """What a network keeps, as tensors in a fixed order."""
    found, todo = [], [(n, v) for m in net.modules() for n, v in vars(m).items() if n in
                       ("hidden", "states", "state", "mem", "cache", "past")]  # fmt: skip
    todo += [(n, b) for n, b in net.named_buffers()]
    while todo:
        name, item = todo.pop()
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, list | tuple | deque):
            todo.extend((name, part) for part in item)
        elif isinstance(item, dict):
            todo.extend(item.items())
        elif isinstance(item, StorageMap):
            todo.append((name, item.value))
    return found


def twin(net):
    """A copy; what is kept with a graph behind it cannot be copied by itself."""
    return copy.deepcopy(net, {id(t): t.detach().clone() for t in kept(net) if not t.is_leaf})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passes", [0, 4])
def test_as_much_may_shrink_as_without_a_state(kind, passes):
    net, stateless = kind(), kind(stateless=True)
    for _ in range(passes):
        net(inputs(kind))
    found, plain = analyse(net, (inputs(kind),)), analyse(stateless, (inputs(kind),))
    open_now = {name for name, (_, is_open) in widths(found).items() if is_open}
    assert open_now
    assert open_now >= {name for name, (_, is_open) in widths(plain).items() if is_open}
    assert found.macs == analyse(net, (inputs(kind),)).macs
    assert not [g.name for g in found.groups if g.pin is not None and "output" not in g.pin.reason]


@pytest.mark.parametrize("kind", KINDS)
def test_copies_go_and_the_sequence_goes_on_as_it_would_have(kind):
    net, names = planted(kind)
    dense = twin(net)
    event = shrink_(net, inputs(kind), [inputs(kind) for _ in range(12)], tolerance=0.0)
    assert set(event.groups) == set(names), event.notes
    for _ in range(3):
        x = inputs(kind)
        torch.testing.assert_close(net(x), dense(x), rtol=1e-9, atol=1e-10)
    assert all(a.shape == b.shape or a.numel() < b.numel() for a, b in zip(kept(net), kept(dense), strict=True))


@pytest.mark.parametrize("kind", [k for k in KINDS if k is not OneExample])  # whose windows wait for rows
def test_training_goes_on_in_mid_sequence(kind):
    net, names = planted(kind, passes=1)
    dense = twin(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    steps = 80 if kind.rows == 0 else 400  # time first: of each batch dimension 0 is taken for examples
    apo = Apoptosis(net, optimizer, inputs(kind), tolerance=0.0, total_steps=steps, align=1, calibration=1.0)
    event = None
    for step in range(steps):
        x = inputs(kind)
        out, wanted = net(x), dense(x)
        torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-10)
        optimizer.zero_grad()
        out.square().mean().backward()
        optimizer.step()
        event = apo.step() or event
        if event is not None and step % 4 == 3:
            break
    assert event is not None, apo.ledger()
    assert set(event.groups) == set(names)
    torch.testing.assert_close(net(x), dense(x), rtol=1e-9, atol=1e-10)
    optimizer.param_groups[0]["lr"] = 0.01
    for _ in range(3):
        optimizer.zero_grad()
        net(inputs(kind)).square().mean().backward()
        optimizer.step()
        apo.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollback_leaves_the_state_bitwise_and_its_objects(kind):
    net, _ = planted(kind)
    before = [(t, t.clone()) for t in kept(net)]
    target = Target(model=net, optimizers=(), call=((inputs(kind),), {}))
    structure = target.capture()
    reductions = []
    for group in structure.groups:
        if group.pin is None:
            keep = torch.arange(group.num_channels // 2)
            mix = torch.zeros(keep.numel(), group.num_channels)
            sites = {site.key: SiteReduction(mix=mix, offset=None) for site in group.sites}
            reductions.append(Reduction(group=group.name, keep=keep, sites=sites))
    probe = as_probe(target.call)
    outcome = apply_reductions(
        target, structure, reductions, {}, probe, lambda change: AcceptanceResult(change=change, refused="refused")
    )
    assert outcome.refused == "refused"
    assert all(a is b and torch.equal(a, old) for a, (b, old) in zip(kept(net), before, strict=True))
    net(inputs(kind))


@pytest.mark.parametrize("kind", [k for k in KINDS if k is not RunningBuffer])
@pytest.mark.parametrize("rows", [2, 11])
def test_the_live_state_may_be_of_another_batch_than_the_example_and_the_probe(kind, rows):
    """Of the last, smaller batch, say; the model itself fails on batches of another size without a reset."""
    net, names = planted(kind)
    example = inputs(kind, rows)
    first = Apoptosis(net, torch.optim.SGD(net.parameters(), 0.0), example, probe=inputs(kind, 9))
    assert {g.name for g in first.groups()} == set(names)
    before = [t.clone() for t in kept(net)]
    dense = twin(net)
    event = shrink_(net, example, [inputs(kind, n) for n in (30, 30, 9, 30)], tolerance=0.0, probe=inputs(kind, 9))
    assert set(event.groups) == set(names), event.notes
    assert [t.shape[0] for t in kept(net)] == [t.shape[0] for t in before]
    x = inputs(kind)
    torch.testing.assert_close(net(x), dense(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_computes_the_same_from_the_same_state(kind, tmp_path):
    net, _ = planted(kind)
    shrink_(net, inputs(kind), [inputs(kind) for _ in range(12)], tolerance=0.0)
    save(tmp_path / "net.safetensors", net)
    fresh = kind()
    load(tmp_path / "net.safetensors", fresh)
    if kind is not RunningBuffer:  # whose memory is saved
        net.reset()
        fresh.reset()
    if kind in (Buffer, BufferInPlace):  # not persistent: a new one is as wide as the class says
        fresh.hidden = torch.zeros_like(net.hidden)
    for _ in range(2):
        x = inputs(kind)
        assert torch.equal(net(x), fresh(x))


class Undetached(Elman):
    """Leaves the graph of a pass behind; the training loop cuts it."""

    def run(self, x):
        h = x.new_zeros(len(x), self.first.out_features) if self.hidden is None else self.hidden
        for step in x.unbind(1):
            h = torch.tanh(self.first(step) + self.back(h))
        self.hidden = h
        return self.last(h)


def trained_to_an_event(net, kind, *followers):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    apo = Apoptosis(net, optimizer, inputs(kind), tolerance=0.0, total_steps=80, align=1, calibration=1.0)
    for follower in followers:
        apo.follow(follower)
    for _ in range(60):
        net.hidden = None if net.hidden is None else net.hidden.detach()
        loss = net(inputs(kind)).square().mean() + net(inputs(kind)).square().mean()  # through two passes
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if event := apo.step():
            return event
    raise AssertionError(apo.ledger())


def test_gradients_through_several_passes_end_at_an_event():
    net, names = planted(Undetached, passes=0)
    assert set(trained_to_an_event(net, Undetached).groups) == set(names)
    assert net.hidden.grad_fn is None
    assert net.hidden.shape == (ROWS, 15)
    (net(inputs(Undetached)) + net(inputs(Undetached))).sum().backward()


@pytest.mark.filterwarnings("ignore:apoptosis. an AveragedModel averages:RuntimeWarning")  # made before the run
def test_an_averaged_copy_keeps_a_state_of_its_own():
    net, _ = planted(Elman, passes=0)
    average = torch.optim.swa_utils.AveragedModel(net)
    for _ in range(3):
        average(inputs(Elman, 3))
    dense = twin(average)
    trained_to_an_event(net, Elman, average)  # which follows it
    assert average.module.hidden.shape == (3, 15)
    x = inputs(Elman, 3)
    torch.testing.assert_close(average(x), dense(x), rtol=1e-9, atol=1e-10)


class ThroughNumpy(Net):
    def run(self, x):
        h = torch.tanh(self.first(x))
        if self.hidden is not None:
            h = h * self.hidden
        self.hidden = torch.from_numpy(h.detach().numpy().copy())
        return self.last(h)


def test_what_cannot_be_followed_is_pinned_by_its_name_with_the_remedy():
    net = ThroughNumpy()
    pin = analyse(net, (inputs(ThroughNumpy),)).groups[0].pin
    assert "combines channels with 'hidden' of the pass before, which has none" in pin.reason
    assert "reset it before every pass" in pin.remedy


class Shows(Net):
    """Attributes that show a parameter, or are computed from one before each pass."""

    def build(self):
        super().build()
        self.back = torch.nn.utils.weight_norm(self.back)
        self.shown, self.biases = self.first.weight.data, [self.first.bias.detach()]

    def run(self, x):
        h = torch.relu(nn.functional.linear(x, self.first.weight, self.biases[0]))
        return self.last(torch.relu(self.back(h)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_attributes_that_show_parameters_show_the_new_ones():
    net = Shows()
    names = plant_(net, analyse(net, (inputs(Shows),)))
    event = shrink_(net, inputs(Shows), [inputs(Shows) for _ in range(12)], tolerance=0.0)
    assert set(event.groups) == set(names) == {"first", "back"}
    assert net.shown.data_ptr() == net.first.weight.data_ptr()
    assert net.biases[0].data_ptr() == net.first.bias.data_ptr()
    assert net.shown.shape == net.first.weight.shape == (15, 5)
    assert net.back.weight.shape == net.back.weight_v.shape


def test_a_network_that_keeps_nothing_is_followed_once_in_each_mode():
    net, calls = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), []
    net.register_forward_hook(lambda *_: calls.append(1))
    analyse(net, (torch.randn(4, 5),))
    assert len(calls) == 2


class Centred(Net):
    """A running mean of the inputs, of which there happen to be as many as examples."""

    example = (5, 5)

    def reset(self):
        self.mean = torch.zeros(5)

    def run(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.last(torch.relu(self.back(torch.relu(self.first(x - self.mean)))))


def test_what_only_happens_to_be_of_the_batchs_size_does_not_stop_other_batches():
    net = Centred()
    apo = Apoptosis(net, torch.optim.SGD(net.parameters(), 0.0), inputs(Centred), probe=inputs(Centred, 40))
    assert {group.name for group in apo.groups()} == {"first", "back"}
    assert shrink_(net, inputs(Centred), [inputs(Centred, 40), inputs(Centred, 9)], tolerance=0.5).groups


class Fixed(Net):
    def run(self, x):
        h = torch.relu(self.first(x))
        return self.last(h if self.hidden is None else h + (self.hidden @ torch.ones(7)).unsqueeze(1))


def test_where_no_number_of_rows_fits_the_error_names_what_is_kept():
    net = Fixed()
    net.hidden = torch.ones(8, 9)
    with pytest.raises(CaptureError, match=r"it keeps 'hidden' \(8, 9\) in attributes: .* reset it"):
        analyse(net, (inputs(Fixed),))
    assert net.hidden.shape == (8, 9)
