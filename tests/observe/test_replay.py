"""Sites that no module's input shows: passes that are run again, and what that leaves alone."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from apoptosis import Apoptosis, is_internal_forward
from apoptosis.errors import CaptureError, NonFiniteError, OutOfMemoryError
from apoptosis.graph import analyse, replay
from apoptosis.observe import MIN_EXAMPLES, Observer
from apoptosis.observe.replay import LAST_PASS, MAX_PASSES
from apoptosis.records import Group, LinearSite, Seen


class Attention(nn.Module):
    """Attention by hand, of queries that are scaled: no module returns those; heads of keys may be shared."""

    def __init__(self, heads=4, shared=1, size=4, width=6):
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.shared, self.size = heads, shared, size
        self.q, self.k = nn.Linear(width, heads * size), nn.Linear(width, heads // shared * size)
        self.v, self.o = nn.Linear(width, heads // shared * size), nn.Linear(heads * size, 3)

    def operands(self, x):
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = (f(x).view(batch, length, self.heads // self.shared, -1).transpose(1, 2) for f in (self.k, self.v))
        return q * 0.5, k.repeat_interleave(self.shared, 1), v.repeat_interleave(self.shared, 1)

    def forward(self, x):
        q, k, v = self.operands(x)
        scores = (q @ k.transpose(-1, -2) / self.size**0.5).softmax(-1)
        return self.o((scores @ v).transpose(1, 2).flatten(2))


class Own(nn.Module):
    """A consumer that is no module, with a counter, a dropout and a hidden state that a pass leaves behind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.drop = nn.Linear(6, 8), nn.Dropout(0.5)
        self.weight, self.bias = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.zeros(3))
        self.register_buffer("passes", torch.zeros(()))

    def hidden(self, x):
        return torch.relu(self.a(x))

    def forward(self, x, *, scale=1.0):
        self.passes += 1
        return functional.linear(self.drop(self.hidden(x)), self.weight, self.bias) * scale


def window(net, example, run=replay, **arguments):
    structure = analyse(net, (example,))
    observer = Observer(net, [g for g in structure.groups if g.pin is None], seed=0, replay=run, **arguments)
    observer.open()
    return observer


def found(observer, group, part):
    return next(o for (name, key), o in observer.observations().items() if name == group and part in key)


def test_what_a_functional_consumer_reads_is_seen_without_dropout(runs):
    net = Own()
    observer = window(net, runs.inputs(4, 0), exact=True)
    xs = [runs.inputs(16, step) for step in range(4)]
    for x in xs:
        net(x, scale=2.0).sum().backward()
        observer.end_step()
    rows = net.hidden(torch.cat(xs)).detach().double()
    seen = found(observer, "a", ":weight:1")
    assert seen.dropout == 0.0
    assert seen.moments.num_rows == 64
    assert torch.allclose(seen.moments.covariance(), rows.T.cov(correction=0), atol=1e-9)
    assert observer.examples == 64


@pytest.mark.parametrize("shared", [1, 2, 4])
def test_both_operands_of_a_product_are_seen_at_every_position(runs, shared):
    net = Attention(shared=shared)
    x = runs.inputs(40, 1, (5, 6))
    observer = window(net, x[:2], exact=True, any_mode=True)
    with torch.no_grad():
        net(x)
    observer.end_step()
    q, k, _ = (t.detach().double().transpose(1, 2).flatten(2).flatten(0, 1) for t in net.operands(x))
    group = next(g for g in analyse(net, (x[:2],)).groups if any(s.kind == "product" for s in g.sites))
    site = next(s for s in group.sites if s.kind == "product")
    seen = found(observer, group.name, ":product")
    assert seen.right is not None
    places = torch.from_numpy(site.input_columns.reshape(-1))
    assert seen.moments.num_rows == seen.right.num_rows == 200
    for moments, rows in ((seen.moments, q), (seen.right, k)):
        rows = rows[:, places]
        assert torch.allclose(moments.second_moment(), rows.T @ rows / len(rows), atol=1e-9)


def test_running_again_leaves_everything_as_it_was(runs):
    def training(observed):
        net = Own()
        optimizer = runs.adam(net)
        observer = window(net, runs.inputs(4, 0)) if observed else None
        own = []
        net.register_forward_hook(lambda *args: own.append(1))
        torch.manual_seed(3)
        for step in range(5):
            net(runs.inputs(16, step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if observer is not None:
                observer.end_step()
        if observer is not None:
            assert len(observer.observations()) > 0
            observer.close()
        return runs.everything(net, optimizer)

    assert runs.same(training(True), training(False))


def test_the_arguments_are_kept_as_the_user_gave_them(runs):
    net = Own()
    net.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
    observer = window(net, runs.inputs(4, 0), exact=True)
    x = runs.inputs(16, 1)
    net(x).sum().backward()
    given = x.clone()
    x.zero_()  # a loop that writes every batch to the same place
    observer.end_step()
    rows = net.hidden(given * 2.0).detach().double()
    assert torch.allclose(found(observer, "a", ":weight:1").moments.mean, rows.mean(0), atol=1e-9)


def test_no_more_passes_are_run_again_than_are_needed(runs):
    calls = []

    def counted(model, args, kwargs, watch, *, training):
        calls.append(len(args[0]))
        replay(model, args, kwargs, watch, training=training)

    net = Own()
    observer = window(net, runs.inputs(4, 0), counted)
    over = False
    for step in range(12):
        net(runs.inputs(64, step)).sum().backward()
        over = observer.end_step()
    assert over
    assert calls == [64] * (MIN_EXAMPLES // 64)
    calls.clear()
    observer = window(net, runs.inputs(4, 0), counted)
    for step in range(4):  # several passes a step: as many as are needed
        for part in range(3):
            net(runs.inputs(64, 10 * step + part)).sum().backward()
        observer.end_step()
    assert calls == [64] * (MIN_EXAMPLES // 64)
    calls.clear()
    observer = window(net, runs.inputs(4, 0), counted, any_mode=True)
    net(runs.inputs(MIN_EXAMPLES, 1))
    assert observer.end_step()
    assert calls == [MIN_EXAMPLES]


def test_tiny_batches_do_with_fewer_examples(runs):
    net = Attention()
    observer = window(net, runs.inputs(2, 0, (40, 6)))
    passes = 0
    while not observer._replayed.finished:
        net(runs.inputs(2, passes, (40, 6))).sum().backward()
        observer.end_step()
        passes += 1
    assert passes == MAX_PASSES
    assert found(observer, "q", ":product").moments.num_rows >= 256


def test_big_inputs_are_kept_one_pass_at_a_time(runs):
    net = nn.Sequential(nn.Flatten(), nn.Linear(600_000, 2), Own(), nn.Flatten())
    net[2].a = nn.Linear(2, 8)
    observer = window(net, torch.zeros(2, 600_000))
    for _ in range(3):
        net(torch.ones(1, 600_000)).sum().backward()
    assert len(observer._replayed._pending) == 1
    observer.end_step()
    assert observer._replayed._pending == []


def test_a_model_that_cannot_be_run_again_is_told_of_once(runs):
    def refuses(model, args, kwargs, watch, *, training):
        raise CaptureError("the model fails")

    net = Attention()
    observer = window(net, runs.inputs(2, 0, (5, 6)), refuses)
    x = runs.inputs(64, 1, (5, 6))
    net(x).sum().backward()
    with pytest.warns(RuntimeWarning, match="run the model again.*the model fails"):
        observer.end_step()
    for _ in range(4):
        net(x).sum().backward()
        over = observer.end_step()
    assert over
    assert {group for group, _ in observer.observations()} == {"v", ":heads"}


def test_without_replay_functional_sites_stay_unobserved(runs):
    net = Own()
    observer = window(net, runs.inputs(4, 0), None)
    net(runs.inputs(64, 1)).sum().backward()
    observer.end_step()
    assert observer.observations() == {}


def recurrent(steps, width=8):
    """A stand-in for a recurrence: the same site is seen once per step, with values that tell the step."""
    net = nn.Linear(6, width)
    columns = np.arange(width)[:, None]
    site = LinearSite(
        module="", kind="linear", weight="weight", dim=0, bias=None, columns=columns, input_columns=columns,
        num_columns=width, functional=True,
    )  # fmt: skip

    def run(model, args, kwargs, watch, *, training):
        for step in range(steps):
            watch(Seen(site=site.key, x=torch.full((len(args[0]), width), float(step)) + 0.1 * torch.randn(width)))

    return net, Group(name="", num_channels=width, members=(), sites=(site,)), run


def test_of_many_steps_of_a_recurrence_an_even_share_is_taken(runs):
    net, group, run = recurrent(steps=400)
    observer = Observer(net, [group], seed=0, replay=run)
    observer.open()
    for step in range(4):
        net(runs.inputs(64, step)).sum().backward()
        over = observer.end_step()
    assert over
    (seen,) = observer.observations().values()
    assert 256 <= seen.moments.num_rows <= 300
    assert seen.moments.num_examples >= 256
    assert float(seen.moments.mean.mean()) == pytest.approx(199.5, abs=30)
    assert float(seen.moments.covariance()[0, 0] ** 0.5) == pytest.approx(115.5, rel=0.15)


def test_a_site_that_no_pass_reaches_is_given_up(runs):
    net, group, _ = recurrent(steps=1)
    calls = []
    observer = Observer(net, [group], seed=0, replay=lambda *args, **kwargs: calls.append(1))
    observer.open()
    steps = 0
    while not observer.end_step() and steps < 1000:
        net(runs.inputs(4, steps)).sum().backward()
        steps += 1
    assert steps < 1000
    assert len(calls) <= LAST_PASS
    assert observer.saw_nothing


def test_what_is_not_finite_or_changes_its_width_is_told_of_later(runs):
    net, group, _ = recurrent(steps=1)
    key = group.sites[0].key
    for x in (torch.full((5000, 8), float("nan")), torch.zeros(16, 5)):

        def run(model, args, kwargs, watch, *, training, x=x):
            watch(Seen(site=key, x=x))

        observer = Observer(net, [group], seed=0, replay=run, any_mode=True)
        observer.open()
        net(runs.inputs(16, 1))
        observer.end_step()
        observer.close()
        with pytest.raises(NonFiniteError):
            observer.observations()


def test_hooks_of_the_window_take_nothing_from_a_second_run(runs):
    net = Attention()
    x = runs.inputs(16, 1, (5, 6))
    observer = window(net, x[:2], any_mode=True)
    with torch.no_grad():
        net(x)
    before = found(observer, "v", "o.weight").moments.num_rows
    observer.end_step()
    assert found(observer, "v", "o.weight").moments.num_rows == before
    assert found(observer, "q", ":product").moments.num_rows > 0
    assert observer.hook_seconds > 0.0


def test_a_half_filled_window_goes_on_exactly(runs):
    def passes(net, observer, first, last):
        for step in range(first, last):
            net(runs.inputs(16, step, (20, 6))).sum().backward()
            observer.end_step()

    net = Attention()
    example = runs.inputs(2, 0, (20, 6))
    whole = window(net, example)
    passes(net, whole, 0, 6)
    whole.close()
    first = window(net, example)
    passes(net, first, 0, 3)
    first.close()
    second = window(net, example)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    passes(net, second, 3, 6)
    second.close()
    assert runs.same(whole.state_dict(), second.state_dict())
    other = window(Own(), runs.inputs(4, 0))
    other.close()
    with pytest.raises(KeyError):
        other.load_state_dict(first.state_dict())


def test_lack_of_memory_in_a_pass_that_is_run_again_is_raised():
    """It says nothing about the model, and once there is memory again the run goes on."""

    class Short(Own):
        full = False

        def forward(self, x):
            if self.full and is_internal_forward():
                raise MemoryError
            return super().forward(x)

    net = Short()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    apo = Apoptosis(net, optimizer, torch.randn(4, 6), tolerance=0.5, align=1, total_steps=40, calibration=0.0)
    raised = 0
    for _ in range(40):
        optimizer.zero_grad()
        net(torch.randn(256, 6)).square().mean().backward()
        optimizer.step()
        net.full = apo.watching and not raised
        before = [p.detach().clone() for p in net.parameters()]
        try:
            apo.step()
        except OutOfMemoryError as error:
            raised += 1
            assert "Short fails" in str(error)  # noqa: PT017 - the run goes on
            assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
        net.full = False
    assert raised == 1
    assert net.a.out_features < 8
