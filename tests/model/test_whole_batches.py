"""Inputs that cannot be cut into examples, or along another dimension than the first: run whole, or cut as measured."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apoptosis import Apoptosis, shrink_
from apoptosis.errors import ArgumentError
from apoptosis.model.evaluate import make_probe
from apoptosis.model.trials import check_runs

N = 600  # more than a probe of held-out examples runs at once


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _planted(linear: nn.Linear) -> None:
    half = linear.out_features // 2
    with torch.no_grad():
        linear.weight[half:], linear.bias[half:] = linear.weight[:half], linear.bias[:half]


class Graph(nn.Module):
    """Full-batch graph network with an adjacency matrix, dense or sparse."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 4)
        _planted(self.a)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        h = F.relu(self.a(torch.mm(adjacency, x)))
        return self.b(torch.mm(adjacency, h))


class Bags(nn.Module):
    """Words of all texts one after the other, and where each text begins."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bag, self.a, self.b = nn.EmbeddingBag(50, 6), nn.Linear(6, 16), nn.Linear(16, 4)
        _planted(self.a)

    def forward(self, words: Tensor, offsets: Tensor) -> Tensor:
        return self.b(F.relu(self.a(self.bag(words, offsets))))


class TimeFirst(nn.Module):
    """(time, batch, features) and lengths (batch,)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.a, self.b = nn.GRU(6, 8), nn.Linear(8, 16), nn.Linear(16, 4)
        _planted(self.a)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        states, _ = self.rnn(x)
        last = states[lengths - 1, torch.arange(x.shape[1])]
        return self.b(F.relu(self.a(last)))


class Towers(nn.Module):
    """Queries and documents of other numbers: scores of all pairs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(5, 4)
        _planted(self.a)

    def forward(self, queries: Tensor, documents: Tensor) -> Tensor:
        return self.b(F.relu(self.a(queries))) @ self.c(documents).T


def _adjacency(sparse: bool) -> Tensor:
    rows = torch.rand(N, N, generator=torch.Generator().manual_seed(3)).gt(0.98).float() + torch.eye(N)
    rows = rows / rows.sum(1, keepdim=True)
    return rows.to_sparse() if sparse else rows


def _case(name: str) -> tuple[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return a network, an example input and a batch."""
    if name.startswith("graph"):
        call = _random(N, 6), _adjacency(name.endswith("sparse"))
        return Graph(), call, call
    if name == "bags":
        words = torch.randint(0, 50, (5 * N,), generator=torch.Generator().manual_seed(0))
        return Bags(), (words[:20], torch.arange(0, 20, 5)), (words, torch.arange(0, 5 * N, 5))
    if name == "time first":
        lengths = torch.randint(1, 300, (N,), generator=torch.Generator().manual_seed(0))
        return TimeFirst(), (_random(5, 4, 6), torch.tensor([5, 2, 1, 4])), (_random(300, N, 6), lengths)
    return Towers(), (_random(4, 6), _random(3, 5)), (_random(N, 6), _random(431, 5))


CASES = ["graph", "graph sparse", "bags", "time first", "towers"]


@pytest.mark.parametrize("name", CASES)
def test_one_shot_runs_batches_whole(name):
    net, example, batch = _case(name)
    before = net.eval()(*batch)
    event = shrink_(net, example, [batch], tolerance=1e-3)
    assert event.groups["a"] == (16, 8)
    assert event.measured["output_rms"] < 1e-4
    assert torch.allclose(net(*batch), before, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_training_runs_batches_whole(name):
    net, example, batch = _case(name)
    if name == "time first":
        batch = (batch[0][:20], batch[1].clamp(max=20))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    apo = Apoptosis(net, optimizer, example, tolerance=1e-3, total_steps=30, align=1, calibration=1.0)
    events = []
    for _ in range(30):
        net(*batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        events += [event] if (event := apo.step()) else []
    assert events
    assert events[0].groups["a"] == (16, 8)
    assert events[0].measured["output_rms"] < 1e-4


@pytest.mark.parametrize(
    ("name", "rows", "cut"),
    [
        ("graph", N, None),
        ("graph sparse", N, None),
        ("bags", N, None),
        ("time first", N, (1, 0)),
        ("towers", N, (0, None)),
    ],
)
def test_the_batch_dimension_of_every_input_is_measured(name, rows, cut):
    net, example, batch = _case(name)
    probe = check_runs(net, make_probe((batch, torch.zeros(N, dtype=torch.int64)), example))
    assert (probe.rows, probe.cut) == (rows, cut)
    assert [piece.rows for piece in probe.pieces()] == ([N] if cut is None else [256, 256, 88])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("labelled", [True, False])
def test_a_probe_of_the_users_is_run_whole_or_cut_as_measured(name, labelled):
    net, example, batch = _case(name)
    with torch.no_grad():
        labels = net.eval()(*batch).argmax(1)
    probe = (batch, labels) if labelled else batch
    event = shrink_(net, example, [batch], tolerance=1e-3, probe=probe)
    assert event.groups["a"] == (16, 8)
    assert event.measured["flips"] < 0.01
    whole = name not in ("time first", "towers")  # cut into blocks of an eighth, one per attempt
    assert event.measured_on == f"on {N if whole else N // 8} held-out examples"


def test_examples_that_influence_one_another_are_not_cut():
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x - x.mean(0))

    assert check_runs(Centred(), make_probe(_random(N, 6), _random(2, 6))).cut is None
    assert check_runs(nn.Linear(6, 4), make_probe(_random(N, 6), _random(2, 6))).cut == (0,)
    assert check_runs(nn.Linear(6, 4), make_probe(_random(1, 6), _random(2, 6))).cut is None


def test_labels_of_another_number_are_refused():
    net, example, batch = _case("bags")
    with pytest.raises(ArgumentError, match=f"431 labels for outputs of {N} rows"):
        check_runs(net, make_probe((batch, torch.zeros(431, dtype=torch.int64)), example))


def test_a_budget_over_a_probe_that_is_run_whole():
    net, example, batch = _case("graph")
    with torch.no_grad():
        labels = net.eval()(*batch).argmax(1)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    apo = Apoptosis(
        net,
        optimizer,
        example,
        tolerance=1e-3,
        total_steps=30,
        align=1,
        calibration=1.0,
        budget=0.05,
        probe=(batch, labels),
    )
    events = []
    for _ in range(30):
        net(*batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        events += [event] if (event := apo.step()) else []
    assert events
    accuracy = next(c for c in events[0].certificates if c.kind == "accuracy")
    assert accuracy.rows == N
    assert 0 < apo.ledger().accuracy_cost <= 0.05
