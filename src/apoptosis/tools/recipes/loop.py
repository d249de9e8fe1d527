"""The training loop behind the command: one run, epoch by epoch.

Holds: `Trainer`, the same for a network with and without apoptosis, used by train and compare alike.
Elsewhere: folders, logs, displays; the order of paired runs.
Everything random in an epoch follows from (seed, epoch): the order of the examples, and the generator that dropout
draws from. So paired runs see the same, and a run can be continued in the middle of an epoch.

Several processes train one network: each takes its rows of every batch, and weights its loss by their number, so that
the averaged gradient is that of the mean over the batch, whether the rows divide or not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apoptosis.decide.ledger import Event
from apoptosis.distributed.ranks import Ranks
from apoptosis.engine import Apoptosis
from apoptosis.errors import ArgumentError, CheckpointError, NonFiniteError
from apoptosis.tools.launch import Group, ProcessInfo
from apoptosis.tools.recipes import several
from apoptosis.tools.recipes.config import RunConfig
from apoptosis.tools.recipes.datasets import DATASETS, Dataset, Part
from apoptosis.tools.recipes.fitting import check_classes, check_fit, loss_of, placed_on, probe_of, run_on
from apoptosis.tools.recipes.interrupt import Interrupt, Stopped
from apoptosis.tools.recipes.metrics import evaluate
from apoptosis.tools.recipes.networks import build_network, call_macs, num_parameters
from apoptosis.tools.recipes.optim import learning_rates, make_optimizer
from apoptosis.tools.recipes.own_network import own_network, probe_limit
from apoptosis.tools.recipes.several import (
    StopVote,
    batch_share,
    begin_dropout,
    own_random_state,
    probe_share,
    random_state,
)

# Reading the loss waits for the device, so it is read this often only: for the display and the check for NaN.
CHECK_EVERY = 50

Record = dict[str, Any]
LogRecord = Callable[[Mapping[str, Any]], None]


class Watcher:
    """Sees a run's progress; this one shows nothing. Must be quick, for its time counts as training."""

    def data(self, data: Dataset) -> None:
        """Before the first step: the data as they were read."""

    def step(self, trainer: Trainer, loss: float) -> None:
        """Every CHECK_EVERY steps: mean loss of the epoch so far."""

    def event(self, trainer: Trainer, event: Event) -> None:
        """After shapes have changed."""

    def epoch(self, trainer: Trainer, epoch: Epoch) -> None:
        """After an epoch and its evaluation."""


SILENT = Watcher()


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """What one epoch gave. seconds: of training, since the run began; loss: mean over its steps; metric: on validation.

    metric is None where no validation part is held out.
    """

    epoch: int
    step: int
    seconds: float
    loss: float
    metric: float | None
    parameters: int
    macs: int
    widths: Mapping[str, int]


def make_network(config: RunConfig, data: Dataset, device: torch.device) -> nn.Module:
    """Build the full-width network of a run.

    Raises: ArgumentError: the library's do not take such data, or the user's factory fails.
    """
    if config.model is not None:
        return own_network(config.model, config.kwargs, data, device)
    if not data.shape or not data.num_classes:
        raise ArgumentError(f"'{config.data}' has examples of more than one tensor: give a network with --model.")
    return build_network(
        config.network,
        data.shape,
        data.num_classes,
        widths=config.widths,
        activation=config.activation,
        dropout=config.dropout,
    ).to(device)


class Trainer:
    """A network, its optimizer and, if the config says so, its apoptosis, trained on one data set.

    Args:
        config: the run. data: parts on the device already (see `Part.resident`). device: where to train.
        log: gets apoptosis' own records.
        interrupt: asked after every step; None for a run that cannot be interrupted.
        group: the processes that train together, each with a Trainer of its own; None for one alone. Everything below
            is collective then: all of them call it.

    `seconds` is wall time of training so far: setting apoptosis up and all it does included, evaluation excluded;
    `evaluation_seconds` is the rest of the run. `put_off`: done once, after the first step of an epoch that leaves
    no window open on any rank; its time is no training time.
    """

    def __init__(
        self,
        config: RunConfig,
        data: Dataset,
        device: torch.device,
        *,
        log: LogRecord | None = None,
        interrupt: Interrupt | None = None,
        group: Group | None = None,
    ) -> None:
        self.config, self.data, self.device = config, data, device
        self.interrupt = interrupt or Interrupt()
        self.group = group or Group(ProcessInfo(), device, Ranks())
        self.stop = StopVote(self.group, self.interrupt)
        self.batch = min(config.batch, len(data.train))
        self._evaluated = 512 if isinstance(data.train, Part) else self.batch
        self._share = batch_share(self.group, self.batch)
        torch.manual_seed(config.seed)
        self.model = make_network(config, data, device)
        self._loss_of = loss_of(data.kind, config.loss)
        self._classes = 0
        if config.model is not None or config.data not in DATASETS:
            self._classes = check_fit(self.model, data, self._loss_of, config.loss, device)
        self.parallel = self.group.parallel(self.model)
        self.optimizer = make_optimizer(config, self.model)
        self.steps_per_epoch = len(data.train) // self.batch
        self.total_steps = self.steps_per_epoch * config.epochs
        self._rates = learning_rates(config.schedule, config.lr, self.total_steps)
        self.step = 0
        self.put_off: Callable[[], None] | None = None
        self.seconds = self.evaluation_seconds = 0.0
        self.last_epoch_seconds = self._clock = 0.0
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._rng: Tensor | None = None
        self._macs: tuple[int, int] | None = None
        self.apo: Apoptosis | None = None
        if config.apoptosis:
            started = time.perf_counter()
            self.apo = self._start_apoptosis(log)
            self.seconds = time.perf_counter() - started

    def _start_apoptosis(self, log: LogRecord | None) -> Apoptosis:
        config, held_out = self.config, self.data.validation
        rows = len(held_out) if config.budget is not None else min(config.probe_rows, len(held_out))
        example = placed_on(self.data.train.between(0, 2)[0], self.device)
        if config.budget is None:
            rows = min(rows, probe_limit(example))
        probe = None
        if rows:
            share = probe_share(self.group, rows)
            labelled = config.loss is None
            probe = probe_of(self.data, *share, self.device, labelled=labelled, num_classes=self._classes)
        return Apoptosis(
            self.parallel,
            self.optimizer,
            example,
            tolerance=config.tolerance,
            target=config.target,
            criterion=config.criterion,
            total_steps=self.total_steps,
            budget=config.budget,
            probe=probe,
            align=config.align,
            exclude=config.exclude,
            log=log,
            seed=config.seed,
            calibration=config.calibration,
        )

    @property
    def method(self) -> str:
        """How the run is called in logs and results."""
        return "dense" if self.apo is None else "apoptosis"

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.step >= self.total_steps

    @property
    def epoch(self) -> int:
        """Number of epochs completed."""
        return self.step // self.steps_per_epoch

    @property
    def watching(self) -> bool:
        """Whether a window is open that a checkpoint would lose: each of several processes has its own."""
        return self.group.size > 1 and self.apo is not None and self.apo.watching

    def widths(self) -> dict[str, int]:
        """Return channels per group that may shrink, by name; empty without apoptosis."""
        return {} if self.apo is None else {g.name: g.num_channels for g in self.apo.groups() if g.pin is None}

    def parameters(self) -> int:
        """Count the network's parameters now."""
        return num_parameters(self.model)

    def macs(self) -> int:
        """Count multiply-adds per example now; counted again only after the network has shrunk."""
        size = self.parameters()
        if self._macs is None or self._macs[0] != size:
            one = placed_on(self.data.train.between(0, 1)[0], self.device)
            self._macs = (size, call_macs(self.model, lambda: run_on(self.model, one)))
        return self._macs[1]

    def run_epoch(self, watch: Watcher = SILENT) -> Epoch:
        """Train to the end of the current epoch, then evaluate on the validation part.

        Raises: NonFiniteError: the loss is NaN or infinite. Stopped: `interrupt` was requested; raised
            between two steps, and `state_dict` then holds all that continuing needs. After the epoch's last step the
            epoch is finished instead, and the caller asks `interrupt`.
        """
        self._clock, epoch = time.perf_counter(), self.epoch
        self.last_epoch_seconds = 0.0
        try:
            self._train(watch)
            self._synchronize()
        finally:
            self._stop_clock()
        loss = self._loss() / self.steps_per_epoch
        metric = self.evaluate_on("validation") if len(self.data.validation) else None
        done = Epoch(
            epoch=epoch + 1,
            step=self.step,
            seconds=self.seconds,
            loss=loss,
            metric=metric,
            parameters=self.parameters(),
            macs=self.macs(),
            widths=self.widths(),
        )
        watch.epoch(self, done)
        return done

    def evaluate_on(self, which: str) -> float:
        """Metric on the "validation" or "test" part; its time is no training time."""
        started = time.perf_counter()
        part = self.data.validation if which == "validation" else self.data.test
        ranks = self.group.ranks

        def value_of_rank_0() -> float:  # the running averages of its BatchNorm are those of the run
            if ranks.rank:
                return 0.0
            return evaluate(self.model, part, self.data.metric, self.device, self._evaluated, self._loss_of)

        value = ranks.first(ranks.run_collectively(value_of_rank_0))
        self.evaluation_seconds += time.perf_counter() - started
        return value

    def state_dict(self) -> Record:
        """Return what a checkpoint needs besides model, optimizer and apoptosis."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "loss_sum": self._loss_sum,
            "rng": random_state(self.device),
        }
        if self.group.size > 1:
            state["loss_sum"] = torch.full_like(self._loss_sum, self._loss())
            state["rng"] = torch.stack(self.group.ranks.gathered(random_state(self.device).cpu()))
            # the state of apoptosis has its own
            state["buckets"] = [] if self.apo is not None else several.bucket_layouts(self.parallel)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises: CheckpointError: it is of another run.
        """
        try:
            step = int(state["step"])
            self.seconds, self.evaluation_seconds = float(state["seconds"]), float(state["evaluation_seconds"])
            self._loss_sum = state["loss_sum"].to(self.device)
            self._rng = own_random_state(self.group, state["rng"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint does not hold the state of a training run ({error!r}).") from error
        if not 0 <= step <= self.total_steps:
            raise CheckpointError(f"the checkpoint stands at step {step}; this run has {self.total_steps}.")
        self.step = step
        several.take_layouts(self.parallel, state.get("buckets", ()))

    def _train(self, watch: Watcher) -> None:
        """Run the steps that are left of the current epoch."""
        data, model, optimizer, apo = self.data.train, self.parallel, self.optimizer, self.apo
        own, alone, loss_of_batch = self._share, self.group.size == 1, self._loss_of
        weight = (own.stop - own.start) * self.group.size / self.batch
        epoch, first = divmod(self.step, self.steps_per_epoch)
        batches = self._begin_epoch(epoch, first)
        group = optimizer.param_groups[0]
        precision = self._precision()
        read = data.batches(batch[own] for batch in batches[first:])
        for position, (inputs, labels) in enumerate(read, start=first):
            if self._classes and labels.device.type == "cpu":
                check_classes(labels, self._classes)
            inputs, labels = placed_on(inputs, self.device), labels.to(self.device)
            group["lr"] = self._rates[self.step]
            with self.group.step():
                with precision:
                    loss = loss_of_batch(run_on(model, inputs), labels)
                loss = loss if alone else weight * loss
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
            optimizer.step()
            if apo is not None and (event := apo.step()):
                watch.event(self, event)
            self._loss_sum += loss.detach()
            self.step += 1
            if self.step % CHECK_EVERY == 0:
                self._check(epoch, position + 1, watch)
            if position + 1 < self.steps_per_epoch:
                self._between_steps()
        self._check(epoch, self.steps_per_epoch, watch)

    def _between_steps(self) -> None:
        """Stop if an interrupt was requested, or do what was put off until now."""
        if self.stop.after(self.step, watching=self.watching):
            self._rng = random_state(self.device)
            raise Stopped
        if self.put_off is not None and not self.watching:
            work, self.put_off = self.put_off, None
            self._synchronize()
            self._stop_clock()
            work()
            self._clock = time.perf_counter()

    def _stop_clock(self) -> None:
        passed = time.perf_counter() - self._clock
        self.last_epoch_seconds += passed
        self.seconds += passed

    def _begin_epoch(self, epoch: int, first: int) -> Tensor:
        """Set the random state of this place in the run; return the epoch's rows, (steps, batch)."""
        seed = 2 * (self.config.seed * 100_003 + epoch)
        order = torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(seed), device="cpu")
        begin_dropout(self.group, self.device, seed + 1, first, self._rng)
        if not first:
            self._loss_sum = torch.zeros_like(self._loss_sum)
        self.model.train()
        order = order[: self.steps_per_epoch * self.batch].to(self.data.train.device)
        return order.view(self.steps_per_epoch, self.batch)

    def _loss(self) -> float:
        """Sum of the epoch's losses so far, of all rows of all ranks."""
        if self.group.size == 1:
            return float(self._loss_sum)
        return float(self.group.ranks.total(self._loss_sum)) / self.group.size

    def _check(self, epoch: int, done: int, watch: Watcher) -> None:
        mean = self._loss() / done
        if not math.isfinite(mean):
            raise NonFiniteError(
                f"the training loss is {mean} by step {self.step} (epoch {epoch + 1}); "
                f"lower --lr (now {self.config.lr:g}) or check the data."
            )
        watch.step(self, mean)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
