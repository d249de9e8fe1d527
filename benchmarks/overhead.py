"""Measure what apoptosis itself costs: the same steps with and without it, in turn, in one process.

    python -m benchmarks.overhead --row gpt --data-dir DIR           (rows: tasks of benchmarks.paper)
    python -m benchmarks.overhead --row minilm-sst2 --windows 1 --data-dir DIR    (stops after the first event)

A trains with apoptosis at default settings, one thread. While a window is open, every step is also made by B, a copy
from before it without hooks, on the same batch; which of the two goes first alternates. What A takes longer is the
window's cost; construction, the opening of windows and events are `Apoptosis(...)` and `apo.step()` by the clock.
Outside of windows there is nothing but a counter, whose time is added up, too. All times are processor seconds, which
other programs disturb less than wall time. Copying is not timed; evaluation does not happen.

Beside every event stands what the policy took it to cost (decide.overhead): its multiply-adds over the rate of this
machine. Holds: this measurement. Elsewhere: speed-ups (paper).
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apoptosis import Apoptosis
from apoptosis.decide.overhead import event_macs, macs_per_second
from apoptosis.decide.policy import cost_of
from apoptosis.decide.state import telemetry
from benchmarks import shared
from benchmarks.paper.sentences import Sentences
from benchmarks.paper.tasks import BY_NAME, Task
from benchmarks.paper.training import MethodRun, outputs_of

PLAIN = 25  # the last steps outside of a window: their median is what one takes
Network = tuple[nn.Module, torch.optim.Optimizer]
Batch = tuple[Any, Tensor]


class Cost:
    """Processor seconds by part, and what every window and event took."""

    def __init__(self) -> None:
        self.parts = {"construction": 0.0, "windows": 0.0, "events": 0.0, "between": 0.0}
        self.events: list[dict[str, Any]] = []

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def measure(
    task: Task, data_dir: Path | None, seed: int, epochs: float | None, windows: int | None = None
) -> dict[str, Any]:
    """Time one run against its steps without apoptosis; windows: stop when so many are over, None for the whole run."""
    torch.set_num_threads(1)
    run = MethodRun("apoptosis", task, task.load(data_dir, None), seed, epochs=epochs)
    network: Network = (run.model, run.optimizer)
    cost, rate = Cost(), max(macs_per_second() for _ in range(5))
    cost.parts["construction"], apo = timed(
        lambda: Apoptosis(run.model, run.optimizer, run.example(), total_steps=run.total_steps, seed=seed)
    )
    total, plain, number = cost.total, list[float](), 0
    twin: Network | None = None
    window: dict[str, Any] = {}
    for batch in batches(run):
        lr = run.rate()
        if twin is None:
            own = timed(lambda b=batch, rate=lr: train_step(run, network, b, rate))[0]
            plain.append(own)
        else:
            own, without = both(run, (network, twin), batch, lr, first=number % 2)
            window["seconds"] += own - without
            window["steps"], number = window["steps"] + 1, number + 1
        spent, event = timed(apo.step)
        total += own + spent
        run.step += 1
        if twin is None:
            cost.parts["between"] += 0.0 if apo.watching else spent
        elif apo.watching:
            window["seconds"] += spent
        else:
            cost.parts["windows"] += window["seconds"]
            cost.parts["events"] += spent
            kept = None if event is None else list(event.macs)
            cost.events.append({**window, "event_seconds": spent, "step": run.step, "macs": kept})
            twin = None
            if len(cost.events) == windows:
                break
        if apo.watching and twin is None:
            twin, number = copy_of(run, network), 0
            usual = statistics.median(plain[-PLAIN:]) if plain else 0.0
            window = {"steps": 0, "seconds": spent, "step_seconds": usual,
                      "predicted_seconds": cost_of(told(apo, run)) / rate}  # fmt: skip
    cost.parts["windows"] += 0.0 if twin is None else window["seconds"]  # one that the end of the run cut off
    return {
        "seed": seed,
        "steps": run.step,
        "total_steps": run.total_steps,
        "events": apo.ledger().events,
        "seconds_with": total,
        "seconds_without": total - cost.total,
        "share_by_difference": cost.total / total,
        "parts": cost.parts,
        "attempts": cost.events,
    }


def told(apo: Apoptosis, run: MethodRun) -> Any:
    """Return what the policy sees once a window has seen some examples, with what event_macs foretells of it."""
    memory, rows, settings = copy.copy(apo._memory), apo._target.num_examples, apo._settings
    memory.batch_rows = float(run.batch)
    gradients = settings.criterion.grad_factor and settings.tolerance != 0
    macs = apo.structure.macs / rows
    cost = event_macs(apo.groups(), forward_macs=macs, batch_rows=memory.batch_rows, gradients=gradients)
    return replace(telemetry(memory, settings, apo.structure, rows=rows), event_macs=cost)


def both(run: MethodRun, pair: tuple[Network, Network], batch: Batch, lr: float, *, first: int) -> tuple[float, float]:
    """Make one step with and one without apoptosis, on the same numbers of dropout; return the seconds of both."""
    seconds, state = [0.0, 0.0], torch.get_rng_state()
    for place in (first, 1 - first):
        torch.set_rng_state(state)
        seconds[place] = timed(lambda place=place: train_step(run, pair[place], batch, lr))[0]
    return seconds[0], seconds[1]


def train_step(run: MethodRun, network: Network, batch: Batch, lr: float) -> None:
    model, optimizer = network
    optimizer.param_groups[0]["lr"] = lr
    loss = run.data.loss(outputs_of(model, batch[0]), batch[1])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def copy_of(run: MethodRun, network: Network) -> Network:
    """Return a network and its optimizer as they are, without hooks."""
    model = copy.deepcopy(network[0])
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    optimizer = run.task.recipe.optimizer(model.parameters(), run.task.lr)
    optimizer.load_state_dict(copy.deepcopy(network[1].state_dict()))
    return model, optimizer


def batches(run: MethodRun) -> Iterator[Batch]:
    """Yield the batches of a run, epoch after epoch in another order; reading and augmenting them is not timed."""
    data, epoch = run.data, 0
    run.model.train()
    while run.step < run.total_steps:
        chance = torch.Generator().manual_seed(2 * (run.seed * 100_003 + epoch))
        sentences = isinstance(data.train, Sentences)
        order = data.train.order(run.batch, chance) if sentences else torch.randperm(len(data.train), generator=chance)
        for rows in order[: run.steps_per_epoch * run.batch].view(-1, run.batch)[: run.total_steps - run.step]:
            inputs, labels = data.train.take(rows)
            yield (inputs if data.augment is None else data.augment(inputs, chance)), labels
        epoch += 1


def main() -> int:
    parser = shared.parser(__doc__)
    parser.add_argument("--row", default="digits", choices=sorted(BY_NAME))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--epochs", type=float, help="instead of the task's own; the last one may be cut short")
    parser.add_argument("--windows", type=int, help="stop when so many windows are over: no share of a whole run")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/overhead-ROW.json")
    given = parser.parse_args()
    task, runs = BY_NAME[given.row], []
    for seed in given.seeds.split(","):
        runs.append(measure(task, given.data_dir, int(seed), given.epochs, given.windows))
        parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in runs[-1]["parts"].items())
        print(f"{given.row}, seed {seed}: {100 * runs[-1]['share_by_difference']:.2f} % by difference: {parts}")
        for one in runs[-1]["attempts"]:
            print(f"  step {one['step']}: window {one['steps']} steps {one['seconds']:.2f} s, event "
                  f"{one['event_seconds']:.2f} s, predicted {one['predicted_seconds']:.2f} s", flush=True)  # fmt: skip
    result = shared.result("overhead", row=given.row, network=task.network, epochs=given.epochs, runs=runs)
    shared.write(given.json or shared.RESULTS / f"overhead-{given.row}.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
