"""One method's training: the same batches, schedule and fused optimizer for all.

Holds: `MethodRun`, its clocks and its curve. Elsewhere: what a method does between steps or epochs
(methods), the order in which methods train (cells).
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apoptosis.tools.recipes.datasets import Part
from apoptosis.tools.recipes.networks import num_parameters
from apoptosis.tools.recipes.optim import learning_rates
from benchmarks.paper.tasks import Task, TaskData


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One epoch's end. seconds, cpu_seconds: training so far, the method's own work included, evaluation not."""

    epoch: int
    seconds: float
    cpu_seconds: float
    loss: float
    validation: float
    parameters: int
    macs: int


class MethodRun:
    """A network trained by the common recipe; methods override what happens between steps and epochs.

    Args:
        name: of the method. task, data: where it trains. seed: of the initial weights and of the order.
        scale: of the hidden widths. epochs: None for the task's; the last one may be cut short.

    run_seconds: wall time of the whole run, evaluations of the validation part included. own_seconds: the method's
    share where it keeps a clock of its own.
    """

    def __init__(
        self,
        name: str,
        task: Task,
        data: TaskData,
        seed: int,
        *,
        scale: float = 1.0,
        model: nn.Module | None = None,
        epochs: float | None = None,
    ) -> None:
        self.name, self.task, self.data, self.seed = name, task, data, seed
        self.epochs = math.ceil(task.epochs if epochs is None else epochs)
        torch.manual_seed(seed)
        self.model = task.build(data, scale) if model is None else model
        self.optimizer = self.new_optimizer()
        self.batch = min(task.batch, len(data.train))
        self.steps_per_epoch = len(data.train) // self.batch
        self.total_steps = max(1, round(self.steps_per_epoch * (task.epochs if epochs is None else epochs)))
        self._rates = (*learning_rates("one-cycle", task.lr, self.total_steps), 0.0)
        self.step = self.epoch = 0
        self.seconds = self.cpu_seconds = self.run_seconds = 0.0
        self.points: list[Point] = []
        self.idle = 0.0  # seconds of this epoch that are not the method's own: counting for the table
        self.run_macs = 0  # of all forward passes of the run so far
        self._macs: tuple[int, int] | None = None
        self.step_macs = self.batch * self.macs()

    # ------------------------------------------------------------------ what methods override

    def after_step(self) -> None:
        """Act after an optimizer step."""

    def after_epoch(self) -> None:
        """Act after an epoch's steps; counts as training time."""

    @property
    def own_seconds(self) -> float | None:
        """Seconds that the method itself took, where it measures them."""
        return None

    def more(self) -> dict[str, Any]:
        """Return what else belongs into the record."""
        return {}

    # ------------------------------------------------------------------ the common recipe

    def new_optimizer(self) -> torch.optim.Optimizer:
        """Return a fused Adam over today's parameters."""
        return torch.optim.Adam(self.model.parameters(), lr=self.task.lr, fused=True)

    def example(self, rows: int = 2) -> Tensor:
        """Return the first training inputs."""
        return self.data.train.between(0, rows)[0]

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.epochs

    def rate(self) -> float:
        """Return the learning rate of the coming step."""
        return self._rates[self.step]

    def run_epoch(self) -> None:
        """Train one epoch, let the method act, evaluate on the validation part.

        Raises: FloatingPointError: the loss is NaN or infinite.
        """
        whole, cpu, self.idle = time.perf_counter(), time.process_time(), 0.0
        loss = self._train()
        self.after_epoch()
        self.seconds += time.perf_counter() - whole - self.idle
        self.cpu_seconds += time.process_time() - cpu - self.idle
        self.step_macs = self.batch * self.macs()
        if not math.isfinite(loss):
            raise FloatingPointError(f"{self.task.name}, {self.name}, seed {self.seed}: the loss is {loss}.")
        self.epoch += 1
        value = self.evaluate(self.data.validation)
        self.run_seconds += time.perf_counter() - whole - self.idle
        self.points.append(
            Point(
                epoch=self.epoch,
                seconds=self.seconds,
                cpu_seconds=self.cpu_seconds,
                loss=loss,
                validation=value,
                parameters=num_parameters(self.model),
                macs=self.macs(),
            )
        )

    def _train(self) -> float:
        data, train = self.data, self.data.train
        order_seed = 2 * (self.seed * 100_003 + self.epoch)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(order_seed))
        torch.manual_seed(order_seed + 1)  # dropout draws alike for all methods
        self.model.train()
        total = torch.zeros((), dtype=torch.float64)
        steps = min(self.steps_per_epoch, self.total_steps - self.step)
        for rows in order[: steps * self.batch].view(steps, self.batch):
            inputs, labels = train.take(rows)
            self.optimizer.param_groups[0]["lr"] = self.rate()
            loss = data.loss(self.model(inputs), labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.step += 1
            self.run_macs += self.step_macs
            self.after_step()
            total += loss.detach()
        return float(total) / steps

    @torch.no_grad()
    def evaluate(self, part: Part, batch: int = 512) -> float:
        """Return the metric on a part, in evaluation mode."""
        self.model.eval()
        outputs = [self.model(part.between(i, min(i + batch, len(part)))[0]) for i in range(0, len(part), batch)]
        return self.data.score(torch.cat(outputs), part.labels)

    def macs(self) -> int:
        """Count multiply-adds per example; counted again only after the network has changed."""
        size = num_parameters(self.model)
        if self._macs is None or self._macs[0] != size:
            self._macs = (size, count_macs(self.model, self.example(1)))
        return self._macs[1]

    def record(self) -> dict[str, Any]:
        """Read the test part once, and return everything as plain values."""
        own = self.own_seconds
        return {
            "test": self.evaluate(self.data.test),
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "run_seconds": self.run_seconds,
            "own_seconds": own,
            "parameters": num_parameters(self.model),
            "macs": self.macs(),
            "run_macs": self.run_macs,
            "points": [asdict(point) for point in self.points],
            **self.more(),
        }


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Count the multiply-adds of one forward pass of `example`, in evaluation mode."""
    from torch.utils.flop_counter import FlopCounterMode

    training = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example)
    for module, mode in training.items():
        module.training = mode
    return int(counter.get_total_flops()) // 2


def fresh_like(model: nn.Module) -> None:
    """Draw new weights for every layer of `model` at its present widths, by each module's own initialisation.

    Raises: ValueError: a module holds parameters and has no `reset_parameters`.
    """
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        elif own and type(module).__name__ == "ViT":
            nn.init.normal_(module.positions, std=0.02)
        elif own:
            raise ValueError(f"'{name}' ({type(module).__name__}) has no reset_parameters.")
