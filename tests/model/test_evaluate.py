"""Reading, slicing and comparing outputs; leaving no trace on the model."""

import pytest
import torch
from torch import nn

from apoptosis.errors import ArgumentError, NonFiniteError
from apoptosis.model.evaluate import Probe, as_call, compare, logits_of, make_probe, outputs
from apoptosis.model.trials import check_runs, has_classes


def test_forms_of_a_call():
    x = torch.zeros(2, 3)
    assert as_call(x) == ((x,), {})
    assert as_call((x, x)) == ((x, x), {})
    assert as_call({"x": x}) == ((), {"x": x})
    with pytest.raises(ArgumentError, match="list"):
        as_call([x])
    with pytest.raises(ArgumentError, match="keys"):
        as_call({1: x})


@pytest.mark.parametrize(
    ("example", "given", "labelled"),
    [
        (torch.zeros(2, 3), torch.zeros(5, 3), False),
        (torch.zeros(2, 3), (torch.zeros(5, 3), torch.zeros(5, dtype=torch.long)), True),
        (torch.zeros(2, 3), [torch.zeros(5, 3), torch.zeros(5, dtype=torch.long)], True),
        ((torch.zeros(2, 3), torch.zeros(2)), (torch.zeros(5, 3), torch.zeros(5)), False),
        ((torch.zeros(2, 3),), ((torch.zeros(5, 3),), torch.zeros(5, dtype=torch.long)), True),
        ({"x": torch.zeros(2, 3)}, {"x": torch.zeros(5, 3)}, False),
        ({"x": torch.zeros(2, 3)}, ({"x": torch.zeros(5, 3)}, torch.zeros(5, dtype=torch.long)), True),
    ],
)
def test_forms_of_a_probe(example, given, labelled):
    found = make_probe(given, example)
    assert found.rows == 5
    assert (found.labels is not None) == labelled
    assert found.take(1, 3).rows == 2


@pytest.mark.parametrize("given", [[torch.zeros(5, 3)], "x", torch.zeros(0, 3), (torch.zeros(5, 3), torch.zeros(4))])
def test_unreadable_probe_is_refused(given):
    with pytest.raises(ArgumentError, match="probe"):
        make_probe(given, torch.zeros(2, 3))


def test_outputs_leave_no_trace():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    net.train()
    net[1].eval()
    modes = [m.training for m in net.modules()]
    buffers = {k: v.clone() for k, v in net.named_buffers()}
    state = torch.get_rng_state()
    probe = make_probe(torch.randn(2500, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 3))
    found = outputs(net, probe)
    assert sum(len(x) for x in found) == 2500
    assert torch.equal(torch.cat(found), torch.cat(outputs(net, probe, chunk=100)).view(2500, 2)) or torch.allclose(
        torch.cat(found), torch.cat(outputs(net, probe, chunk=100))
    )
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, buffers[k]) for k, v in net.named_buffers())


def test_flips_losses_and_margins_against_a_slow_twin():
    gen = torch.Generator().manual_seed(1)
    a, b = torch.randn(300, 4, generator=gen), torch.randn(300, 4, generator=gen) * 0.3
    labels = torch.randint(0, 4, (300,), generator=gen)
    found = compare([a[:100], a[100:]], [(a + b)[:100], (a + b)[100:]], labels, None)
    flips = losses = close = 0
    for x, y, label in zip(a, a + b, labels, strict=True):
        i, j = int(x.argmax()), int(y.argmax())
        flips += i != j
        losses += i != j and i == int(label)
        top = x.sort().values
        close += float(top[-1] - top[-2]) <= 2 * float((y - x).abs().max())
    assert (found.flips, found.losses) == (flips, losses)
    assert found.margin_share == pytest.approx(close / 300)
    assert found.flips <= close


def test_relative_rms_and_constant_outputs():
    x = torch.randn(50, 3)
    assert compare([x], [x], None, None).rms == 0.0
    assert compare([torch.ones(4, 3)], [torch.ones(4, 3)], None, None).rms == 0.0
    assert compare([torch.ones(4, 3)], [2 * torch.ones(4, 3)], None, None).rms == float("inf")
    broken = x.clone()
    broken[0, 0] = float("nan")
    assert compare([x], [broken], None, None).rms == float("inf")
    with pytest.raises(NonFiniteError):
        compare([broken], [x], None, None)


def test_one_example_has_no_spread_to_relate_to():
    x = torch.tensor([[3.0, 4.0]])
    assert compare([x], [x + torch.tensor([[0.0, 0.5]])], None, None).rms == pytest.approx(0.1)
    rows = torch.randn(257, 2, generator=torch.Generator().manual_seed(0))
    parts = [[rows[:256], rows[256:]], [1.1 * rows[:256], 1.1 * rows[256:]]]
    spread = (rows[:256] - rows[:256].mean(0)).square().sum()
    assert compare(*parts, None, None).rms == pytest.approx(float((0.01 * rows.square().sum() / spread).sqrt()))


def test_what_counts_as_classes():
    assert logits_of(torch.zeros(3, 1), None) is None
    assert logits_of(torch.zeros(3, 2, 2), None) is None
    assert logits_of((torch.zeros(3, 2), torch.zeros(3, 2)), None) is None
    assert logits_of((torch.zeros(3, 2), torch.zeros(3, 2)), lambda out: out[0]).shape == (3, 2)
    with pytest.raises(ArgumentError, match="logits="):
        logits_of(torch.zeros(3, 1), lambda out: out)
    assert has_classes(nn.Linear(3, 2), ((torch.zeros(2, 3),), {}), None)
    assert not has_classes(nn.Linear(3, 1), ((torch.zeros(2, 3),), {}), None)


class SequenceFirst(nn.Module):
    """(T, N, C) -> (N, K): examples along dimension 1."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        return self.head(x.mean(0))


def test_examples_along_another_dimension_are_found():
    net, x = SequenceFirst(), torch.randn(800, 6, 10, generator=torch.Generator().manual_seed(0))
    probe = check_runs(net, make_probe(x, x[:5]))
    assert (probe.rows, probe.cut) == (6, (1,))
    assert probe.take(1, 4).args[0].shape == (800, 3, 10)
    narrow = check_runs(net, make_probe(x[:, :2], x[:5, :2]))  # two sequences look like two examples
    assert (narrow.rows, narrow.cut) == (2, (1,))
    unmeasured = make_probe(x, x[:5])
    found = outputs(net, unmeasured)
    with pytest.raises(ArgumentError, match="256 rows of the inputs give outputs of 6 rows"):
        compare(found, found, None, None, probe=unmeasured)
    assert has_classes(net, ((x[:5],), {}), None)
    check_runs(nn.Linear(10, 4), make_probe(x[:, 0], x[:2, 0]))


def test_training_inputs_are_run_as_they_are_and_count_by_the_rows_of_the_outputs():
    net, x = SequenceFirst(), torch.randn(800, 6, 10, generator=torch.Generator().manual_seed(0))
    probe = Probe(args=(x,), kwargs={}, labels=None, rows=800, held_out=False)
    before = outputs(net, probe)
    assert len(before) == 1
    found = compare(before, [-y for y in before], None, None, probe=probe)
    assert found.readable
    assert found.rms > 0
    assert found.rows == 6


def test_training_inputs_of_another_form_claim_nothing():
    net, x = nn.Sequential(nn.Flatten(0, 1), nn.Linear(10, 4)), torch.randn(8, 6, 10)
    probe = Probe(args=(x,), kwargs={}, labels=None, rows=8, held_out=False)
    found = compare(outputs(net, probe), [-y for y in outputs(net, probe)], None, None, probe=probe)
    assert not found.readable
    assert found.rms > 0
    assert (found.flips, found.rows) == (0, 8)


def test_rows_of_what_logits_reads_count():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    probe = make_probe(x, x[:2])
    net = nn.Linear(3, 4)
    check_runs(net, probe, lambda out: out)
    with pytest.raises(ArgumentError, match="outputs of 4 rows"):
        check_runs(net, probe, lambda out: out.T)


@pytest.mark.parametrize("labels", [torch.zeros(5), torch.ones(5).bool(), torch.tensor([0, 1, -1, 0, 0])])
def test_labels_are_class_indices(labels):
    with pytest.raises(ArgumentError, match="labels"):
        make_probe((torch.zeros(5, 3), labels), torch.zeros(2, 3))


def test_labels_beyond_the_classes_are_refused():
    net, x = nn.Linear(3, 2), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    probe = make_probe((x, torch.tensor([0, 1, 2, 0, 0])), x[:2])
    with pytest.raises(ArgumentError, match=r"0 \.\. 1"):
        check_runs(net, probe)
    found = outputs(net, probe)
    with pytest.raises(ArgumentError, match=r"0 \.\. 1"):
        compare(found, found, probe.labels, None)
