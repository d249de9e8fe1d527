"""Measure what apoptosis itself costs: the same steps with and without it, in turn, in one process.

    python -m benchmarks.overhead --row mnist --data-dir DIR

A trains with apoptosis. After every few steps, B repeats them without: the same batches through a network of the widths
that A had, a fresh copy after every event; which of them goes first alternates. A - B is what windows, hooks, planning,
surgery and the first capture took together, whatever apoptosis' own clock says. Where that clock stood still
there was no more than a counter, so those chunks enter by the median of their differences: other programs' noise, in
all of them, would drown the few in which something happened. Copying is not timed; evaluation does not happen.
Holds: this measurement. Elsewhere: speed-ups (paper).
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apoptosis.tools.recipes.config import RunConfig
from apoptosis.tools.recipes.loop import Trainer
from apoptosis.tools.recipes.optim import learning_rates, make_optimizer
from apoptosis.tools.recipes.train import prepare
from benchmarks import shared

COMMON: dict[str, object] = {"optimizer": "adam", "batch": 128, "schedule": "one-cycle"}
ROWS: dict[str, dict[str, object]] = {  # fields of apoptosis.tools.recipes.config.RunConfig
    "mnist": {"data": "mnist", "network": "mlp", "widths": (1024, 1024, 1024), "epochs": 10},
    "fashion-mnist": {"data": "fashion-mnist", "network": "mlp", "widths": (1024, 1024, 1024), "epochs": 10},
    "higgs": {"data": "higgs", "network": "mlp", "widths": (300, 300, 300, 300, 300), "epochs": 12},
}
Step = Callable[[], object]
CHUNK = 25  # steps of A before B repeats them: short, so that both meet the same disturbances


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], lr: float) -> None:
    optimizer.param_groups[0]["lr"] = lr
    loss = F.cross_entropy(model(batch[0]), batch[1])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def copy_of(trainer: Trainer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A's network and optimizer as they are, without its hooks (no window is open when this is called)."""
    model = copy.deepcopy(trainer.model)
    optimizer = make_optimizer(trainer.config, model)
    optimizer.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))
    return model, optimizer


def timed_steps(clock: Clock, steps: list[Step]) -> list[float]:
    """Seconds from the start to the end of every step; ends with the first step that returns something truthy."""
    start, ends = clock(), []
    for step in steps:
        event = step()
        ends.append(clock() - start)
        if event:
            break
    return ends


def measure(config: RunConfig) -> dict[str, Any]:
    """Time one run against its steps without apoptosis; which of the two goes first alternates."""
    data, device = prepare(config)
    trainer = Trainer(config, data, device)
    apo = trainer.apo
    assert apo is not None
    clock = Clock(device)
    seconds = {"with": trainer.seconds, "without": 0.0}  # the first capture is apoptosis' own
    batches: list[tuple[Tensor, Tensor]] = []
    rates = learning_rates(config.schedule, config.lr, trainer.total_steps)
    step = num_events = turn = 0
    idle_differences: list[float] = []
    busy_differences: list[float] = []
    copied = copy_of(trainer)
    warm_up(copy_of(trainer), (data.train.between(0, trainer.batch), config.lr))

    def full(batch: tuple[Tensor, Tensor], lr: float) -> bool:
        train_step(trainer.model, trainer.optimizer, batch, lr)
        return bool(apo.step())

    while step < trainer.total_steps:
        batches = batches or epoch_batches(trainer, step)
        now = batches[:CHUNK]
        pairs = list(zip(now, rates[step:], strict=False))
        both: dict[str, list[Step]] = {
            "with": [partial(full, *pair) for pair in pairs],
            "without": [partial(train_step, *copied, *pair) for pair in pairs],
        }
        own = apo.seconds
        order = ("with", "without") if turn % 2 == 0 else ("without", "with")
        ends = {name: timed_steps(clock, both[name]) for name in order}
        done = len(ends["with"])  # fewer than the chunk where an event changed the widths
        for name in order:
            seconds[name] += ends[name][done - 1]
        difference = ends["with"][done - 1] - ends["without"][done - 1]
        idle = apo.seconds == own and done == len(ends["without"])
        (idle_differences if idle else busy_differences).append(difference)
        if trainer_changed(trainer, copied[0]):
            num_events += 1
            copied = copy_of(trainer)
        step, turn, batches = step + done, turn + 1, batches[done:]
    total = seconds["with"]
    cost = trainer.seconds + sum(busy_differences)
    cost += statistics.median(idle_differences) * len(idle_differences) if idle_differences else 0.0
    return {
        "seed": config.seed,
        "steps": step,
        "events": num_events,
        "widths": trainer.widths(),
        "seconds_with": total,
        "seconds_without": seconds["without"],
        "share_by_difference": cost / total,
        "share_by_plain_difference": (total - seconds["without"]) / total,
        "busy_chunks": len(busy_differences),
        "idle_chunks": len(idle_differences),
        "share_by_clock": apo.seconds / total,
        "hook_share": apo.hook_seconds / total,
    }


def epoch_batches(trainer: Trainer, step: int) -> list[tuple[Tensor, Tensor]]:
    """One epoch in random order, on the device: reading the data is not what is timed."""
    part = trainer.data.train
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(step + trainer.config.seed))
    rows = order[: trainer.steps_per_epoch * trainer.batch].to(part.labels.device).split(trainer.batch)
    taken = [part.take(r) for r in rows]
    return [(x.to(trainer.device), y.to(trainer.device)) for x, y in taken]


def trainer_changed(trainer: Trainer, copied: nn.Module) -> bool:
    shapes = [[p.shape for p in model.parameters()] for model in (trainer.model, copied)]
    return shapes[0] != shapes[1]


def warm_up(copied: tuple[nn.Module, torch.optim.Optimizer], example: tuple[tuple[Tensor, Tensor], float]) -> None:
    """First steps are slow (allocation, choice of kernels) and would count for the one that goes first."""
    device = next(copied[0].parameters()).device
    (x, y), lr = example
    for _ in range(20):
        train_step(*copied, (x.to(device), y.to(device)), lr)


class Clock:
    """Seconds now, after all work given to the device is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def main() -> int:
    parser = shared.parser(__doc__)
    parser.add_argument("--row", default="mnist", choices=sorted(ROWS))
    parser.add_argument("--data-dir")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--epochs", type=int, help="instead of the row's own")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/overhead-ROW.json")
    given = parser.parse_args()
    fields = {**COMMON, **ROWS[given.row], "data_dir": given.data_dir}
    fields |= {"epochs": given.epochs} if given.epochs else {}
    runs = []
    for seed in given.seeds.split(","):
        config = RunConfig.checked(**fields, seed=int(seed))
        runs.append(measure(config))
        print(f"{given.row}, seed {seed}: {100 * runs[-1]['share_by_difference']:.2f} % by difference, "
              f"{100 * runs[-1]['share_by_clock']:.2f} % by its own clock", flush=True)  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = shared.result("overhead", device, row=given.row, config=config.model_dump(mode="json"), runs=runs)
    shared.write(given.json or shared.RESULTS / f"overhead-{given.row}.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
