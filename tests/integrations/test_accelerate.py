"""Accelerate's real Accelerator: prepare, accumulate, save_state, load_state; what it cannot do is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("accelerate", reason="the extra 'accelerate' is not installed")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from apoptosis import Apoptosis
from apoptosis.errors import ArgumentError, CheckpointError
from apoptosis.integrations.accelerate import register
from apoptosis.integrations.widths_file import WIDTHS_FILE

STEPS = 40


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """Accelerators of one process share their settings."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def prepared(batch: int = 256, **options: Any) -> tuple[Accelerator, nn.Module, Any, Any, Apoptosis]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 3))
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x, x[:, :3]), batch_size=batch)
    accelerator = Accelerator(cpu=True, **options)
    model, optimizer, loader = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-2), loader)
    apo = Apoptosis(model, optimizer, x, total_steps=STEPS, tolerance=0.1, align=1, calibration=0.0)
    register(accelerator, apo)
    return accelerator, model, optimizer, loader, apo


def train(run: tuple[Accelerator, nn.Module, Any, Any, Apoptosis], steps: int, every: Any = None) -> None:
    accelerator, model, optimizer, loader, apo = run
    for step in range(steps):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.mse_loss(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    apo.step()
        if every is not None:
            every(step + 1)


def test_a_state_is_saved_and_loaded_and_the_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Into a network that was built anew; in the same one it goes back to what it was before all events."""
    run = prepared()
    accelerator, model, *_ = run
    kept = {2: tmp_path / "early", 30: tmp_path / "late"}
    train(run, STEPS, lambda step: accelerator.save_state(str(kept[step])) if step in kept else None)
    final, narrow = {name: value.clone() for name, value in model.state_dict().items()}, model[0].out_features
    assert narrow < 32
    again = prepared()
    again[0].load_state(str(kept[30]))
    assert again[1][0].out_features == narrow
    train(again, STEPS - 30)
    assert all(torch.equal(value, again[1].state_dict()[name]) for name, value in final.items())
    accelerator.load_state(str(kept[2]))
    assert model[0].out_features == 32
    train(run, STEPS - 2)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in final.items())


def test_accumulation_counts_steps_of_the_optimizer_and_bf16_shrinks() -> None:
    run = prepared(batch=64, gradient_accumulation_steps=4, mixed_precision="bf16")
    train(run, STEPS)
    assert run[4].status().startswith("step 40 of 40")
    assert run[1][0].out_features < 32


def test_what_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    accelerator, model, *_ = run = prepared()
    own = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    other = Apoptosis(own, torch.optim.SGD(own.parameters(), lr=0.1), torch.ones(2, 6))
    with pytest.raises(ArgumentError, match="did not prepare this model"):
        register(accelerator, other)
    accelerator.save_state(str(tmp_path / "plain"))
    (tmp_path / "plain" / WIDTHS_FILE).unlink()
    train(run, STEPS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"has no {WIDTHS_FILE}"):
        accelerator.load_state(str(tmp_path / "plain"))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
