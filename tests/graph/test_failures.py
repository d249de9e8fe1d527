"""A capture that fails names the module, the line, the operator and the way out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from apoptosis.errors import CaptureError
from apoptosis.graph import analyse
from apoptosis.graph.trace.failures import after_edit

X = torch.randn(3, 8)


class Net(nn.Module):
    """Two layers, and whatever `body` does between them."""

    def __init__(self, body: Callable[[nn.Module, torch.Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.table = nn.Linear(8, 6), nn.Linear(6, 2), nn.Embedding(5, 6)
        self.norm = nn.BatchNorm1d(6)
        self.body = body

    def forward(self, x, scale=1.0):
        return self.second(self.body(self, self.first(x)))


def message(model: nn.Module, args: tuple[Any, ...] = (X,), kwargs: dict[str, Any] | None = None) -> str:
    with pytest.raises(CaptureError) as caught:
        analyse(model, args, kwargs or {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


SHAPE, DTYPE, DEVICE = "must have the shape", "must have the dtype", "on the model's device"
CASES = {
    "wrong width": (lambda: Net(lambda m, h: h), (torch.randn(3, 7),), {}, "in 'first'", "aten.addmm", SHAPE),
    "wrong dtype": (lambda: Net(lambda m, h: h), (X.double(),), {}, "in 'first'", "aten.addmm", DTYPE),
    "numbers for indices": (lambda: nn.Embedding(5, 2), (X,), {}, "Embedding fails", "aten.embedding", DTYPE),
    "index too large": (lambda: nn.Embedding(5, 2), (torch.tensor([7]),), {}, "fails", "aten.embedding", SHAPE),
    "another device": (
        lambda: Net(lambda m, h: h), (X.to("meta"),), {}, "in 'first'", "aten.addmm", DEVICE
    ),
    "one example": (lambda: Net(lambda m, h: m.norm(h)), (X[:1],), {}, "in 'norm'", "", "two examples"),
    "missing argument": (lambda: Net(lambda m, h: h), (), {}, "Net", "", r"all that forward needs.*\(x, scale=1.0\)"),
    "unknown argument": (lambda: Net(lambda m, h: h), (X,), {"mask": X}, "", "", r"dict as keyword.*\(x, scale=1.0\)"),
    "batch of (inputs, labels)": (lambda: nn.Linear(8, 2), (X, X), {}, "Linear fails", "", "labels"),
    "an error of the user's": (lambda: Net(lambda m, h: [][1]), (X,), {}, "Net fails", "", "IndexError: list index"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "args", "kwargs", "where", "operator", "remedy"), CASES.values(), ids=CASES)
def test_what_a_failure_says(make, args, kwargs, where, operator, remedy) -> None:
    text = message(make(), args, kwargs)
    assert "in training mode" in text
    assert where in text
    assert (f"at operator {operator}:" in text) if operator else "at operator" not in text
    assert re.search(remedy, text)


def test_the_users_line_is_named() -> None:
    assert re.search(
        r"in 'second' \(test_failures\.py:\d+\), at operator aten\.addmm", message(Net(lambda m, h: h[:, :3]))
    )
    text = message(Net(lambda m, h: 1 / 0))
    assert re.search(r"^Net fails on example_input in training mode \(test_failures\.py:\d+\): ZeroDivisionError", text)


def test_a_failure_in_one_mode_alone_names_it() -> None:
    text = message(Net(lambda m, h: h if m.training else h[:, :3]))
    assert "in evaluation mode, in 'second'" in text


def test_not_initialised() -> None:
    for lazy in (nn.LazyLinear(4), nn.Sequential(nn.LazyBatchNorm1d(affine=False))):
        assert re.search(r"'.*' of \w+ is not initialised \(lazy\): run the model once", message(lazy))
    net = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(2))
    net(X)
    assert [g.num_channels for g in analyse(net, (X,)).groups if g.pin is None] == [6]


READS_DATA = {
    "item": lambda m, h: h * h.sum().item(),
    "if": lambda m, h: h if h.sum() > 0 else -h,
    "nonzero": lambda m, h: h[h[:, 0].nonzero().squeeze(1)],
    "mask": lambda m, h: h[h[:, 0] > 0],
}


@pytest.mark.parametrize("device", ["meta", "fake"])
@pytest.mark.parametrize("body", READS_DATA.values(), ids=READS_DATA)
def test_a_pass_that_reads_data_needs_data(body, device) -> None:
    if device == "meta":
        net, x = Net(body).to("meta"), X.to("meta")
    else:
        with FakeTensorMode():
            net, x = Net(body), torch.randn(3, 8)
    text = message(net, (x,))
    assert re.search(r"test_failures\.py:\d+", text)
    assert re.search("a pass cannot read numbers or sizes off its values.*: give a model with data", text)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_without_data_the_structure_is_the_same(device) -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 9),
            nn.Dropout(), nn.GELU(), nn.Linear(9, 2)
        )  # fmt: skip

    real = analyse(make(), (torch.randn(2, 3, 8, 8),))
    if device == "meta":
        with torch.device("meta"):
            net, x = make(), torch.randn(2, 3, 8, 8)
    else:
        with FakeTensorMode():
            net, x = make(), torch.randn(2, 3, 8, 8)
    found = analyse(net, (x,))
    assert [(g.name, g.num_channels, str(g.pin)) for g in found.groups] == [
        (g.name, g.num_channels, str(g.pin)) for g in real.groups
    ]
    assert [[s.key for s in g.sites] for g in found.groups] == [[s.key for s in g.sites] for g in real.groups]
    assert found.macs == real.macs
    assert type(net[0].weight) is not torch.Tensor


def test_a_failed_edit_gets_the_remedy_that_fits() -> None:
    assert "align=8" in after_edit(RuntimeError("strides should be multiple of 16 bytes"))
    assert "register_attributes" in after_edit(RuntimeError("expects split_sizes to sum to 8"), split=True)
    assert "literal width" in after_edit(RuntimeError("invalid shape"))
