"""What an event allocates beyond the model, its gradients and the optimizer's state, in tensors that live at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from apoptosis import Apoptosis, shrink_

WIDTH = 1024
LARGEST = 4 * WIDTH**2  # bytes of the largest layer


class Live(TorchDispatchMode):
    """The most bytes that results of operators held at once, by the memory that they lie in."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.most = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in (x for x in tree_flatten(out)[0] if isinstance(x, Tensor) and x.device.type == "cpu"):
            storage = tensor.untyped_storage()
            if storage.nbytes() >= LARGEST // 100 and storage.data_ptr() not in self._known:
                self._held[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self._held = {at: held for at, held in self._held.items() if not held[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._held.values()))
        return out


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(32, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))
    return nn.Sequential(*layers)


def held_by(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [value for one in optimizer.state.values() for value in one.values() if isinstance(value, Tensor)]
    return [*net.parameters(), *(p.grad for p in net.parameters() if p.grad is not None), *state]


@pytest.mark.parametrize("tolerance", [None, 0.3])  # the schedule's own, and one at which much goes
def test_window_and_event_hold_a_few_times_the_largest_layer(tolerance: float | None) -> None:
    net = network()
    basis, draws = torch.randn(8, 32), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)

    def train() -> None:
        x = torch.randn(128, 8, generator=draws) @ basis
        loss = nn.functional.cross_entropy(net(x), (x[:, 0] > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    apo = Apoptosis(net, optimizer, torch.randn(4, 32), total_steps=200, calibration=1.0, align=1, tolerance=tolerance)
    event, most = None, 0
    while not event:
        train()
        live = Live(held_by(net, optimizer))
        with live:
            event = apo.step()
        most = max(most, live.most)
    assert net[2].weight.shape[0] < WIDTH
    assert most <= 4.65 * LARGEST  # 512 rows of gradients for each of two sites are as much as one layer of this width


@pytest.mark.parametrize("tolerance", [0.005, 0.2])
def test_shrinking_holds_a_few_times_the_largest_layer(tolerance: float) -> None:
    net = network()
    basis = torch.randn(8, 32)
    batches = [torch.randn(512, 8) @ basis for _ in range(6)]
    with Live([*net.parameters(), *batches]) as live:
        event = shrink_(net, batches[0][:4], batches, tolerance=tolerance)
    assert event
    assert live.most <= 4 * LARGEST
