"""Passes of the library's own leave nothing behind in plain attributes, whatever a network keeps there."""

from __future__ import annotations

import itertools
import random
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn

from apoptosis import Apoptosis, shrink_
from apoptosis.graph import analyse, replay
from apoptosis.model.evaluate import Probe, make_probe, outputs
from apoptosis.model.module_state import ModuleState
from apoptosis.model.passes import internal_passes
from apoptosis.model.trials import check_runs, has_classes


class Cache:
    def __init__(self):
        self.keys = []
        self.steps = 0


class Slotted:
    __slots__ = ("count", "late")

    def __init__(self):
        self.count = 0


class Keeps(nn.Module):
    """Writes to every kind of attribute in each pass."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.calls, self.losses, self.seen = 0, [], set()
        self.by_name, self.counts, self.recent = {"a": [0]}, Counter(), deque(maxlen=2)
        self.ordered, self.missing = OrderedDict(x=1), defaultdict(list)
        self.cache, self.slotted = Cache(), Slotted()
        self.generator, self.numpy_rng, self.python_rng = torch.Generator(), np.random.default_rng(0), random.Random(0)
        self.array, self.average, self.grown = np.zeros(3), torch.zeros(6), torch.zeros(2)
        self.nested = (torch.zeros(3), [torch.zeros(2)])
        self.register_buffer("num", torch.zeros((), dtype=torch.long))
        self.gone = 1

    def forward(self, x):
        h = torch.relu(self.first(x))
        self.calls += 1
        self.losses.append(x.mean())
        self.seen.add(self.calls)
        self.by_name["a"].append(self.calls)
        self.by_name["b"] = 2
        self.counts["passes"] += 1
        self.recent.append(self.calls)
        self.ordered.move_to_end("x")
        self.ordered["y"] = 2
        self.missing["new"].append(1)
        self.cache.keys.append(h.detach())
        self.cache.steps += 1
        self.slotted.count += 1
        self.slotted.late = 1
        torch.rand(1, generator=self.generator), self.numpy_rng.random(), self.python_rng.random()
        torch.rand(1), np.random.rand(), random.random()
        self.array += 1
        with torch.no_grad():
            self.average.mul_(0.5).add_(x.mean(0))
            self.grown.resize_(5).fill_(7.0)
            self.nested[0].add_(1)
            self.nested[1][0] = self.nested[1][0] + 1
            self.last.bias.data.clamp_(max=0.01)
        self.num += 1
        self.hidden = h.detach()
        if hasattr(self, "gone"):
            del self.gone
        self.training_seen = self.training
        return self.last(h)


def picture(item, seen=None):
    """Everything that is reached from an object by value, and the identity of containers and tensors."""
    seen = {} if seen is None else seen
    if id(item) in seen:
        return ("again", seen[id(item)])
    seen[id(item)] = len(seen)
    if isinstance(item, torch.Tensor):
        return (id(item), item._version, tuple(item.shape), item.detach().clone().numpy().tobytes())
    if isinstance(item, np.ndarray):
        return item.tobytes()
    if isinstance(item, torch.Generator):
        return item.get_state().numpy().tobytes()
    if isinstance(item, random.Random):
        return item.getstate()
    if isinstance(item, np.random.Generator):
        return str(item.bit_generator.state)
    if isinstance(item, dict):
        return (id(item), type(item), [(k, picture(v, seen)) for k, v in item.items()])
    if isinstance(item, list | tuple | set | deque):
        return (id(item), type(item), [picture(v, seen) for v in item])
    if isinstance(item, Slotted):
        return (item.count, hasattr(item, "late"))
    if isinstance(item, nn.Module | Cache):
        return (id(item), picture(vars(item), seen))
    return item


def everything(net):
    return picture(net), torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


def example(rows=4):
    return torch.linspace(-1, 1, rows * 6).reshape(rows, 6)


PASSES = {
    "capture": lambda net: analyse(net, (example(),)),
    "replay": lambda net: replay(net, (example(),), {}, lambda seen: None),
    "outputs": lambda net: outputs(net, Probe(args=(example(600),), kwargs={}, labels=None, rows=600, held_out=False)),
    "check_runs": lambda net: check_runs(net, make_probe(example(), example())),
    "has_classes": lambda net: has_classes(net, ((example(),), {}), None),
    "construction": lambda net: Apoptosis(net, torch.optim.Adam(net.parameters()), example()).plan(),
    "shrink_": lambda net: shrink_(net, example(), [example(40)], tolerance=0.0, exclude=["*"]),
    "shrink_ in both modes": lambda net: shrink_(
        net, example(), [example(40)], tolerance=0.0, exclude=["*"], optimizer=torch.optim.SGD(net.parameters(), 0.1)
    ),
}


@pytest.mark.parametrize("name", PASSES)
def test_every_own_pass_leaves_attributes_tensors_and_generators_as_they_were(name):
    torch.manual_seed(0)
    net = Keeps()
    net(example()).sum().backward()
    net.last.bias.data.fill_(0.5)  # the forward pass would clamp it
    before = everything(net)
    PASSES[name](net)
    assert everything(net) == before


def test_the_forward_pass_of_the_test_does_change_all_of_it():
    """Else the test above could not fail."""
    net = Keeps()
    before = vars(net).copy()
    old = everything(net)
    net(example())
    new = everything(net)
    assert all(a != b for a, b in zip(old, new, strict=True))
    assert "gone" not in vars(net)
    assert "hidden" not in before


def test_after_a_failure_too():
    class Fails(Keeps):
        def forward(self, x):
            super().forward(x)
            raise ZeroDivisionError

    net = Fails()
    before = everything(net)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        analyse(net, (example(),))
    assert everything(net) == before


def test_a_living_graph_over_a_state_written_in_place_still_goes_backward():
    class Spikes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.mem = nn.Linear(6, 8), nn.Linear(8, 2), torch.zeros(8)

        def forward(self, x):
            h = self.a(x) * self.mem  # saves the state for the backward pass
            out = self.b(h)
            if not torch.is_grad_enabled() or self.frozen:
                self.mem.add_(h.detach().mean(0))
            return out

    net = Spikes()
    net.frozen = False
    loss = net(example()).sum()
    net.frozen = True
    outputs(net, make_probe(example(), example()))
    loss.backward()
    assert net.a.weight.grad is not None


def test_modules_held_in_lists_and_in_one_another():
    net = nn.Sequential(nn.Linear(2, 2))
    net.outside = [Keeps()]
    net.outside[0].parent = [net]
    state = ModuleState(net)
    net.outside[0].losses.append(1)
    net.outside[0].eval()
    state.restore()
    assert net.outside[0].losses == []
    assert net.outside[0].training


def test_a_long_list_is_not_looked_into_for_ever():
    net = nn.Linear(2, 2)
    net.names = list(itertools.chain.from_iterable(([i], str(i)) for i in range(100_000)))
    state = ModuleState(net)
    net.names.append(0)
    state.restore()
    assert len(net.names) == 200_000


def test_large_data_is_copied_only_when_something_writes_to_it():
    net = nn.Linear(2, 2)
    net.data = torch.zeros(1 << 20)
    state = ModuleState(net)
    with state.written:
        net.data.sum()
    assert not state.written._kept
    with state.written:
        net.data[3:5].fill_(1.0)
    assert len(state.written._kept) == 1
    state.restore()
    assert not bool(net.data.any())


def test_passes_nest():
    net = Keeps()
    before = everything(net)
    with internal_passes(net):
        net(example())
        inner = picture(net)
        with internal_passes(net, training=True):
            assert net.training
            net(example())
        assert picture(net) == inner
    assert everything(net) == before
