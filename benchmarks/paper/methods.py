"""What a user would pick: dense, apoptosis, small from the start, Torch-Pruning, group lasso.

Holds: each method as a `MethodRun`. Elsewhere: the training loop (training), which methods a task has (method_table),
the order (cells), the calls of Torch-Pruning (pruning).

At equal final multiply-adds: after every turn (an epoch, in tasks without shorter ones) a pruning baseline cuts to at
most the multiply-adds that apoptosis has after the same turn. Within a turn apoptosis is ahead, so what the whole run
multiplied is reported as run_macs. Their optimizer is made again after every cut, as their users have to do.
References: Fang et al., "DepGraph", arXiv 2301.12900 (Torch-Pruning); Lym et al., "PruneTrain", arXiv 1901.09290.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import apoptosis
from apoptosis import Apoptosis
from apoptosis.criteria import criteria
from benchmarks.paper.pruning import prunable, prune_to
from benchmarks.paper.same_widths import cut_to
from benchmarks.paper.tasks import Task, TaskData
from benchmarks.paper.training import MethodRun, fresh_like, outputs_of

#: Besides the default, whose figures are apoptosis' own, and reconstruction, which has a comparison of its own.
CRITERIA = tuple(name for name in criteria() if name not in ("interpolative", "reconstruction"))
PATIENCE = 2  # epochs without a better validation metric after which early stopping stops
FINE_TUNE = 0.2  # of the epochs, after pruning a trained network
LASSO_SHARE = 0.25  # of the first loss that the penalty makes up (PruneTrain's rule)
LASSO_STEP = 0.1  # of the penalty's gradient per step at the highest learning rate: PruneTrain's, of SGD


class Shrinking(MethodRun):
    """The dense network with `Apoptosis` in its loop, at default settings unless `options` says otherwise."""

    def __init__(self, name: str, task: Task, data: TaskData, seed: int, **options: Any) -> None:
        super().__init__(name, task, data, seed)
        start = time.process_time()
        probe = data.validation.between(0, min(task.probe, len(data.validation)))
        self.apo = Apoptosis(
            self.model,
            self.optimizer,
            self.example(),
            total_steps=self.total_steps,
            probe=probe if data.classes else probe[0],
            seed=seed,
            **options,
        )
        self.seconds = self.run_seconds = self.apo.seconds
        self.cpu_seconds = time.process_time() - start
        self.events: list[dict[str, Any]] = []

    def after_step(self) -> None:
        if event := self.apo.step():
            self.step_macs = self.batch * self.macs()
            sites = [c.value for c in event.certificates if c.kind == "empirical"]
            self.events.append(
                {"step": event.step, "seconds": event.seconds, "widths": self.widths(), "macs": self.macs()}
                | {"site_error": max(sites, default=None), "measured": dict(event.measured)}
            )

    def widths(self) -> dict[str, int]:
        """Return channels per group that may shrink."""
        return {group.name: group.num_channels for group in self.apo.groups()}

    @property
    def own_seconds(self) -> float:
        return self.apo.seconds

    def more(self) -> dict[str, Any]:
        found = {"widths": self.widths(), "events": self.events, "ledger": self.apo.ledger().as_dict()}
        return found | {"calibration": self.apo.calibration, "pins": [str(pin) for pin in self.apo.pins()]}

    def network_state(self, path: Path) -> Any:
        """By the library's own checkpoint, a window that is open included."""
        apoptosis.save(path.with_suffix(".safetensors"), self.model, self.optimizer, self.apo)
        return {"events": self.events}

    def restore_network(self, state: Any, path: Path) -> None:
        apoptosis.load(path.with_suffix(".safetensors"), self.model, self.optimizer, self.apo)
        self.events = state["events"]


class Pruning(MethodRun):
    """Torch-Pruning during training: global group magnitude, optimizer rebuilt after every cut.

    Args: target: asked after every turn for the multiply-adds to cut to.
    """

    def __init__(self, name: str, task: Task, data: TaskData, seed: int, target: Callable[[], int]) -> None:
        super().__init__(name, task, data, seed)
        self.target = target

    def after_turn(self) -> None:
        start = time.perf_counter()
        target, macs = self.target(), self.macs()
        self.idle = time.perf_counter() - start
        if macs > target:
            self.idle += prune_to(self.model, self.example(), target)
            self.optimizer = self.new_optimizer()


class Lasso(Pruning):
    """Group lasso from the first step, channels of small norm cut after every turn, in the manner of PruneTrain.

    The penalty is a proximal step after the optimizer's own, weighted by the learning rate: as a gradient, Adam would
    divide it away.
    """

    strength = 0.0

    def after_step(self) -> None:
        layers = prunable(self.model)
        with torch.no_grad():
            if not self.strength:
                batch = self.data.train.between(0, self.batch)
                first = float(self.data.loss(outputs_of(self.model, batch[0]), batch[1]))
                total = sum(float(layer.weight.flatten(1).norm(dim=1).sum()) for layer in layers)
                self.strength = LASSO_SHARE / (1 - LASSO_SHARE) * first / total
            step = self.strength * self.rate() / self.task.lr * LASSO_STEP
            for layer in layers:
                rows = layer.weight.flatten(1)
                rows.mul_((1 - step / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_min_(0.0))


class FineTuning(MethodRun):
    """A trained dense network, pruned once to the final multiply-adds, trained on at a tenth of the learning rate."""

    def __init__(self, name: str, dense: MethodRun, target: int) -> None:
        extra = max(1, round(FINE_TUNE * dense.task.epochs))
        model = copy.deepcopy(dense.model)
        super().__init__(name, dense.task, dense.data, dense.seed + 50, model=model, epochs=extra)
        prune_to(self.model, self.example(), target)
        self.step_macs = self.batch * self.macs()
        self.optimizer = self.new_optimizer()
        self.seconds, self.cpu_seconds, self.run_seconds = dense.seconds, dense.cpu_seconds, dense.run_seconds
        self.points, self.run_macs = list(dense.points), dense.run_macs

    def rate(self) -> float:
        return 0.1 * self.task.lr * (1 - self.step / self.total_steps)


class EarlyStopping:
    """The dense run, stopped when its validation metric has not improved for PATIENCE epochs; best weights kept."""

    def __init__(self, dense: MethodRun) -> None:
        self.dense, self.best, self.stopped = dense, -float("inf"), 0
        self.since, self.weights = 0, copy.deepcopy(dense.model.state_dict())

    def look(self) -> None:
        """Call after every epoch of the dense run."""
        if self.stopped:
            return
        value = self.dense.points[-1].validation
        self.since += 1
        if value > self.best:
            self.best, self.since, self.weights = value, 0, copy.deepcopy(self.dense.model.state_dict())
        if self.since >= PATIENCE or self.dense.finished:
            self.stopped = len(self.dense.points)
            self.clocks = (self.dense.seconds, self.dense.cpu_seconds, self.dense.run_seconds)

    def record(self) -> dict[str, Any]:
        """Read the test part once with the weights that were kept; the dense run's own are untouched."""
        last = copy.deepcopy(self.dense.model.state_dict())
        self.dense.model.load_state_dict(self.weights)
        record = self.dense.record()
        self.dense.model.load_state_dict(last)
        record["seconds"], record["cpu_seconds"], record["run_seconds"] = self.clocks
        record["points"] = record["points"][: self.stopped]
        record["run_macs"] = record["run_macs"] * self.stopped // len(self.dense.points)
        return record


def small(name: str, shrunk: Shrinking, *, epochs: float | None = None) -> MethodRun:
    """Return the widths that apoptosis found, trained from the start; epochs: None for the task's.

    Of a pretrained network: cut from it once, before training.
    """
    if shrunk.task.pretrained:
        task, data = shrunk.task, shrunk.data
        torch.manual_seed(shrunk.seed)
        model = cut_to(lambda: task.build(data, 1.0), shrunk.model, shrunk.example(), shrunk.widths())
    else:
        model = copy.deepcopy(shrunk.model)
        torch.manual_seed(shrunk.seed)
        fresh_like(model)
    return MethodRun(name, shrunk.task, shrunk.data, shrunk.seed, model=model, epochs=epochs)
