"""The default dtype and device are the user's: nothing of the library's comes out otherwise because of them.

Each tensor that the library makes says its dtype and device; read off the source, and shown by whole runs that come to
the same bits under every default.
"""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import apoptosis.errors
from apoptosis import Apoptosis, shrink_

SRC = Path(apoptosis.errors.__file__).parent
FLOATING = {"zeros", "ones", "empty", "full", "eye", "rand", "randn", "linspace", "logspace", "normal", "tensor"}
FLOATING |= {"scalar_tensor", "empty_strided", "complex", "hann_window", "hamming_window"}  # by the default dtype
WHOLE = {"arange", "randint", "randperm", "triu_indices", "tril_indices", "as_tensor", "asarray"}  # integers, as used


def _makes() -> Iterator[tuple[str, str, set[str | None]]]:
    for path in sorted(SRC.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
                where = f"{path.relative_to(SRC)}:{node.lineno} {ast.unparse(node)[:60]}"
                yield node.func.attr, where, {keyword.arg for keyword in node.keywords}


def test_every_tensor_that_is_made_says_its_dtype_and_device() -> None:
    found = list(_makes())
    assert len([name for name, *_ in found if name in FLOATING | WHOLE]) > 60  # the reading itself works
    without_dtype = [where for name, where, given in found if name in FLOATING and "dtype" not in given]
    without_device = [where for name, where, given in found if name in FLOATING | WHOLE and "device" not in given]
    assert not without_dtype
    assert not without_device


# ---------------------------------------------------------------------- whole runs


class Mixed(nn.Module):
    """A linear layer, a convolution, a norm, attention (read by replay), and a functional site."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 16, 3, stride=2)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.hidden = nn.Linear(16, 24)
        self.out = nn.Parameter(torch.empty(5, 24, dtype=torch.float32).normal_(0, 0.2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(F.relu(self.norm(self.first(x)))).flatten(2).mT
        h = h + F.scaled_dot_product_attention(self.query(h), self.key(h), self.value(h))
        return F.linear(F.relu(self.hidden(h.mean(1))), self.out)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _without_device() -> Iterator[None]:
    """What is made without a device has no data: whoever reads it fails."""
    with torch.device("meta"):
        yield


def _network(dtype: torch.dtype) -> nn.Module:
    with _default_dtype(torch.float32):
        torch.manual_seed(0)
        net = Mixed()
        with torch.no_grad():  # planted duplicates, so that events are certain
            net.hidden.weight[12:] = net.hidden.weight[:12]
            net.hidden.bias[12:] = net.hidden.bias[:12]
            net.first.weight[6:] = net.first.weight[:6]
            net.first.bias[6:] = net.first.bias[:6]
    return net.to(dtype)


def _trained(
    dtype: torch.dtype, tolerance: float, net: nn.Module | None = None
) -> tuple[dict[str, Tensor], list[dict[str, tuple[int, int]]]]:
    net = net or _network(dtype)
    data = torch.Generator().manual_seed(1)
    x = torch.randn(64, 1, 7, 7, generator=data, dtype=torch.float32, device="cpu").to(dtype)
    y = torch.randint(0, 5, (64,), generator=data, device="cpu")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    apo = Apoptosis(net, optimizer, x[:8], tolerance=tolerance, total_steps=30, align=1, calibration=1.0)
    events = []
    for _ in range(30):
        F.cross_entropy(net(x).float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if event := apo.step():
            events.append(dict(event.groups))
    return net.state_dict(), events


@pytest.mark.parametrize("tolerance", [0.2, 0.0])
def test_runs_come_to_the_same_bits_under_every_default(tolerance: float) -> None:
    plain, events = _trained(torch.float32, tolerance)
    assert events
    for default in (torch.float64, torch.bfloat16, torch.float16):
        with _default_dtype(default):
            state, told = _trained(torch.float32, tolerance)
        assert told == events
        assert all(torch.equal(state[name], plain[name]) for name in plain)
    net = _network(torch.float32)
    with _without_device():
        state, told = _trained(torch.float32, tolerance, net)
    assert told == events
    assert all(torch.equal(state[name], plain[name]) for name in plain)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_networks_of_the_default_dtype_train(default: torch.dtype) -> None:
    with _default_dtype(default):
        state, events = _trained(default, 0.3)
    assert events
    assert all(value.isfinite().all() for value in state.values())
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {default}


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_one_shot_is_the_same_under_every_default(default: torch.dtype) -> None:
    x = torch.randn(400, 1, 7, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    one, other = _network(torch.float32).eval(), _network(torch.float32).eval()
    event = shrink_(one, x[:4], [x], tolerance=0.1)
    with _default_dtype(default):
        again = shrink_(other, x[:4], [x], tolerance=0.1)
    assert event
    assert event.groups == again.groups
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
