"""Queries multiplied more than once in a module: with keys, and with embeddings of relative positions (SAM)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from apoptosis import shrink_
from apoptosis.graph import analyse

HEADS, SIZE, LENGTH = 2, 6, 5


class Decomposed(nn.Module):
    """Attention whose scores have two further terms, queries times embeddings of distances, as in SAM and MViT."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, HEADS * SIZE) for _ in range(3))
        self.proj, self.head = nn.Linear(HEADS * SIZE, 8), nn.Linear(8, 3)
        self.rows, self.columns = (nn.Parameter(torch.randn(2 * LENGTH - 1, SIZE)) for _ in range(2))
        place = torch.arange(LENGTH)
        self.register_buffer("places", place[:, None] - place[None, :] + LENGTH - 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).reshape(len(x), LENGTH, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = (q * 0.4) @ k.transpose(-2, -1)
        scores = scores + torch.einsum("bhqc,qkc->bhqk", q, self.rows[self.places])
        scores = scores + torch.einsum("bhqc,qkc->bhqk", q, self.columns[self.places])
        return self.head(self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(len(x), LENGTH, -1)).mean(1))


def test_each_product_is_a_site_of_its_own() -> None:
    structure = analyse(Decomposed(), (torch.randn(2, LENGTH, 8),))
    queries = next(g for g in structure.groups if any(m.tensor == "q.weight" for m in g.members))
    assert queries.pin is None
    assert queries.num_channels == SIZE  # the heads share the embeddings: one channel in all
    keys = [site.key for site in queries.sites]
    assert len(keys) == len(set(keys)) == 3
    again = analyse(Decomposed(), (torch.randn(2, LENGTH, 8),))
    assert [[s.key for s in g.sites] for g in again.groups] == [[s.key for s in g.sites] for g in structure.groups]


def test_what_no_product_reads_goes_at_tolerance_0() -> None:
    torch.manual_seed(0)
    model = Decomposed().double()
    with torch.no_grad():  # two channels of which the queries have none
        for tensor in (model.q.weight, model.q.bias):
            tensor.view(HEADS, SIZE, -1)[:, [1, 4]] = 0.0
    before, x = copy.deepcopy(model), torch.randn(64, LENGTH, 8, dtype=torch.float64)
    shrink_(model, x[:2], [x], tolerance=0.0, align=1)
    assert model.rows.shape == model.columns.shape == (2 * LENGTH - 1, SIZE - 2)
    assert model.q.out_features == model.k.out_features == HEADS * (SIZE - 2)
    torch.testing.assert_close(model(x), before(x), rtol=1e-10, atol=1e-12)


def test_redundant_queries_that_the_embeddings_still_read_are_not_lost() -> None:
    torch.manual_seed(0)
    model = Decomposed().double()
    with torch.no_grad():  # what the keys lack, the embeddings read
        for tensor in (model.k.weight, model.k.bias):
            tensor.view(HEADS, SIZE, -1)[:, [1, 4]] = 0.0
    before, x = copy.deepcopy(model), torch.randn(64, LENGTH, 8, dtype=torch.float64)
    shrink_(model, x[:2], [x], tolerance=0.0, align=1)
    torch.testing.assert_close(model(x), before(x), rtol=1e-10, atol=1e-12)
