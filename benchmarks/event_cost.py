"""Measure what an event costs in memory and processor time, by width.

    python -m benchmarks.event_cost                 all widths, each in a process of its own
    python -m benchmarks.event_cost --width 1024    one of them, in this process

Lives here: a multilayer perceptron with two hidden layers of equal width, trained until its first event, and the same
network shrunk in one shot. Does not live here: whole runs (benchmarks.paper), the table (table.py).
Memory is the peak resident size beyond that of training, sampled every 2 ms; times are processor seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apoptosis import Apoptosis, shrink_
from apoptosis.recipes.folder import write_json
from apoptosis.recipes.machine import machine, versions

RESULTS = Path(__file__).parent / "results"
WIDTHS = (512, 1024, 2048)
SEED, BATCH, INPUTS, FACTORS, STEPS = 0, 256, 64, 16, 200


class Peak:
    """Peak resident memory of this process beyond a base, bytes."""

    def __init__(self) -> None:
        self.base, self.most, self._over = _resident(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.most = max(self.most, _resident() - self.base)

    def end(self) -> int:
        self._over.set()
        self._thread.join()
        return self.most


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Trained:
    """A network, what trains it, and what a step costs without apoptosis."""

    def __init__(self, width: int) -> None:
        torch.manual_seed(SEED)
        self.net = nn.Sequential(
            nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
        )
        self.basis = torch.randn(FACTORS, INPUTS)
        self.optimizer = torch.optim.SGD(self.net.parameters(), 1e-2, momentum=0.9)
        for _ in range(3):
            self.step()
        start = time.process_time()
        for _ in range(10):
            self.step()
        self.seconds = (time.process_time() - start) / 10

    def batch(self, rows: int = BATCH) -> Tensor:
        return torch.randn(rows, FACTORS) @ self.basis

    def step(self) -> None:
        x = self.batch()
        loss = nn.functional.cross_entropy(self.net(x), (x[:, 0] > 0).long())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def in_training(width: int) -> dict[str, Any]:
    """Train to the first event."""
    run, watched = Trained(width), list[float]()
    apo = Apoptosis(run.net, run.optimizer, run.batch(4), total_steps=STEPS, align=1, calibration=1.0)
    peak = Peak()
    for _ in range(STEPS):
        watching, start = apo.watching, time.process_time()
        run.step()
        own = time.process_time()
        event = apo.step()
        if event:
            event_seconds = time.process_time() - own
            break
        if watching:
            watched.append(time.process_time() - start)
    else:
        raise SystemExit(f"width {width}: no event in {STEPS} steps")
    return {
        "event_bytes": peak.end(),
        "event_in_steps": event_seconds / run.seconds,
        "watched_step_in_steps": sum(watched) / len(watched) / run.seconds,
        "widths": [after for _, after in event.groups.values()],
    }


def in_one_shot(width: int) -> dict[str, Any]:
    """Shrink the network with shrink_."""
    run = Trained(width)
    batches = [run.batch(512) for _ in range(-(-3 * width // 512) + 1)]
    run.net.eval()
    peak, start = Peak(), time.process_time()
    shrink_(run.net, batches[0][:4], batches, tolerance=0.02)
    return {"shrink_seconds": time.process_time() - start, "shrink_bytes": peak.end()}


def measure(width: int, kind: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    return in_training(width) if kind == "training" else in_one_shot(width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int)
    parser.add_argument("--kind", choices=["training", "shrink"], default="training")
    chosen = parser.parse_args()
    if chosen.width:
        print(json.dumps(measure(chosen.width, chosen.kind)))
        return
    rows = []
    for width in WIDTHS:
        row: dict[str, Any] = {"width": width}
        for kind in ("training", "shrink"):
            words = [sys.executable, "-m", "benchmarks.event_cost", "--width", str(width), "--kind", kind]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            row |= json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(row)
    torch.set_num_threads(1)
    found = {"kind": "event-cost", "seed": SEED, "versions": versions(), "machine": machine(torch.device("cpu"))}
    write_json(RESULTS / "event-cost.json", {**found, "runs": rows})


if __name__ == "__main__":
    main()
