"""Measure what an event costs in memory and processor time, by width.

    python -m benchmarks.event_cost                 all widths, each in a process of its own
    python -m benchmarks.event_cost --width 1024    one of them, in this process

Holds: a multilayer perceptron with two hidden layers of equal width, trained until its first event, and the same
network shrunk in one shot. Elsewhere: whole runs (benchmarks.paper), the table (table.py).
Memory is the peak resident size beyond that of training, sampled every 2 ms; times are processor seconds of one thread,
in units of the median step of the same run outside its window. Figures are medians of
three processes.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apoptosis import Apoptosis, shrink_
from benchmarks import shared

WIDTHS = (512, 1024, 2048)
REPEATS = 3
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
    run, watched, plain = Trained(width), list[float](), list[float]()
    apo = Apoptosis(run.net, run.optimizer, run.batch(4), total_steps=STEPS, align=1, calibration=1.0)
    for _ in range(5):  # outside of any window
        plain.append(_seconds(run.step))
    peak = Peak()
    for _ in range(STEPS):
        watching, own = apo.watching, _seconds(run.step)
        start = time.process_time()
        event = apo.step()
        after = time.process_time() - start
        if event:
            break
        (watched if watching else plain).append(own + after if watching else own)
    else:
        raise SystemExit(f"width {width}: no event in {STEPS} steps")
    step = statistics.median(plain)
    return {
        "event_bytes": peak.end(),
        "event_in_steps": after / step,
        "watched_step_in_steps": statistics.median(watched) / step,
        "window_steps": len(watched),
        "widths": [after for _, after in event.groups.values()],
    }


def _seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


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


def _median(values: list[Any]) -> Any:
    return statistics.median(values) if isinstance(values[0], float) else sorted(values)[len(values) // 2]


def main() -> None:
    parser = shared.parser(__doc__)
    parser.add_argument("--width", type=int)
    parser.add_argument("--kind", choices=["training", "shrink"], default="training")
    chosen = parser.parse_args()
    if chosen.width:
        print(json.dumps(measure(chosen.width, chosen.kind)))
        return
    rows = []
    torch.set_num_threads(1)
    for width in WIDTHS:
        row: dict[str, Any] = {"width": width}
        for kind in ("training", "shrink"):
            arguments = ("--width", str(width), "--kind", kind)
            found = [shared.in_own_process("benchmarks.event_cost", *arguments) for _ in range(REPEATS)]
            row |= {name: _median([one[name] for one in found]) for name in found[0]}
        rows.append(row)
        print(row)
        shared.write(shared.RESULTS / "event-cost.json", shared.result("event-cost", seed=SEED, runs=rows))


if __name__ == "__main__":
    main()
