"""Measure what apoptosis itself costs: the same steps with and without it, in turn, in one process.

    python benchmarks/overhead.py --row mnist --data-dir DIR

Contestant A trains with apoptosis. After every few steps, B repeats them without: the same batches through a network
of the widths that A had, a fresh copy after every event. (A - B) / A is what windows, hooks, planning, surgery and the
first capture took together, whatever apoptosis' own clock says. Copying is not timed; evaluation does not happen.
Lives here: this measurement. Does not live here: speed-ups (run_figures.py).
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apoptosis.recipes.config import RunConfig
from apoptosis.recipes.folder import write_json
from apoptosis.recipes.loop import Trainer
from apoptosis.recipes.machine import machine, versions
from apoptosis.recipes.optim import learning_rate, make_optimizer
from apoptosis.recipes.train import prepare
from run_figures import COMMON, RESULTS, ROWS

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


def measure(config: RunConfig) -> dict[str, Any]:
    """Time one run against its steps without apoptosis."""
    data, device = prepare(config)
    trainer = Trainer(config, data, device)
    assert trainer.apo is not None
    clock = Clock(device)
    seconds = {"with": trainer.seconds, "without": 0.0}  # the first capture is apoptosis' own
    twin, twin_optimizer = copy_of(trainer)
    batches: list[Tensor] = []
    step = num_events = 0
    while step < trainer.total_steps:
        if not batches:
            order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(step + config.seed))
            batches = list(
                order[: trainer.steps_per_epoch * trainer.batch].to(data.train.labels.device).split(trainer.batch)
            )
        now = [tuple(t.to(device) for t in data.train.take(rows)) for rows in batches[:CHUNK]]
        rates = [learning_rate(config.schedule, config.lr, step + i, trainer.total_steps) for i in range(len(now))]
        start = clock()
        done, event = 0, None
        for batch, lr in zip(now, rates, strict=True):
            train_step(trainer.model, trainer.optimizer, batch, lr)
            event = trainer.apo.step()
            done += 1
            if event:
                break
        seconds["with"] += clock() - start
        start = clock()
        for batch, lr in zip(now[:done], rates[:done], strict=True):
            train_step(twin, twin_optimizer, batch, lr)
        seconds["without"] += clock() - start
        if event:
            num_events += 1
            twin, twin_optimizer = copy_of(trainer)
        step += done
        batches = batches[done:]
    total = seconds["with"]
    return {
        "seed": config.seed,
        "steps": step,
        "events": num_events,
        "widths": trainer.widths(),
        "seconds_with": total,
        "seconds_without": seconds["without"],
        "share_by_difference": (total - seconds["without"]) / total,
        "share_by_clock": trainer.apo.seconds / total,
        "hook_share": trainer.apo.hook_seconds / total,
    }


class Clock:
    """Seconds now, after all work given to the device is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    result = {"kind": "overhead", "row": given.row, "config": config.model_dump(mode="json"), "versions": versions(),
              "machine": machine(device), "runs": runs}  # fmt: skip
    target = given.json or RESULTS / f"overhead-{given.row}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, result)
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
