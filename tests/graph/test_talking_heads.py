"""Scores that a layer mixes over the heads (CaiT), as gates and position scores do (ConViT): values may shrink."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from apoptosis import shrink_
from apoptosis.graph import analyse

HEADS, SIZE = 2, 6


class Talking(nn.Module):
    """Attention with linear maps over the heads before and after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, HEADS * SIZE) for _ in range(3))
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)
        self.proj, self.head = nn.Linear(HEADS * SIZE, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).reshape(*x.shape[:2], HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = self.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(self.proj((weights @ v).transpose(1, 2).reshape(*x.shape[:2], -1)).mean(1))


def test_the_number_of_heads_stays_and_the_values_may_go() -> None:
    groups = {g.name: g for g in analyse(Talking(), (torch.randn(2, 5, 8),)).groups}
    assert (groups["v"].pin, groups["v"].rows, groups["v"].num_channels) == (None, HEADS, HEADS * SIZE)
    assert groups["q"].pin is None
    assert groups["after"].pin is not None
    whole = [g for g in groups.values() if g.name.endswith(":heads") and g.pin is None]
    assert not {m.tensor for g in whole for m in g.members} & {"v.weight", "after.weight"}


def test_planted_values_go_at_tolerance_0() -> None:
    torch.manual_seed(0)
    model = Talking().double()
    with torch.no_grad():  # in each head one value is another one, times two
        for tensor in (model.v.weight, model.v.bias):
            rows = tensor.view(HEADS, SIZE, -1)
            rows[:, 4] = 2.0 * rows[:, 1]
    before, x = copy.deepcopy(model), torch.randn(64, 5, 8, dtype=torch.float64)
    shrink_(model, x[:2], [x], tolerance=0.0, align=1)
    assert model.v.out_features == HEADS * (SIZE - 1)
    assert model.after.weight.shape == (HEADS, HEADS)
    torch.testing.assert_close(model(x), before(x), rtol=1e-9, atol=1e-11)
