"""One method's training: the same batches, schedule and fused optimizer for all.

Holds: `MethodRun`, its clocks, its curve and its snapshots. Elsewhere: what a method does
between steps or epochs (methods), the order in which methods train (cells).
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apoptosis.tools.recipes.datasets import Part
from apoptosis.tools.recipes.networks import num_parameters
from apoptosis.tools.recipes.optim import learning_rates
from benchmarks.paper.sentences import Sentences
from benchmarks.paper.tasks import Task, TaskData

WARM_UP = 0.1  # of the steps, of the linear schedule
KEPT = ("step", "epoch", "seconds", "cpu_seconds", "run_seconds", "run_macs", "step_macs", "points", "_loss", "_begun")


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
    share where it keeps a clock of its own. A turn is as many steps as the task's turn, an epoch where it has none.
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
        torch.manual_seed(seed)
        self.model = task.build(data, scale) if model is None else model
        self.optimizer = self.new_optimizer()
        self.batch = min(task.batch, len(data.train))
        self.steps_per_epoch = len(data.train) // self.batch
        self.total_steps = max(1, round(self.steps_per_epoch * (task.epochs if epochs is None else epochs)))
        self.epochs = -(-self.total_steps // self.steps_per_epoch)
        self._rates = (*_rates(task.recipe.schedule, task.lr, self.total_steps), 0.0)
        self.step = self.epoch = 0
        self.seconds = self.cpu_seconds = self.run_seconds = 0.0
        self.points: list[Point] = []
        self.idle = 0.0  # seconds of this turn that are not the method's own: counting for the table
        self._loss, self._begun = 0.0, 0  # of this epoch: sum over its steps, and its first step
        self.run_macs = 0  # of all forward passes of the run so far
        self._macs: tuple[int, int] | None = None
        self.step_macs = self.batch * self.macs()

    # ------------------------------------------------------------------ what methods override

    def after_step(self) -> None:
        """Act after an optimizer step."""

    def after_turn(self) -> None:
        """Act after a turn's steps; counts as training time."""

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
        """Return the recipe's fused optimizer over today's parameters."""
        return self.task.recipe.optimizer(self.model.parameters(), self.task.lr)

    def example(self, rows: int = 2) -> Any:
        """Return the first training inputs, padded as batches are on average."""
        given = self.data.example
        return self.data.train.between(0, rows)[0] if given is None else given(rows)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.epochs

    def rate(self) -> float:
        """Return the learning rate of the coming step."""
        return self._rates[self.step]

    def run_epoch(self) -> None:
        """Train to the end of the epoch."""
        epoch = self.epoch
        while self.epoch == epoch:
            self.run_turn()

    def run_turn(self) -> None:
        """Train one turn, let the method act; after an epoch's last one evaluate on the validation part.

        Raises: FloatingPointError: the loss is NaN or infinite.
        """
        whole, cpu, self.idle = time.perf_counter(), time.process_time(), 0.0
        first = self.step - self._begun  # of this epoch
        last = min(self.steps_per_epoch, self.total_steps - self._begun)
        self._train(first, min(last, first + (self.task.turn or last)))
        self.after_turn()
        ended = self.step - self._begun == last
        if ended:
            self.after_epoch()
        self.seconds += time.perf_counter() - whole - self.idle
        self.cpu_seconds += time.process_time() - cpu - self.idle
        self.step_macs = self.batch * self.macs()
        if not math.isfinite(self._loss):
            raise FloatingPointError(f"{self.task.name}, {self.name}, seed {self.seed}: the loss is {self._loss}.")
        if not ended:
            self.run_seconds += time.perf_counter() - whole - self.idle
            return
        self.epoch += 1
        value = self.evaluate(self.data.validation)
        self.run_seconds += time.perf_counter() - whole - self.idle
        self.points.append(
            Point(
                epoch=self.epoch,
                seconds=self.seconds,
                cpu_seconds=self.cpu_seconds,
                loss=self._loss / last,
                validation=value,
                parameters=num_parameters(self.model),
                macs=self.macs(),
            )
        )
        self._loss, self._begun = 0.0, self.step

    def _train(self, first: int, last: int) -> None:
        """Train the steps first..last of the epoch."""
        data, train = self.data, self.data.train
        order_seed = 2 * (self.seed * 100_003 + self.epoch)
        chance = torch.Generator().manual_seed(order_seed)
        if isinstance(train, Sentences):
            order = train.order(self.batch, chance)
        else:
            order = torch.randperm(len(train), generator=chance)
        torch.manual_seed(order_seed + 1 + 7919 * first)  # dropout draws alike for all methods
        changes = torch.Generator().manual_seed(order_seed + 1 + 7919 * first)
        self.model.train()
        total = torch.zeros((), dtype=torch.float64)
        for rows in order[first * self.batch : last * self.batch].view(last - first, self.batch):
            inputs, labels = train.take(rows)
            if data.augment is not None:
                inputs = data.augment(inputs, changes)
            self.optimizer.param_groups[0]["lr"] = self.rate()
            loss = data.loss(outputs_of(self.model, inputs), labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.step += 1
            self.run_macs += self.step_macs
            self.after_step()
            total += loss.detach()
        self._loss += float(total)

    @torch.no_grad()
    def evaluate(self, part: Part | Sentences, batch: int = 512) -> float:
        """Return the metric on a part, in evaluation mode."""
        self.model.eval()
        ends = range(0, len(part), batch)
        outputs = [outputs_of(self.model, part.between(i, min(i + batch, len(part)))[0]) for i in ends]
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

    # ------------------------------------------------------------------ snapshots

    def save(self, path: Path) -> None:
        """Write all that the rest of the run needs, whole or not at all; the data excepted."""
        part = path.with_suffix(".part")
        torch.save({key: getattr(self, key) for key in KEPT} | {"network": self.network_state(path)}, part)
        part.replace(path)

    def restore(self, path: Path) -> None:
        """Go on where `save` was called, in a run that was made by the same arguments."""
        found = torch.load(path, weights_only=False)
        self.restore_network(found.pop("network"), path)
        for key, value in found.items():
            setattr(self, key, value)
        self._macs = None

    def network_state(self, path: Path) -> Any:
        """Return what holds the network and its optimizer."""
        return self.model, self.optimizer

    def restore_network(self, state: Any, path: Path) -> None:
        """Put network and optimizer back."""
        self.model, self.optimizer = state


def outputs_of(model: nn.Module, inputs: Any) -> Tensor:
    """Return the logits of a batch, given by name or as one tensor."""
    found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return found.logits if hasattr(found, "logits") else found


def first_rows(inputs: Any, rows: int) -> Any:
    """Return the first rows of a batch."""
    return {name: t[:rows] for name, t in inputs.items()} if isinstance(inputs, dict) else inputs[:rows]


def _rates(schedule: str, peak: float, steps: int) -> tuple[float, ...]:
    """Return the learning rate of every step."""
    if schedule != "linear":
        return learning_rates(schedule, peak, steps)
    rise = max(1, round(WARM_UP * steps))
    return tuple(peak * min((step + 1) / rise, (steps - step) / (steps - rise + 1)) for step in range(steps))


def count_macs(model: nn.Module, example: Any) -> int:
    """Count the multiply-adds of one forward pass of `example`, in evaluation mode."""
    from torch.utils.flop_counter import FlopCounterMode

    training = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs_of(model, example)
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
