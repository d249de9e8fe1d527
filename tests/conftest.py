"""Small networks with redundant neurons, and the loops that train them."""

from __future__ import annotations

import copy
import random
import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from apoptosis import Apoptosis
from apoptosis.criteria import registry
from apoptosis.graph.rules.table import OPERATORS
from apoptosis.graph.trace import activations as neurons
from apoptosis.numerics import activations
from apoptosis.surgery import attributes

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as what a shell starts in the background inherits it
    signal.signal(signal.SIGINT, signal.default_int_handler)

STEPS, BATCH, CLASSES = 60, 128, 4


def inputs(rows: int, seed: int, shape: tuple[int, ...] = (6,)) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


def labels(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    return (flat[:, 0] > 0).long() * 2 + (flat[:, 1] > 0).long()


def mlp(width: int = 32, seed: int = 0, activation: type[nn.Module] = nn.ReLU, classes: int = CLASSES) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, classes)
    )


def cnn(seed: int = 0, groups: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=groups),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 9, CLASSES),
    )


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=3e-3)


def calibrated(apo: Apoptosis, overhead: float = 1.0) -> Apoptosis:
    """The calibration is part of the state: given by hand, so that tests do not depend on this machine's speed."""
    state = apo.state_dict()
    state["memory"]["overhead"] = overhead
    apo.load_state_dict(state)
    return apo


def start(model: nn.Module, optimizer: Any, example: Any = None, **arguments: Any) -> Apoptosis:
    arguments = {"total_steps": STEPS, "tolerance": 0.1, "align": 1, "calibration": 1.0, **arguments}
    return Apoptosis(model, optimizer, inputs(4, 99) if example is None else example, **arguments)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    apo: Apoptosis | None,
    *,
    first: int = 0,
    steps: int = STEPS,
    shape: tuple[int, ...] = (6,),
    after: Callable[[int], None] | None = None,
) -> list[Any]:
    """Run steps first .. steps, the same data whatever came before; returns the events."""
    events = []
    model.train()
    for step in range(first, steps):
        x = inputs(BATCH, step, shape)
        loss = nn.functional.cross_entropy(model(x), labels(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if apo is not None and (event := apo.step()):
            events.append(event)
        if after is not None:
            after(step)
    return events


def everything(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """All that training may depend on, copied: tensors, gradients, modes, hooks, random states, optimizer state."""
    found: dict[str, Any] = {
        "tensors": {k: v.detach().clone() for k, v in (*model.named_parameters(), *model.named_buffers())},
        "grads": {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
    }
    if optimizer is not None:
        found["optimizer"] = copy.deepcopy(optimizer.state_dict())
    return found


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal, tensors bitwise."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def doubled(model: nn.Sequential, producer: int) -> None:
    """Make the second half of a layer's neurons exact copies of the first half."""
    layer = model[producer]
    half = layer.weight.shape[0] // 2
    with torch.no_grad():
        layer.weight[half:] = layer.weight[:half]
        if layer.bias is not None:
            layer.bias[half:] = layer.bias[:half]


@pytest.fixture
def registries() -> Iterator[None]:
    """What a test registers is forgotten afterwards."""
    tables: list[dict[Any, Any]] = [
        OPERATORS,
        neurons._REGISTRY,
        activations._REGISTRY,
        registry._REGISTRY,
        attributes._REGISTERED,
    ]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture(scope="session")
def runs() -> SimpleNamespace:
    return SimpleNamespace(
        STEPS=STEPS,
        BATCH=BATCH,
        inputs=inputs,
        labels=labels,
        mlp=mlp,
        cnn=cnn,
        adam=adam,
        calibrated=calibrated,
        start=start,
        train=train,
        everything=everything,
        same=same,
        num_hooks=num_hooks,
        doubled=doubled,
    )
