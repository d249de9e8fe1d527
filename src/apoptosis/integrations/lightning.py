"""A callback of Lightning's Trainer that shrinks the network while it trains.

Holds: the callback, and how a checkpoint's widths reach a module before its weights do. Elsewhere: the loop itself
(engine), widths as a value (checkpoint.widths).

Lightning restores weights before it calls any callback, and `load_from_checkpoint` knows none. The one place that both
ask is `on_load_checkpoint` of the module, so that is wrapped, once for each class that a callback has met.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from apoptosis.checkpoint.widths import current_widths, set_widths_
from apoptosis.decide.ledger import Ledger
from apoptosis.display.loggers import scalars
from apoptosis.engine import Apoptosis
from apoptosis.errors import ArgumentError
from apoptosis.integrations.common import at_full_width, check_options, first_rows, moved
from apoptosis.surgery.averaged_models import copy_of

if not TYPE_CHECKING and "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:
    from pytorch_lightning import Callback, LightningModule, Trainer  # the same library under its other name
else:
    from lightning.pytorch import Callback, LightningModule, Trainer

KEY = "apoptosis"
"""Key of a checkpoint under which the widths are."""
_MARK = "_sets_widths_of_apoptosis"
_INSIDE = "_apoptosis_module"  # attribute of a LightningModule: name of the module inside that shrank
_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
_OWN = ("model", "optimizer", "example_input", "log", "probe", "total_steps")
_LABELS = frozenset(("label", "labels", "target", "targets", "y"))
_Module = TypeVar("_Module", bound=LightningModule)


class ApoptosisCallback(Callback):
    """Shrinks the network of a Lightning `Trainer` while it trains: `Trainer(callbacks=[ApoptosisCallback()])`.

    A step is a step of the optimizer, whatever the accumulation. What shrinks is the module's own forward pass, or one
    module inside. Checkpoints carry the widths and the state of the run: `fit(ckpt_path=)`, `validate(ckpt_path=)` and,
    where a callback has been made for the class, `load_from_checkpoint` need nothing more. Averaged copies of
    `WeightAveraging` and `StochasticWeightAveraging` shrink along. Parameters and multiply-adds go to `self.log`,
    events to the loggers as `event/...`.

    Args:
        total_steps: optimizer steps of the run. None: what the Trainer estimates.
        module: name of the module inside that shrinks ("net"). None: the LightningModule, which then needs a forward.
        inputs: batch -> what one forward pass of it takes. None: the first entry of a tuple or list, a dict without its
            labels, a tensor.
        probe: held-out inputs of the form that `inputs` returns, or (inputs, labels). None with `budget=`: examples of
            the validation batches before training (the Trainer's sanity check).
        probe_rows: how many of these.
        log: called with one dictionary per attempt, as `log=` of Apoptosis.
        options: all others of `apoptosis.Apoptosis`: target, tolerance, exclude, budget, ...

    Attributes:
        apo: the `Apoptosis` of the run; None before the first batch.

    Raises: ArgumentError: an option that Apoptosis does not have.
    """

    def __init__(
        self,
        *,
        total_steps: int | None = None,
        module: str | None = None,
        inputs: Callable[[Any], Any] | None = None,
        probe: Any = None,
        probe_rows: int = 512,
        log: Callable[[dict[str, Any]], None] | None = None,
        **options: Any,
    ) -> None:
        check_options("ApoptosisCallback", options, _OWN)
        self.apo: Apoptosis | None = None
        self._total, self._name, self._inputs = total_steps, module, inputs or batch_inputs
        self._probe, self._probe_rows, self._log, self._options = probe, probe_rows, log, options
        self._held_out: list[tuple[Any, Any]] = []
        self._pending: Mapping[str, Any] | None = None  # state of the run that a checkpoint holds
        self._held: Mapping[str, Any] | None = None  # state of the run that the last fit ended with
        self._trained: weakref.ref[Any] | None = None  # the module of that run
        self._steps, self._example = 0, None
        self._records: list[dict[str, Any]] = []
        self._sizes: dict[str, float] = {}  # as they are logged

    @property
    def ledger(self) -> Ledger | None:
        """What all removals cost so far; None before the first batch."""
        return None if self.apo is None else self.apo.ledger()

    # ------------------------------------------------------------------ what the Trainer calls

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the widths of checkpoints set before their weights are loaded."""
        follow_checkpoints(type(pl_module))
        if stage == "fit":
            self.apo, self._held_out, self._records = None, [], []

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep examples of the sanity check as the probe."""
        wanted = self._options.get("budget") is not None and self._probe is None
        if wanted and self.apo is None and sum(_rows(x) for x, _ in self._held_out) < self._probe_rows:
            self._held_out.append((self._inputs(batch), _labels(batch)))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin the run, or go on with that of a checkpoint, once there is a batch to look at."""
        if self.apo is None:
            self._begin(trainer, pl_module, batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Make the one call per step, where the batch before brought one."""
        if self.apo is None or trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        if self.apo.step() is not None:
            self._see_sizes(self.apo)
        pl_module.log_dict(self._sizes)
        for record in self._records:
            for logger in trainer.loggers:
                logger.log_metrics(scalars(record), step=trainer.global_step)
        self._records.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run, which goes into checkpoints that hold more than weights."""
        if self._held is not None:  # after a fit, whose run is closed now
            return dict(self._held)
        return {} if self.apo is None else {"run": self.apo.state_dict(), "example": self._example}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of the run for the first batch."""
        self._pending = state_dict if "run" in state_dict else None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take all hooks off; a further fit of the same Trainer goes on with the run."""
        if stage == "fit":
            self._end()
            self._trained = weakref.ref(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take all hooks off: there is no teardown after an error. Checkpoints that follow hold the run as it was."""
        self._end()

    # ------------------------------------------------------------------ the run

    def _end(self) -> None:
        if self.apo is not None and self._held is None:
            self._held = self.state_dict()  # a closed run never acts again
            self.apo.close()

    def _see_sizes(self, apo: Apoptosis) -> None:
        ledger = apo.ledger()
        self._sizes = {f"{KEY}/parameters": float(ledger.parameters[1]), f"{KEY}/macs": float(ledger.macs[1])}

    def _begin(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        model = self._model(trainer, pl_module)
        total = self._total
        if total is None:
            estimated = trainer.estimated_stepping_batches
            total = int(estimated) if estimated != float("inf") else None
        pending = self._goes_on(trainer, pl_module)
        if pending is None and total is not None and self._total is None:
            # of a checkpoint that holds no run: a new one over what is left
            total = max(1, total - trainer.global_step)
        arguments = {"total_steps": total, "probe": self._examples(), "log": self._keep, **self._options}
        if pending is None:
            self._example = first_rows(self._inputs(batch))
            self.apo = Apoptosis(model, trainer.optimizers, self._example, **arguments)
        else:
            self._example = moved(pending["example"], pl_module.device)
            with at_full_width(model, trainer.optimizers):
                apo = Apoptosis(model, trainer.optimizers, self._example, **arguments)
            apo.load_state_dict(pending["run"])
            self.apo = apo
        self._steps = trainer.global_step
        self._see_sizes(self.apo)
        vars(pl_module)[_INSIDE] = self._name or ""
        for averaged in _averages(trainer, self._name):
            self.apo.follow(averaged)

    def _goes_on(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, Any] | None:
        """Return the state to go on with: of a checkpoint, or of the last fit of the same Trainer and module."""
        pending, held, trained = self._pending, self._held, self._trained
        self._pending = self._held = self._trained = None
        same = trained is not None and trained() is pl_module and trainer.global_step == self._steps > 0
        return pending if pending is not None else held if same else None

    def _model(self, trainer: Trainer, pl_module: LightningModule) -> nn.Module:
        """Return the module that shrinks, in its wrapper for several processes."""
        wrapped = trainer.strategy.model
        if type(trainer.strategy).__name__ in _SHARDED:
            raise ArgumentError(
                f"ApoptosisCallback: {type(trainer.strategy).__name__} spreads parameters over processes, which this "
                "callback does not support. Use strategy='ddp', or a loop of your own with fully_shard."
            )
        if self._name is not None:
            if wrapped is not pl_module:
                raise ArgumentError(
                    f"ApoptosisCallback: module='{self._name}' lies inside what {type(wrapped).__name__} wraps. Of "
                    "several processes the whole LightningModule shrinks: give it a forward, and leave module= out."
                )
            return pl_module.get_submodule(self._name)
        if type(pl_module).forward is LightningModule.forward:
            names = ", ".join(f"'{name}'" for name, _ in pl_module.named_children())
            raise ArgumentError(
                f"ApoptosisCallback: {type(pl_module).__name__} has no forward. Give it one, or say module= ({names})."
            )
        return wrapped if isinstance(wrapped, nn.Module) else pl_module

    def _examples(self) -> Any:
        """Return the probe: what was given, or what the sanity check has shown."""
        if self._probe is not None or self._options.get("budget") is None:
            return self._probe
        if not self._held_out:
            raise ArgumentError(
                "ApoptosisCallback: budget= needs held-out examples, and no validation batch was seen before training. "
                "Give probe=, or a validation loader and num_sanity_val_steps of 1 or more."
            )
        inputs = _joined([x for x, _ in self._held_out], self._probe_rows)
        labels = [y for _, y in self._held_out]
        if any(y is None for y in labels):
            return inputs
        return inputs, _joined(labels, self._probe_rows)

    def _keep(self, record: dict[str, Any]) -> None:
        self._records.append(record)
        if self._log is not None:
            self._log(record)


# ---------------------------------------------------------------------- checkpoints


def follow_checkpoints(cls: type[LightningModule]) -> None:
    """Have a class of LightningModules keep its widths in checkpoints, and take them before weights; once for each.

    Its `on_save_checkpoint` is called for checkpoints of weights alone, too, where no callback is.

    Args: cls: whose `on_save_checkpoint` and `on_load_checkpoint` are wrapped; what they do themselves stays.
    """
    saves, loads = cls.on_save_checkpoint, cls.on_load_checkpoint
    if getattr(loads, _MARK, False):
        return

    @functools.wraps(saves)
    def on_save_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        saves(self, checkpoint)
        name = vars(self).get(_INSIDE)
        if name is not None:
            checkpoint[KEY] = {"module": name, "widths": current_widths(self.get_submodule(name))}

    @functools.wraps(loads)
    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        found = checkpoint.get(KEY)
        if found is not None:
            trainer = getattr(self, "_trainer", None)
            for module in (self, *([] if trainer is None else _averaged_modules(trainer))):
                set_widths_(module.get_submodule(found["module"]), found["widths"])
            vars(self)[_INSIDE] = found["module"]
        loads(self, checkpoint)

    setattr(on_load_checkpoint, _MARK, True)
    for name, function in {"on_save_checkpoint": on_save_checkpoint, "on_load_checkpoint": on_load_checkpoint}.items():
        setattr(cls, name, function)


def load_from_checkpoint(cls: type[_Module], path: Any, **options: Any) -> _Module:
    """Load a module from a checkpoint of a shrunk one, in a program that makes no callback.

    Args:
        cls: the LightningModule's class.
        path: of the checkpoint.
        options: as `LightningModule.load_from_checkpoint` takes them.
    """
    follow_checkpoints(cls)
    return cls.load_from_checkpoint(path, **options)


def _averaged_modules(trainer: Trainer) -> list[nn.Module]:
    """Return the copies of the LightningModule that averaging callbacks hold."""
    models = [getattr(callback, "_average_model", None) for callback in getattr(trainer, "callbacks", ())]
    return [copy_of(model) for model in models if isinstance(model, nn.Module)]


def _averages(trainer: Trainer, name: str | None) -> list[nn.Module]:
    return [model if name is None else model.get_submodule(name) for model in _averaged_modules(trainer)]


# ---------------------------------------------------------------------- batches


def batch_inputs(batch: Any) -> Any:
    """Return what a forward pass takes of a batch: its first entry, or a dict without labels.

    Raises: ArgumentError: a batch of another kind.

    Example:
        >>> batch_inputs([torch.zeros(2, 3), torch.zeros(2)]).shape
        torch.Size([2, 3])
        >>> list(batch_inputs({"input_ids": torch.zeros(2, 3), "labels": torch.zeros(2)}))
        ['input_ids']
    """
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name not in _LABELS}
    if isinstance(batch, tuple | list) and batch:
        return batch_inputs(batch[0])
    raise ArgumentError(f"ApoptosisCallback: a batch is a {type(batch).__name__}. Give inputs=, which reads the input.")


def _labels(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return next((value for name, value in batch.items() if name in _LABELS), None)
    return batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 and isinstance(batch[1], Tensor) else None


def _rows(inputs: Any) -> int:
    tensors = [x for x in (inputs.values() if isinstance(inputs, Mapping) else [inputs]) if isinstance(x, Tensor)]
    return int(tensors[0].shape[0]) if tensors and tensors[0].dim() else 0


def _joined(parts: list[Any], rows: int) -> Any:
    if isinstance(parts[0], Mapping):
        return {name: _joined([part[name] for part in parts], rows) for name in parts[0]}
    return torch.cat(list(parts))[:rows]
