"""Metrics against independent ways to compute them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import nn

from apoptosis.errors import DataError, NonFiniteError
from apoptosis.tools.recipes.datasets.parts import Part
from apoptosis.tools.recipes.metrics import accuracy, auc, evaluate


@given(st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=2, max_size=60))
def test_auc_counts_pairs_in_the_right_order_ties_half(rows):
    logits = torch.tensor([[-float(score), float(score)] for score, _ in rows])
    labels = torch.tensor([int(label) for _, label in rows])
    if len(set(labels.tolist())) < 2:
        with pytest.raises(DataError, match="both classes"):
            auc(logits, labels)
        return
    pairs = [(a > b) + 0.5 * (a == b) for a, p in rows for b, q in rows if p and not q]
    assert auc(logits, labels) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_auc_refuses_nan():
    with pytest.raises(NonFiniteError, match="NaN"):
        auc(torch.tensor([[0.0, 0.0], [0.0, float("nan")]]), torch.tensor([0, 1]))


def test_accuracy():
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 1.0]])
    assert accuracy(logits, torch.tensor([1, 0, 0, 0])) == 0.75


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_evaluation_does_not_depend_on_its_batches_and_leaves_no_trace(batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    model[1].eval()
    part = Part(inputs=torch.randn(20, 4), labels=torch.arange(20) % 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    found = evaluate(model, part, "auc", torch.device("cpu"), batch=batch)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        logits = model(part.inputs)
    expected = roc_auc_score(part.labels.numpy(), (logits[:, 1] - logits[:, 0]).numpy())
    assert found == pytest.approx(expected, abs=1e-9)
    assert np.isfinite(found)
