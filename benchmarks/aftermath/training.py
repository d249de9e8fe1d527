"""Twins: training steps on the same batches, losses on the same examples, and how far outputs moved.

Holds: one step of the recipe, training on, comparisons of outputs. Elsewhere: what is removed (removal.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.aftermath.tasks import Batch, Task, call, logits, loss_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """A network in training, with its optimizer and the next step; `rates` are those of its groups at factor 1."""

    task: Task
    model: nn.Module
    optimizer: Optimizer
    rates: tuple[float, ...]

    @classmethod
    def begin(cls, task: Task, seed: int) -> Run:
        torch.manual_seed(seed)
        model = task.build().train()
        optimizer = task.optimizer(model.parameters())
        return cls(task=task, model=model, optimizer=optimizer, rates=tuple(g["lr"] for g in optimizer.param_groups))

    def twin(self) -> Run:
        """Return a copy that shares nothing with this run."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        return Run(task=self.task, model=model, optimizer=optimizer, rates=self.rates)

    def step(self, step: int) -> float:
        """Take one step and return its loss before it."""
        torch.manual_seed(step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.task.schedule(step / self.task.steps)
        inputs, labels = self.task.batch(step)
        loss = loss_of(call(self.model, inputs), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def outputs(model: nn.Module, batches: Iterable[Batch], *, batch_statistics: bool = False) -> tuple[Tensor, Tensor]:
    """Return logits (predictions, classes) in evaluation mode, and labels (predictions,).

    batch_statistics: batch norms take those of each batch. Their running statistics lag behind where the learning rate
    is high, and what the network returns with them says nothing then.
    """
    found, labels, mode = [], [], model.training
    model.eval()
    norms = [m for m in model.modules() if batch_statistics and isinstance(m, nn.modules.batchnorm._BatchNorm)]
    states = [copy.deepcopy(norm.state_dict()) for norm in norms]
    for norm in norms:
        norm.train()
    with torch.no_grad():
        for inputs, own in batches:
            out = logits(call(model, inputs))
            found.append(out.reshape(-1, out.shape[-1]))
            labels.append(own.reshape(-1))
    for norm, state in zip(norms, states, strict=True):
        norm.load_state_dict(state)
    model.train(mode)
    return torch.cat(found).double(), torch.cat(labels)


def moved(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return what changed between two passes over the same examples.

    kl: mean divergence of the predictions after from those before. rms_squared: squared change of the logits, their
    common level left out, over their spread. loss: change of the mean cross-entropy. flips: share of
    predictions that became others.
    """
    (old, labels), (new, _) = before, after
    old_log, new_log = old.log_softmax(-1), new.log_softmax(-1)
    level_old, level_new = old - old.mean(-1, keepdim=True), new - new.mean(-1, keepdim=True)
    spread = (level_old - level_old.mean(0)).square().mean()
    pick = labels[:, None]
    return {
        "kl": float((old_log.exp() * (old_log - new_log)).sum(-1).mean()),
        "rms_squared": float((level_new - level_old).square().mean() / spread),
        "loss": float((old_log.gather(1, pick) - new_log.gather(1, pick)).mean()),
        "flips": float((old.argmax(-1) != new.argmax(-1)).double().mean()),
    }


def go_on(run: Run, first: int, number: int) -> tuple[list[float], float]:
    """Train on; return the loss of every step and the loss on held-out examples at the end."""
    losses = [run.step(first + i) for i in range(number)]
    found, labels = outputs(run.model, run.task.held_out)
    return losses, float(nn.functional.cross_entropy(found, labels))


def windows(number: int, shortest: int = 10) -> list[tuple[int, int]]:
    """Split steps into windows, each twice as long as the one before; the last takes what is left.

    Example:
        >>> windows(45)
        [(0, 10), (10, 20), (20, 45)]
    """
    found, start = [], 0
    while start < number:
        end = shortest if not start else 2 * start
        end = number if 2 * end > number else end
        found.append((start, end))
        start = end
    return found


def differences(losses: Sequence[float], twin: Sequence[float]) -> list[list[float]]:
    """Return [first step, end, mean difference of the losses] of every window."""
    own = [a - b for a, b in zip(losses, twin, strict=True)]
    return [[a, b, sum(own[a:b]) / (b - a)] for a, b in windows(len(own))]
