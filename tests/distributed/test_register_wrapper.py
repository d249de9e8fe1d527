"""A wrapper of the user's own: one file that implements the protocol, and the model inside shrinks."""

import pytest
import torch
from torch import nn

from apoptosis import Apoptosis, load, register_wrapper, save
from apoptosis.distributed import Wrapper, protocol
from apoptosis.distributed.wrappers import unwrap
from apoptosis.errors import ArgumentError


class FlatSums(nn.Module):
    """Adds gradients up in one flat buffer, laid out by the parameters, as communication libraries do."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.set_up()

    def set_up(self):
        parameters = list(self.net.parameters())
        self.flat = torch.zeros(sum(p.numel() for p in parameters))
        self.starts = {}
        place = 0
        for p in parameters:
            self.starts[id(p)] = place
            place += p.numel()

    def collect(self):
        for p in self.net.parameters():
            start = self.starts[id(p)]
            self.flat[start : start + p.numel()] += p.grad.flatten()

    def forward(self, x):
        return self.net(x)


class FlatSumsKind(Wrapper):
    name = "FlatSums"

    def matches(self, candidate):
        return isinstance(candidate, FlatSums)

    def unwrap(self, wrapped):
        return wrapped.net

    def check(self, wrapped, name):
        super().check(wrapped, name)
        if wrapped.flat.dtype != torch.float32:
            raise ArgumentError("FlatSums keeps float32 alone.")

    def rebuild(self, wrapped, layout=None):
        wrapped.set_up()


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    monkeypatch.setattr(protocol, "_REGISTERED", list(protocol._REGISTERED))


def train(runs, model, inside, apo, optimizer, steps=60):
    events = []
    for step in range(steps):
        x = runs.inputs(64, step)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        model.collect()
        optimizer.step()
        event = apo.step()
        events += [event] if event else []
    return events


def test_a_registered_wrapper_is_set_up_again_after_events_and_after_load(runs, tmp_path):
    register_wrapper(FlatSumsKind())
    inside = runs.mlp()
    runs.doubled(inside, 0)
    model, optimizer = FlatSums(inside), runs.adam(inside)
    before = model.flat.numel()
    apo = runs.start(model, optimizer)
    assert apo.model is inside
    assert train(runs, model, inside, apo, optimizer)
    assert model.flat.numel() == sum(p.numel() for p in inside.parameters()) < before
    assert {g.name for g in apo.structure.groups} == {"0", "2", "4"}  # names of the model inside
    save(tmp_path / "net.safetensors", model, optimizer, apo)
    fresh = FlatSums(runs.mlp(seed=1))
    again = Apoptosis(fresh, adam := runs.adam(fresh.net), runs.inputs(4, 99), total_steps=60, tolerance=0.1, align=1)
    load(tmp_path / "net.safetensors", fresh, adam, again)
    assert fresh.flat.numel() == model.flat.numel()
    assert [tuple(p.shape) for p in fresh.net.parameters()] == [tuple(p.shape) for p in inside.parameters()]


def test_unregistered_it_is_a_module_like_any_other(runs):
    model = FlatSums(runs.mlp())
    assert unwrap(model).model is model
    assert {g.name for g in runs.start(model, runs.adam(model)).structure.groups} == {"net.0", "net.2", "net.4"}


def test_its_own_check_and_one_inside_the_model_are_refused(runs):
    register_wrapper(FlatSumsKind())
    model = FlatSums(runs.mlp())
    with pytest.raises(ArgumentError, match=r"module '0' is wrapped in FlatSums by itself.*Wrap the whole model"):
        unwrap(nn.Sequential(model, nn.Linear(4, 4)))
    model.flat = model.flat.double()
    with pytest.raises(ArgumentError, match="float32 alone"):
        unwrap(model)


def test_what_is_no_kind_of_wrapper_and_names_that_are_taken_are_refused():
    for bad in (object(), FlatSumsKind, Wrapper()):
        with pytest.raises(ArgumentError, match="register_wrapper"):
            register_wrapper(bad)
    register_wrapper(FlatSumsKind())
    with pytest.raises(ArgumentError, match=r"'FlatSums' is there already.*fully_shard"):
        register_wrapper(FlatSumsKind())


class Halved(torch.Tensor):
    """Every rank holds half of the rows; here both halves are at hand."""


def test_a_kind_of_sharded_tensors_is_asked_for_them():
    class HalvedKind(Wrapper):
        name = "halved"

        def matches(self, candidate):
            return False

        def is_sharded(self, tensor):
            return isinstance(tensor, Halved)

        def full_tensor(self, tensor):
            return tensor.as_subclass(torch.Tensor).repeat_interleave(2, 0)

        def shard_like(self, value, like):
            return value[::2].as_subclass(Halved)

    from apoptosis.distributed.sharded import FullTensors, full_tensor, has_shards, shard_like, summon_full_params

    net = nn.Linear(2, 3)
    net.weight = nn.Parameter(torch.ones(3, 2).as_subclass(Halved))
    assert not has_shards(net)
    register_wrapper(HalvedKind())
    assert has_shards(net)
    assert full_tensor(net.weight).shape == FullTensors(dict(net.named_parameters()))["weight"].shape == (6, 2)
    assert isinstance(shard_like(torch.zeros(6, 2), net.weight), Halved)
    assert full_tensor(net.bias) is net.bias
    with summon_full_params(net, ["weight", "bias"]):
        assert net.weight.shape == (6, 2)
        assert type(net.weight) is nn.Parameter
    assert net.weight.shape == (3, 2)


class Averaging(torch.optim.Optimizer):
    """Steps by an optimizer inside, and keeps the gradients of the last step in one flat buffer."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.state = inner.state
        self.inner = inner
        self.set_up()

    def set_up(self):
        self.flat = torch.zeros(sum(p.numel() for group in self.param_groups for p in group["params"]))

    def step(self, closure=None):
        self.flat.copy_(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]))
        self.inner.step()


class AveragingKind(Wrapper):
    name = "Averaging"

    def matches(self, candidate):
        return isinstance(candidate, Averaging)

    def unwrap(self, wrapped):
        return wrapped.inner

    def check_ranks(self, wrapped, size):
        if size > 1:
            raise ArgumentError("Averaging is of one process.")

    def rebuild(self, wrapped, layout=None):
        wrapped.set_up()


def test_a_registered_optimizer_is_set_up_again_and_the_state_inside_follows(runs, tmp_path):
    register_wrapper(AveragingKind())
    net = runs.mlp()
    runs.doubled(net, 0)
    optimizer = Averaging(runs.adam(net))
    apo = runs.start(net, optimizer)
    assert runs.train(net, optimizer, apo)
    assert optimizer.flat.numel() == sum(p.numel() for p in net.parameters())
    assert all(optimizer.inner.state[p]["exp_avg"].shape == p.shape for p in net.parameters())
    save(tmp_path / "net.safetensors", net, optimizer, apo)
    fresh = runs.mlp(seed=1)
    other = Averaging(runs.adam(fresh))
    load(tmp_path / "net.safetensors", fresh, other)
    assert other.flat.numel() == optimizer.flat.numel()
    first, again = (o.inner.state[p]["exp_avg"] for o, p in ((optimizer, net[0].weight), (other, fresh[0].weight)))
    assert torch.equal(first, again)


def test_a_kind_that_recognises_nothing_is_refused() -> None:
    class Nothing(Wrapper):
        name = "nothing"

    with pytest.raises(ArgumentError, match=r"'nothing' recognises nothing: override matches\(\)"):
        register_wrapper(Nothing())
