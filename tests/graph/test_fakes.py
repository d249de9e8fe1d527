"""Passes over fake tensors: what is computed from constants has numbers, and channels are found as on real ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor

from apoptosis.errors import CaptureError
from apoptosis.graph import analyse
from apoptosis.graph.trace.fakes import LARGE, built_fake, make_fake


class Windows(nn.Module):
    """Attention with a table of biases, looked up by relative position, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.head = nn.Linear(6, 24), nn.Linear(8, 6), nn.Linear(6, 3)
        self.table = nn.Parameter(torch.zeros(7, 2))
        place = torch.arange(4)
        self.register_buffer("index", (place[:, None] - place[None, :] + 3).view(-1))
        self.rates = [x.item() for x in torch.linspace(0, 0.3, 3)]  # read while it is built

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(-1, 4, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index].view(4, 4, -1).permute(2, 0, 1)
        scores = (q * 0.5) @ k.transpose(-2, -1) + bias
        return self.head(self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, 8)).mean(1))


class Reads(nn.Module):
    """Reads numbers off tensors that it makes in its own pass, writes into one, and picks by literal numbers."""

    def __init__(self, of_data: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.of_data = nn.Linear(8, 6), nn.Linear(6, 2), of_data

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if torch.rand([]).item() < 0.0 or torch.arange(4).sum().item() != 6:
            return h
        kept = torch.zeros(x.shape[0], 6)
        kept[:, :3] = h[:, :3]
        part = kept[:, 3:]
        part.copy_(h[:, torch.tensor([3, 4, 5])])
        if self.of_data:
            h = h * kept.sum().item()
        return self.second(h + kept)


def told(model: nn.Module, *args: Tensor) -> list[tuple[object, ...]]:
    structure = analyse(model, args)
    rows = [(g.name, g.num_channels, None if g.pin is None else g.pin.reason, g.rows) for g in structure.groups]
    return [*rows, ("macs", structure.macs)]


def fake(make: type[nn.Module], *args: object) -> nn.Module:
    with built_fake() as mode:
        model = make(*args)
    make_fake(model, mode)
    assert all(isinstance(t, FakeTensor) for t in (*model.parameters(), *model.buffers()))
    return model


@pytest.mark.parametrize(("make", "shape"), [(Windows, (2, 4, 6)), (Reads, (3, 8))], ids=["windows", "reads"])
def test_channels_are_those_of_a_pass_on_real_tensors(make, shape) -> None:
    x = torch.randn(shape)
    real = told(make(), x)
    assert any(row[2] is None for row in real[:-1])
    assert told(fake(make), x) == real


def test_a_model_under_a_mode_of_the_user_s() -> None:
    real = told(Windows(), torch.randn(2, 4, 6))
    model = Windows()
    mode = FakeTensorMode()
    make_fake(model, mode)
    with mode:
        x = torch.randn(2, 4, 6)
    assert told(model, x) == real
    with mode:
        assert told(model, x) == real
    assert mode.allow_non_fake_inputs is False


def test_what_was_written_from_fake_tensors_is_no_number() -> None:
    with pytest.raises(CaptureError, match="cannot read numbers"):
        analyse(fake(Reads, True), (torch.randn(3, 8),))


def test_nothing_large_is_made() -> None:
    with built_fake() as mode:
        model = nn.Linear(4, LARGE)
        assert isinstance(model.weight, FakeTensor)
        assert not isinstance(torch.zeros(5), FakeTensor)
        model.tied = nn.Linear(4, 2)
        model.again = model.tied
    make_fake(model, mode)
    assert model.tied.weight is model.again.weight
    assert isinstance(model.tied.weight, FakeTensor)
    assert isinstance(model.tied.weight, nn.Parameter)
