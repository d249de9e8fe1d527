"""A callback of transformers' Trainer that shrinks the network while it trains.

Holds: the callback, and the places of the Trainer at which no callback is called early enough. Elsewhere: folders and
their widths (folders.py), the loop itself (engine).

A Trainer loads the weights of a checkpoint, and those of the best one, before it calls any callback, and tells
callbacks neither the folder nor the wrapped model. So some of its methods are wrapped, once, when the first callback is
made; for Trainers without this callback they do what they did.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from apoptosis.checkpoint.file import read_file, write_file
from apoptosis.checkpoint.tree import pack, unpack
from apoptosis.checkpoint.widths import has_shrunk, set_widths_
from apoptosis.decide.ledger import Ledger
from apoptosis.display.loggers import scalars
from apoptosis.distributed.wrappers import unwrapped
from apoptosis.engine import Apoptosis
from apoptosis.errors import ApoptosisError, ArgumentError, CheckpointError
from apoptosis.integrations.common import at_full_width, check_options, first_rows, moved
from apoptosis.integrations.transformers import folders
from apoptosis.integrations.widths_file import WIDTHS_FILE, read_widths, write_widths

RUN_FILE = "apoptosis_run.safetensors"
_logger = logging.getLogger(__name__)
_OWN = ("model", "optimizer", "example_input", "log")
_MARK = "_wrapped_by_apoptosis"
_METHODS = ("_inner_training_loop", "_load_from_checkpoint", "_load_best_model", "_save", "create_model_card")


class ApoptosisTrainerCallback(TrainerCallback):
    """Shrinks the network of a `transformers.Trainer` while it trains: `Trainer(..., callbacks=[this])`.

    The run ends with `state.max_steps`, steps are those of the optimizer, whatever the accumulation. The example input
    is the first 8 examples of the first batch, as the model gets it. Checkpoint folders get the widths
    (`apoptosis_widths.json`) and the state of the run, so that `train(resume_from_checkpoint=...)` and
    `load_best_model_at_end` need nothing more; so do folders of `save_pretrained`, which
    `apoptosis.integrations.transformers.from_pretrained` reads. Events go to the Trainer's log, as `event/...`.

    Args:
        example_input: in place of the first batch: what one forward pass takes.
        log: called with one dictionary per attempt, as `log=` of Apoptosis.
        options: all others of `apoptosis.Apoptosis`: target, tolerance, exclude, probe, budget, ...

    Attributes:
        apo: the `Apoptosis` of the run; None before the first step.

    Raises: ArgumentError: an option that Apoptosis does not have, or one that the Trainer decides.

    Example:
        >>> ApoptosisTrainerCallback(target="2x").apo is None
        True
    """

    def __init__(
        self, *, example_input: Any = None, log: Callable[[dict[str, Any]], None] | None = None, **options: Any
    ) -> None:
        check_options("ApoptosisTrainerCallback", options, _OWN)
        _wrap_trainer()
        folders.wrap_saving()
        self.apo: Apoptosis | None = None
        self._given, self._log, self._options = example_input, log, options
        self._example: Any = None
        self._trainer: weakref.ref[Trainer] | None = None
        self._hook: Any = None
        self._resume: Path | None = None
        self._total: int | None = None
        self._unlogged: list[dict[str, float]] = []

    # ------------------------------------------------------------------ what the Trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Go on with the run of a checkpoint, or wait for the first batch."""
        trainer = self._attached()
        model, resume = trainer.model_wrapped, self._resume
        if _is_adapted(trainer.model) and self._options.get("frozen") == "cut":
            raise ArgumentError(
                "frozen='cut' with adapters of peft: checkpoints of the Trainer hold the adapters alone, and would not "
                "fit the base model that is loaded beside them. Leave frozen= out, or merge the adapters first."
            )
        self._example, self._resume = self._given, None
        self._total = self._options.get("total_steps", state.max_steps)
        if resume is not None and (resume / RUN_FILE).is_file():
            self._go_on(resume / RUN_FILE)
            return
        if state.global_step and self._total is not None:  # checkpoints that hold no run: a new one over what is left
            self._total = max(1, self._total - state.global_step)
        if self._example is None:
            self._hook = model.register_forward_pre_hook(self._see, with_kwargs=True)
        else:
            self._begin()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Make the one call per step."""
        if self.apo is None and self._trainer is not None:
            self._begin()
        if self.apo is not None and (event := self.apo.step()):
            _logger.info("%s", event)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Log what happened, now that the Trainer has counted the step."""
        while self._unlogged:
            self._attached().log(self._unlogged.pop(0))

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Say what all removals cost; the network stays as it is."""
        if self.apo is not None:
            _logger.info("%s", self.apo.ledger())

    def ledger(self) -> Ledger:
        """Sum up what all removals of the run cost at most.

        Raises: ApoptosisError: no step was made yet.
        """
        if self.apo is None:
            raise ApoptosisError("the ledger is of a run: call trainer.train() first.")
        return self.apo.ledger()

    # ------------------------------------------------------------------ the run

    def _attached(self) -> Any:
        trainer = None if self._trainer is None else self._trainer()
        if trainer is None:
            raise ApoptosisError(
                "ApoptosisTrainerCallback was called by something that is no transformers.Trainer: give it to "
                "Trainer(..., callbacks=[...]) or trainer.add_callback(...)."
            )
        return trainer

    def _see(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._example is None:
            self._example = first_rows(kwargs if not args else args if not kwargs else None)
            if self._example is None:
                raise ArgumentError(
                    "the model gets positional and keyword arguments at once: give "
                    "ApoptosisTrainerCallback(example_input=) what one forward pass takes, by name."
                )

    def _begin(self) -> None:
        trainer = self._attached()
        self._unhook()
        optimizer = _plain(trainer.optimizer)
        options = {**self._options, "total_steps": self._total}
        self.apo = Apoptosis(trainer.model_wrapped, optimizer, self._example, log=self._record, **options)

    def _record(self, record: dict[str, Any]) -> None:
        if record.get("kind") == "event":
            self._unlogged.append(scalars(record))
        if self._log is not None:
            self._log(record)

    def _go_on(self, path: Path) -> None:
        """Take over the run that a checkpoint holds, its example input included: it goes on to the same bits."""
        try:
            manifest, tensors = read_file(path)
            held = unpack(manifest.get("run"), tensors, "the run")
            example, state = held["example"], held["state"]
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"'{path}' holds no run of ApoptosisTrainerCallback: {error!r}.") from error
        self._example = moved(example, self._attached().args.device) if self._given is None else self._given
        trainer = self._attached()
        with at_full_width(trainer.model_wrapped, [_plain(trainer.optimizer)]):  # from where a goal counts
            self._begin()
        if self.apo is not None:
            self.apo.load_state_dict(state)

    def _write_run(self, folder: Path) -> None:
        if self.apo is None:
            return
        tensors: dict[str, Tensor] = {}
        example = self._example if self._given is None else None
        held = pack({"example": example, "state": self.apo.state_dict()}, "run", tensors)
        write_file(folder / RUN_FILE, tensors, {"run": held})

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _end(self) -> None:
        """Take all hooks off, also after an error; the record of the run stays."""
        self._unhook()
        if self.apo is not None:
            self.apo.close()


# ---------------------------------------------------------------- what the Trainer does


def _wrap_trainer() -> None:
    """Wrap the methods of the Trainer at which no callback is called, once.

    Raises: ApoptosisError: this release of transformers has no such method.
    """
    if hasattr(Trainer, _MARK):
        return
    import transformers

    missing = [name for name in _METHODS if not hasattr(Trainer, name)]
    if missing:
        raise ApoptosisError(
            f"transformers {transformers.__version__} has no Trainer.{missing[0]}, which ApoptosisTrainerCallback "
            "needs: use a release that docs/ecosystem.md names, or call Apoptosis in a callback of your own."
        )
    arounds: tuple[Callable[..., Any], ...] = (_training, _resuming, _best, _saving, _card)
    for name, around in zip(_METHODS, arounds, strict=True):
        original = getattr(Trainer, name)
        setattr(Trainer, name, _wrapped(original, around))
    setattr(Trainer, _MARK, True)


def _wrapped(original: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **options: Any) -> Any:
        return around(self, original, *args, **options)

    return method


def _callback(trainer: Any) -> ApoptosisTrainerCallback | None:
    found = [one for one in trainer.callback_handler.callbacks if isinstance(one, ApoptosisTrainerCallback)]
    if len(found) > 1:
        raise ArgumentError("a Trainer takes one ApoptosisTrainerCallback; it has several.")
    return found[0] if found else None


def _training(trainer: Any, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    callback = _callback(trainer)
    if callback is None:
        return original(trainer, *args, **options)
    callback.apo, callback._trainer = None, weakref.ref(trainer)
    try:
        return original(trainer, *args, **options)
    finally:
        callback._end()


def _resuming(trainer: Any, original: Callable[..., Any], folder: Any, *args: Any, **options: Any) -> Any:
    callback = _callback(trainer)
    if callback is not None:
        callback._resume = Path(folder)
        _take_widths(trainer, Path(folder))
    return original(trainer, folder, *args, **options)


def _best(trainer: Any, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    if _callback(trainer) is not None and trainer.state.best_model_checkpoint is not None:
        _take_widths(trainer, Path(trainer.state.best_model_checkpoint))
    return original(trainer, *args, **options)


def _saving(trainer: Any, original: Callable[..., Any], output_dir: Any = None, *args: Any, **options: Any) -> Any:
    callback, folder = _callback(trainer), Path(output_dir or trainer.args.output_dir)
    if callback is not None:  # before the weights: a folder that lacks them is never taken for a checkpoint
        folder.mkdir(parents=True, exist_ok=True)
        write_widths(trainer.model, folder)
        if not trainer.args.save_only_model and trainer.is_in_train:
            callback._write_run(folder)
    return original(trainer, output_dir, *args, **options)


def _card(trainer: Any, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    result = original(trainer, *args, **options)
    if has_shrunk(trainer.model) and trainer.is_world_process_zero():
        model = unwrapped(trainer.model)
        folders.add_to_card(model, trainer.args.output_dir, plain=folders.is_plain(model))
    return result


def _take_widths(trainer: Any, folder: Path) -> None:
    """Give the network the widths of a checkpoint folder, before its weights are loaded."""
    widths = read_widths(folder)
    if widths is None:
        if has_shrunk(trainer.model):
            raise CheckpointError(
                f"'{folder}' has no {WIDTHS_FILE}, and the network has lost channels since: it is a checkpoint "
                "that was written without ApoptosisTrainerCallback. Load it into a network that was built anew."
            )
        return
    whole = trainer.model_wrapped
    model = whole if unwrapped(whole) is unwrapped(trainer.model) else trainer.model
    set_widths_(model, widths, None if trainer.optimizer is None else _plain(trainer.optimizer))


# ---------------------------------------------------------------- small things


def _plain(optimizer: Any) -> Any:
    """Return the optimizer inside of accelerate's."""
    return optimizer.optimizer if type(optimizer).__module__.startswith("accelerate.") else optimizer


def _is_adapted(model: Any) -> bool:
    return any(kind.__module__.startswith("peft.") for kind in type(model).__mro__)
