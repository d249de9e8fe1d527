"""Measurements of a finished network: latency and the memory of a training step.

Lives here: clocks and counters. Does not live here: training, tables.
"""

from __future__ import annotations

import io
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
BATCHES = (1, 256)
REPEATS = 15

# Run alone in a process: resident memory of three training steps beyond what the imports took.
_STEP = """
import io, resource, sys, torch
payload = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model, inputs = payload
optimizer = torch.optim.Adam(model.parameters(), fused=True)
for _ in range(3):
    optimizer.zero_grad(set_to_none=True)
    model.train()(inputs).square().mean().backward()
    optimizer.step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def latencies(models: Mapping[str, nn.Module], inputs: Tensor) -> dict[str, dict[str, float]]:
    """Return median seconds of a forward pass at batch 1 and 256, the networks in turn.

    Args:
        models: by name. inputs: at least 256 examples, or as many as there are.
    """
    times: dict[str, dict[str, list[float]]] = {name: {str(b): [] for b in BATCHES} for name in models}
    with torch.inference_mode():
        for repeat in range(REPEATS + 2):
            for name, model in models.items():
                model.eval()
                for batch in BATCHES:
                    start = time.perf_counter()
                    model(inputs[:batch])
                    if repeat >= 2:  # the first passes warm caches
                        times[name][str(batch)].append(time.perf_counter() - start)
    return {name: {batch: statistics.median(t) for batch, t in found.items()} for name, found in times.items()}


def training_memory(model: nn.Module, inputs: Tensor) -> int:
    """Return bytes that a process takes for three training steps of `model` on `inputs`, its weights included.

    Raises: RuntimeError: the process fails; its last line is told.
    """
    payload = io.BytesIO()
    torch.save((model, inputs), payload)
    done = subprocess.run([sys.executable, "-c", _STEP], input=payload.getvalue(), capture_output=True, cwd=ROOT)
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
