"""Measurements of a finished network: latency and the memory of a training step.

Holds: clocks and counters. Elsewhere: training, tables.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.paper.training import first_rows, outputs_of

ROOT = Path(__file__).resolve().parents[2]
REPEATS = 15

# Run alone in a process. A step of a tiny network first loads what torch loads late; then the peak is set back, so that
# reported is the most memory in use during three steps, the network's own included, beyond what was there before.
_STEP = """
import io, sys, torch

def step(model, inputs, optimizer):
    optimizer.zero_grad(set_to_none=True)
    model.train()(inputs).square().mean().backward()
    optimizer.step()

def used(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

tiny = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3), torch.nn.BatchNorm2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2))
step(tiny, torch.zeros(2, 1, 4, 4), torch.optim.Adam(tiny.parameters(), fused=True))
before = used("VmRSS")
model, inputs = torch.load(sys.argv[1], weights_only=False, mmap=True)
with torch.no_grad():
    for p in model.parameters():
        p.data = p.data.clone()
open("/proc/self/clear_refs", "w").write("5")
optimizer = torch.optim.Adam(model.parameters(), fused=True)
for _ in range(3):
    step(model, inputs, optimizer)
print(used("VmHWM") - before)
"""


def latencies(models: Mapping[str, nn.Module], inputs: Any, batches: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return median seconds of a forward pass at every batch size, the networks in turn.

    Args:
        models: by name. inputs: as many examples as the largest batch, or as there are. batches: sizes.
    """
    times: dict[str, dict[str, list[float]]] = {name: {str(b): [] for b in batches} for name in models}
    with torch.inference_mode():
        for repeat in range(REPEATS + 2):
            for name, model in models.items():
                model.eval()
                for batch in batches:
                    rows = first_rows(inputs, batch)
                    start = time.perf_counter()
                    outputs_of(model, rows)
                    if repeat >= 2:  # the first passes warm caches
                        times[name][str(batch)].append(time.perf_counter() - start)
    return {name: {batch: statistics.median(t) for batch, t in found.items()} for name, found in times.items()}


def training_memory(model: nn.Module, inputs: Tensor) -> int | None:
    """Return bytes that three training steps of `model` on `inputs` take at most, weights and optimizer included.

    None where the system does not say (no /proc).

    Raises: RuntimeError: the process fails; its last line is quoted.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        torch.save((model, inputs), file)
        done = subprocess.run([sys.executable, "-c", _STEP, str(file)], capture_output=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr.decode().strip().splitlines()[-1])
    return 1024 * int(done.stdout)


def energy_joules() -> float | None:
    """Read the processor's energy counter where the machine has one, in joules since some moment; else None."""
    counter = Path("/sys/class/powercap/intel-rapl:0/energy_uj")
    try:
        return int(counter.read_text()) / 1e6
    except (OSError, ValueError):
        return None
