"""Global response norms: found over fake tensors as over real ones, and tried once for modules that are alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from apoptosis.graph import analyse
from apoptosis.graph.trace.fakes import make_fake
from apoptosis.modules import response_norms as responses
from apoptosis.modules.response_norms import Response, computes_response


class Norm(nn.Module):
    """Channels last."""

    def __init__(self, width: int, power: float = 2.0) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.zeros(1, 1, 1, width)), nn.Parameter(torch.zeros(1, 1, 1, width))
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        size = torch.norm(x, p=self.power, dim=(1, 2), keepdim=True)
        return self.gamma * (x * (size / (size.mean(-1, keepdim=True) + 1e-6))) + self.beta + x


class Affine(nn.Module):
    """What is no norm at all, but has a gain and a bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        return x * self.weight + self.bias


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.grn, self.second, self.head = nn.Linear(3, 6), Norm(6), nn.Linear(6, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.grn(torch.relu(self.first(x)))).mean((1, 2)))


def test_fakes_are_as_open_as_real_ones() -> None:
    net, x = Block(), torch.randn(2, 4, 4, 3)
    real = [(g.name, g.pin is None) for g in analyse(net, (x,)).groups]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    make_fake(net, mode)
    assert [(g.name, g.pin is None) for g in analyse(net, (mode.from_tensor(x),)).groups] == real
    assert real[0] == ("first", True)


def test_modules_that_are_alike_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[nn.Module] = []
    known = responses._tried
    monkeypatch.setattr(responses, "_tried", lambda module, names: (tried.append(module), known(module, names))[1])
    monkeypatch.setattr(responses, "_TRIED", type(responses._TRIED)())
    first = [Norm(6), Norm(6), Norm(8)]
    assert [computes_response(m) for m in first] == [Response(-1, 1e-6, "gamma", "beta")] * 3
    assert tried == [first[0], first[2]]
    other = Norm(6, power=1.0)  # alike in class and shapes
    assert computes_response(other) is None
    assert tried[-1] is other
    affine = Affine(6)  # holds a list: what it computes may depend on it
    assert computes_response(affine) is computes_response(affine) is None
    assert tried[-2:] == [affine] * 2
    assert affine.calls == []
