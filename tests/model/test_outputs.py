"""What a network returns is compared before and after an event, whatever form it has, or it is said that nothing is."""

import json
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apoptosis import Apoptosis, shrink_
from apoptosis.errors import ArgumentError, NonFiniteError
from apoptosis.model.evaluate import compare
from apoptosis.model.outputs import difference, read


@dataclass
class Result:
    """What a detector says of one example."""

    scores: Tensor
    label: int
    name: str = "cat"


class Plain:
    """A result that is no container, with a part that has slots."""

    def __init__(self, scores: Tensor) -> None:
        self.inner = {"deep": [scores, None, "text"]}


class Net(nn.Module):
    """Two layers with planted duplicates; in evaluation its output has another form."""

    def __init__(self, form=None, train_form=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 4)
        with torch.no_grad():
            self.a.weight[8:], self.a.bias[8:] = self.a.weight[:8], self.a.bias[:8]
        self.form, self.train_form = form or (lambda y: y), train_form or (lambda y: y)

    def forward(self, x: Tensor):
        y = self.b(F.relu(self.a(x)))
        return self.train_form(y) if self.training else self.form(y)


COMPARED = {
    "list of tensors": list,
    "list of results": lambda y: [Result(row, int(row.argmax())) for row in y],
    "objects": lambda y: [Plain(row) for row in y],
    "dict of lists": lambda y: {"scores": list(y), "labels": y.argmax(1)},
    "python floats": lambda y: y.tolist(),
    "one float": lambda y: float(y.detach().sum()),
    "arrays": lambda y: {"scores": y.detach().numpy()},
    "complex": lambda y: torch.complex(y, 2 * y),
    "sparse": lambda y: y.to_sparse(),
}
NOT_COMPARED = {
    "argmax": lambda y: y.argmax(1),
    "list of class names": lambda y: [f"class {int(i)}" for i in y.argmax(1)],
    "booleans": lambda y: y > 0,
}


def _train(net, steps=60, log=None, **kwargs):
    x = torch.randn(128, 6, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    apo = Apoptosis(
        net, optimizer, x[:4], total_steps=steps, align=1, calibration=1.0, log=log, **{"tolerance": 1e-3, **kwargs}
    )
    events = []
    for _ in range(steps):
        out = net(x)
        loss = (out if isinstance(out, Tensor) else torch.stack(list(out.values())).sum()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if event := apo.step():
            events.append(event)
    return events, apo


@pytest.mark.parametrize("form", COMPARED)
def test_every_form_of_numbers_is_compared(form):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        events, _ = _train(Net(COMPARED[form]))
    assert events
    assert events[0].outputs == "evaluation mode"
    assert events[0].measured["output_rms"] < 1e-4
    net = Net(COMPARED[form]).eval()
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(2))
    before = net(x)
    with torch.no_grad():
        net.b.bias += torch.tensor([0.5, -0.5, 1.0, 0.25])
    assert compare([before], [net(x)], None, None).rms > 0.05


@pytest.mark.parametrize("form", NOT_COMPARED)
def test_without_numbers_training_mode_is_compared_and_that_is_said_once(form):
    log = []
    with pytest.warns(UserWarning, match=r"Net returns .* in evaluation mode, without numbers .* Give logits="):
        events, _ = _train(Net(NOT_COMPARED[form]), log=log.append)
    assert events
    assert events[0].outputs == "training mode"
    assert events[0].measured["output_rms"] < 1e-4
    assert "in training mode" in str(events[0])
    assert next(json.loads(json.dumps(line)) for line in log if line["kind"] == "event")["outputs"] == "training mode"
    if form == "argmax":
        assert events[0].measured["integers_changed"] == 0.0


def test_sanity_limit_falls_back_on_training_mode():
    with pytest.warns(UserWarning, match="training mode"):
        events, apo = _train(Net(lambda y: y.argmax(1)), tolerance=0.95, criterion="random", seed=3)
    assert apo.ledger().rolled_back
    assert not any(event.measured["output_rms"] > 0.25 for event in events)


def test_where_training_mode_gives_nothing_either_events_say_so():
    def losses(y):  # at random: two passes differ
        return {"loss": y.square().mean() * torch.rand(())}

    log = []
    with pytest.warns(UserWarning, match="nor can that of training mode .* 'outputs not compared'"):
        events, _ = _train(Net(lambda y: [f"{v:.0f}" for v in y[:, 0]], losses), log=log.append)
    assert events
    assert events[0].outputs == "not compared"
    assert "output_rms" not in events[0].measured
    assert "outputs not compared" in str(events[0])
    assert "output rms" not in str(events[0])
    told = next(line for line in log if line["kind"] == "event")
    assert told["outputs"] == "not compared"
    assert "output_rms" not in told["measured"]


def test_integers_alone_end_in_a_rollback_where_too_many_change():
    def wild(y):
        return {"loss": y.square().mean() * torch.rand(())}

    with pytest.warns(UserWarning, match="nor can that of training mode"):
        events, apo = _train(Net(lambda y: (1000 * y).long(), wild), tolerance=0.95, criterion="random", seed=3)
    assert apo.ledger().rolled_back
    assert all(event.measured["integers_changed"] <= 0.25 for event in events)


def test_a_probe_or_logits_is_the_remedy():
    class Asked(Net):
        def forward(self, x, scores=None):
            y = super().forward(x)
            return y if scores is not None or self.training else y.argmax(1)

    x = torch.randn(40, 6)
    net = Asked()
    with pytest.warns(UserWarning, match="without numbers"):
        Apoptosis(net, torch.optim.SGD(net.parameters(), lr=0.1), {"x": x[:4]})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Apoptosis(net, torch.optim.SGD(net.parameters(), lr=0.1), {"x": x[:4]}, probe={"x": x, "scores": True})
    net = Net(lambda y: {"call": lambda: y, "label": y.argmax(1)})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        Apoptosis(net, optimizer, x[:4], logits=lambda out: out["call"]())
    with pytest.raises(ArgumentError, match="logits=: the function fails on what the model returns"):
        Apoptosis(net, optimizer, x[:4], logits=lambda out: out["nothing"])


def test_one_shot_says_so_too():
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    with pytest.warns(UserWarning, match=r"without numbers .* Give a probe="):
        event = shrink_(Net(lambda y: y.argmax(1)), x[:4], [x], tolerance=1e-3)
    assert event
    assert event.outputs == "training mode"


# ---------------------------------------------------------------------- sizes that vary


class Decoding(Net):
    """Evaluation returns the boxes whose score is high enough: how many depends on the values."""

    def forward(self, x):
        y = self.b(F.relu(self.a(x)))
        if self.training:
            return y
        return [{"boxes": row[row > 0.1], "size": torch.tensor([8, 8])} for row in y]


def test_outputs_whose_size_varies_are_compared_in_training_mode():
    net = Decoding()
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    counts = [len(found["boxes"]) for found in net.eval()(x)]
    event = shrink_(net, x[:4], [x], tolerance=0.2)
    assert event
    assert [len(found["boxes"]) for found in net(x)] != counts  # else nothing was tried
    assert event.outputs == "training mode"
    assert 0 < event.measured["output_rms"] <= 0.25
    assert any("the size differs" in note for note in event.notes)


def test_what_keeps_its_size_is_compared_where_training_mode_says_nothing():
    class Two(Decoding):
        def forward(self, x):
            y = self.b(F.relu(self.a(x)))
            return (y, y[y > 0.1]) if not self.training else (y * torch.rand(()),)

    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    event = shrink_(Two(), x[:4], [x], tolerance=0.2)
    assert event
    assert event.outputs == "evaluation mode"
    assert 0 < event.measured["output_rms"] <= 0.25
    assert any("'[1]'" in note for note in event.notes)


def test_differences_by_hand():
    x, y = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[1.0, 1.0], [3.0, 0.0]])
    found = difference([read((x, torch.tensor([1, 2])))], [read((y, torch.tensor([1, 3])))])
    assert (found.moved, found.spread, found.compared) == (1.0, 2.0, 1)
    assert (found.whole, found.changed, found.resized) == (2, 1, ())
    fewer = difference([read({"a": x, "b": x})], [read({"a": x[:1], "c": x})])
    assert (fewer.compared, fewer.resized) == (0, ("a", "b", "c"))
    assert difference([read(torch.tensor(2.0))], [read(torch.tensor(3.0))]).spread == 4.0  # one number: its size
    held = read({"t": x, "seconds": 0.3})  # plain numbers beside tensors may be times
    assert list(held.numbers) == ["t"]
    assert read([[1.0, 2.0], [3.0, 4.0]]).numbers[""].shape == (2, 2)
    assert sorted(read([[1.0, 2.0], [3.0]]).numbers) == ["[0]", "[1]"]
    assert read(np.float32(2.0)).numbers[""].item() == 2.0
    assert read(torch.tensor([1 + 2j])).numbers[""].tolist() == [[1.0, 2.0]]


class Masks(nn.Module):
    """Scores of choices, of which some are none for some examples."""

    def __init__(self, none):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.none = nn.Linear(6, 32), nn.Linear(32, 5), none

    def forward(self, x):
        return self.b(torch.relu(self.a(x))).masked_fill((x[:, :5] > 0.5) & (x[:, :5] < 1.5), self.none)


@pytest.mark.parametrize("none", [float("-inf"), -1e9, torch.finfo(torch.float32).min])
def test_scores_that_a_mask_leaves_out_do_not_count(none):
    x = torch.randn(600, 6)
    net = Masks(none)
    masked = (x[:, :5] > 0.5) & (x[:, :5] < 1.5)
    before = net(x).detach()
    event = shrink_(net, x[:2], [x], tolerance=0.1)
    assert event.groups
    after = net(x).detach()
    moved = (after - before)[~masked].square().sum()
    mean = before.masked_fill(masked, 0).sum(0) / (~masked).sum(0)
    spread = (before - mean)[~masked].square().sum()
    assert event.measured["output_rms"] == pytest.approx(float((moved / spread).sqrt()), rel=1e-3)
    assert event.measured["flips"] == pytest.approx(float((before.argmax(1) != after.argmax(1)).double().mean()))


def test_infinity_that_comes_or_goes_is_a_change_without_bound():
    x = torch.tensor([[1.0, float("-inf")], [2.0, 3.0]])
    y = torch.tensor([[1.0, 0.5], [2.0, 3.0]])
    assert difference([read(y)], [read(x)]).moved == float("inf")
    for bad in (x, x.nan_to_num(neginf=float("nan"))):
        with pytest.raises(NonFiniteError):
            difference([read(bad)], [read(y)])


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own: masked tensors are a prototype
def test_masked_tensors_are_compared():
    class Masked(Masks):
        def forward(self, x):
            return torch.masked.masked_tensor(self.b(torch.relu(self.a(x))), x[:, :5] < 0.5)

    x = torch.randn(600, 6)
    event = shrink_(Masked(0.0), x[:2], [x], tolerance=0.1)
    assert event.groups
    assert 0 < event.measured["output_rms"] < 0.2
