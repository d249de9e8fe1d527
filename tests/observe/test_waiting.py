"""Between events nothing reads a number from the device: an accelerator is never waited for.

On the CPU reads are seen, and copies between devices are not; the test on CUDA sees both.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from apoptosis.graph import analyse
from apoptosis.numerics.devices import sample_rows
from apoptosis.observe import Observer, gradients
from apoptosis.observe import accumulators as watch

#: Operators that bring numbers to the program, or whose output has as many rows as numbers say.
WAIT = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2"}


@pytest.fixture
def ahead(monkeypatch):
    """What is done for accelerators, on the CPU."""
    for module in (gradients, watch):
        monkeypatch.setattr(module, "is_async", lambda device: True)


class Waits(TorchDispatchMode):
    """Names the operators that would wait."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        masks = name.startswith("index") and any(
            isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)
            for x in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        if name in WAIT or masks:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 3 * 32), nn.Linear(32, 4)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 4, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2).mean(1))


NETWORKS = {
    "mlp": (lambda runs: runs.mlp(64), (6,)),
    "cnn": (lambda runs: runs.cnn(), (2, 6, 6)),
    "attention": (lambda runs: Attention(), (5, 6)),
}


def stepped(runs, name, device, around):
    """Train; return what `around` said of steps in which no window ended, the steps watched, the windows that ended."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    net = make(runs).to(device)
    example = torch.randn(2, *shape)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    apo = runs.start(net, optimizer, example.to(device), total_steps=100, tolerance=0.1)
    said, watched, ended = [], 0, 0
    for _ in range(60):
        x = torch.randn(64, *example.shape[1:]).to(device)
        y = torch.randint(0, 3, (64,)).to(device)
        watching = apo.watching
        with around() as found:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            apo.step()
        if watching and not apo.watching:
            ended += 1
        else:
            said += found()
        watched += watching
    return said, watched, ended


class Around:
    def __enter__(self):
        self.mode = Waits()
        self.mode.__enter__()
        return lambda: self.mode.seen

    def __exit__(self, *error):
        self.mode.__exit__(*error)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_step_but_those_of_events_waits(runs, ahead, name):
    said, watched, ended = stepped(runs, name, "cpu", Around)
    assert watched > 3
    assert ended
    assert said == []


def test_what_would_wait_is_seen(runs):
    """On the CPU, where nothing has to wait, rows are checked at once: the test above can fail."""
    said, _, _ = stepped(runs, "mlp", "cpu", Around)
    assert "_local_scalar_dense" in said


class Warned:
    def __enter__(self):
        self.caught = warnings.catch_warnings(record=True)
        self.found = self.caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return lambda: [str(w.message) for w in self.found if "synchroniz" in str(w.message)]

    def __exit__(self, *error):
        torch.cuda.set_sync_debug_mode("default")
        self.caught.__exit__(*error)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NETWORKS)
def test_cuda_is_not_synchronised_between_events(runs, name):
    said, watched, ended = stepped(runs, name, "cuda", Warned)
    assert watched > 3
    assert ended
    assert said == []


def test_good_rows_come_first_and_each_as_often_as_others():
    draws, counts = torch.Generator().manual_seed(0), torch.zeros(12)
    rows = torch.arange(12.0)[:, None] + torch.tensor([0.0, 100.0])
    rows[5] = float("nan")
    good = rows.isfinite().all(1) & (torch.arange(12) != 7)
    for _ in range(600):
        found = sample_rows(rows, good, 4, draws)
        assert found.shape == (4, 2)
        counts[found[:, 0].long()] += 1
    assert counts[[5, 7]].sum() == 0
    assert counts.sum() == 2400
    assert (counts[good] - 240).abs().max() < 60  # four standard deviations of 600 draws of 4 in 10
    many = sample_rows(rows, good, 100, draws)
    assert many.shape == (12, 2)
    assert sorted(many[:, 0].tolist()) == sorted([0.0, 0.0, *rows[good][:, 0].tolist()])


def window(net, example):
    observer = Observer(net, [g for g in analyse(net, (example,)).groups if g.pin is None], seed=0, gradients=True)
    observer.open()
    return observer


def test_gradients_are_the_same_and_rows_without_any_do_not_count(ahead):
    """The loss looks at one of ten positions: the rest brings nothing, and says nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    observer = window(net, torch.randn(4, 6))
    expected = torch.zeros(8, 8, dtype=torch.float64)
    for _ in range(2):
        x = torch.randn(3, 10, 6)
        z = net[:2](x).detach().requires_grad_()
        g = torch.autograd.grad(net[2](z)[:, 0].square().mean(), z)[0].double().flatten(0, 1)
        expected += g.T @ g
        net(x)[:, 0].square().mean().backward()
        observer.end_step()
    (watched,) = observer._gradients.watches()
    assert watched.sketch.num_rows == 120  # autograd.grad above was seen as well
    assert watched.sketch.counted() == 12
    state = observer.state_dict()
    again = window(net, torch.randn(4, 6))
    again.load_state_dict(state)
    assert again._gradients.watches()[0].sketch.counted() == 12
    for one in (observer, again):
        rows = next(iter(one.observations().values())).grad_factor.double()
        torch.testing.assert_close(rows.T @ rows, 2 * expected, rtol=1e-5, atol=1e-12)
        one.close()


def test_what_is_not_finite_is_told_at_the_event_and_survives_a_checkpoint(runs, ahead):
    net = runs.mlp(64)
    observer = window(net, runs.inputs(4, 0))
    poisoned = runs.inputs(4200, 1)  # more rows than are buffered
    poisoned[0, 0] = float("nan")
    net(poisoned)
    state = observer.state_dict()
    again = window(net, runs.inputs(4, 0))
    again.load_state_dict(state)
    for one in (observer, again):
        with pytest.raises(Exception, match=r"at the input of '2': the rows hold NaN"):
            one.observations()
        one.close()
