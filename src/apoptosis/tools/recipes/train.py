"""One run, with or without apoptosis, in a folder: train, checkpoint, resume, evaluate once.

Holds: the order of things in `apoptosis train`. Elsewhere: steps (loop), files' names (folder).
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import torch

from apoptosis.checkpoint import load, save
from apoptosis.distributed.ranks import Ranks
from apoptosis.errors import CheckpointError, NonFiniteError
from apoptosis.tools.launch import Group
from apoptosis.tools.recipes.config import RunConfig, resolve_device
from apoptosis.tools.recipes.data import load_data
from apoptosis.tools.recipes.datasets import Dataset
from apoptosis.tools.recipes.folder import RunFolder
from apoptosis.tools.recipes.interrupt import Interrupt, Stopped
from apoptosis.tools.recipes.loop import SILENT, Epoch, Trainer, Watcher
from apoptosis.tools.recipes.results import Result, finish
from apoptosis.tools.recipes.several import INTERRUPT_GRACE, threads_of_one

LONGEST_PUT_OFF = 600.0  # seconds; then a checkpoint of several processes is written inside a window too


def prepare(config: RunConfig, group: Group | None = None) -> tuple[Dataset, torch.device]:
    """Set threads, find the device, read the data and put them where they train.

    Several processes on one machine share its cores, unless --threads or OMP_NUM_THREADS says how many threads each
    has.

    Raises: ArgumentError, DataError: the device is not there, or the data are not.
    """
    several = group is not None and group.size > 1
    device = group.device if several and group is not None else resolve_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    elif several and group is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_of_one(group.process.local_size))
    data = load_data(config)
    parts = {name: getattr(data, name).resident(device) for name in ("train", "validation", "test")}
    return replace(data, **parts), device


def write_checkpoint(folder: RunFolder, trainer: Trainer, epochs: list[Epoch]) -> None:
    """Write all that continuing exactly here needs; the last checkpoint is replaced only by a whole and finite one.

    Of several processes rank 0 writes, and all fail where it does.

    Raises: NonFiniteError: a weight is NaN or infinite. CheckpointError: it cannot be written.
    """
    for name, parameter in trainer.model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(f"the weights of '{name}' hold NaN or infinity at step {trainer.step}; lower --lr.")
    history = [_epoch_fields(epoch) for epoch in epochs]
    state = trainer.state_dict()

    def write() -> None:
        if trainer.group.rank == 0:
            save(
                folder.checkpoint,
                trainer.model,
                trainer.optimizer,
                trainer.apo,
                trainer=state,
                epochs=history,
                data=trainer.data.fingerprint,
                config=trainer.config.model_dump(mode="json"),
            )

    trainer.group.ranks.run_collectively(write)


def read_checkpoint(folder: RunFolder, trainer: Trainer) -> list[Epoch]:
    """Take a freshly built trainer to where the checkpoint stands; returns the epochs done.

    Raises: CheckpointError: none is there, or it is damaged or of another run.
    """
    trainer.group.ranks.run_collectively(lambda: _check_there(folder))  # loading talks to the other ranks
    extra = load(folder.checkpoint, trainer.parallel, trainer.optimizer, trainer.apo)
    try:
        if extra["config"] != trainer.config.model_dump(mode="json"):
            raise CheckpointError(f"'{folder.checkpoint}' is of a run with another configuration than its folder says.")
        if extra.get("data", "") != trainer.data.fingerprint:
            raise CheckpointError(
                f"the data of '{trainer.config.data}' have changed since '{folder.checkpoint}' was written: put them "
                "back, or start another run."
            )
        trainer.load_state_dict(extra["trainer"])
        return [Epoch(**values) for values in extra["epochs"]]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"'{folder.checkpoint}' is not a checkpoint of apoptosis train ({error!r}).") from error


def _check_there(folder: RunFolder) -> None:
    if not folder.checkpoint.exists():
        raise CheckpointError(f"'{folder.path}' holds no checkpoint yet: start the run again in another folder.")


def train(
    folder: RunFolder,
    config: RunConfig,
    *,
    resume: bool = False,
    watch: Watcher = SILENT,
    group: Group | None = None,
) -> dict[str, Any]:
    """Train to the end, from the start or from a checkpoint; return the summary that is also written into the folder.

    A checkpoint is written after every epoch, and when the run is interrupted between two steps. The checkpoints of
    several processes do not hold an open window; they are written after the first step without one, so that a resumed
    run has the same bits.

    Args:
        folder: of all processes that train together, `RunFolder(..., writes=rank == 0)`.
        config: the run.
        resume: continue from the folder's checkpoint.
        watch: sees the progress.
        group: the processes that train together, all of which call this; None for one alone.

    Raises: NonFiniteError: the loss is NaN or infinite; the last checkpoint stays. KeyboardInterrupt: interrupted; a
            second interrupt ends the run at once, with the last checkpoint that is there (of several processes the
            third; the second ends the wait for a window). RankError: another process is gone or failed.
        ArgumentError, DataError, CheckpointError: before anything is trained.
    """
    each = Ranks().run_collectively if group is None else group.ranks.run_collectively
    data, device = each(lambda: prepare(config, group))
    several = group is not None and group.size > 1
    with Interrupt(grace=INTERRUPT_GRACE if several else 0.0) as interrupt:
        log = folder.event_logger(config.seed)
        watch.data(data)
        trainer = Trainer(config, data, device, log=log, interrupt=interrupt, group=group)
        epochs = each(lambda: read_checkpoint(folder, trainer)) if resume else []
        reported: dict[str, Any] = {"resumed_at_step": trainer.step} if resume else {}
        if trainer.group.size > 1:
            reported |= {"ranks": trainer.group.size, "launcher": trainer.group.launcher}
        each(lambda: folder.begin(config, device, about=data.about, **reported))
        checkpoints = _Checkpoints(folder, trainer, epochs)
        try:
            while not trainer.finished:
                epoch = trainer.run_epoch(watch)
                epochs.append(epoch)
                folder.add_epoch(trainer, epoch)
                if checkpoints.after_epoch() and not trainer.finished:
                    raise KeyboardInterrupt
        except Stopped:
            checkpoints.write()
            raise
    return _summary(folder, trainer, finish(trainer, epochs))


class _Checkpoints:
    """When a run writes its checkpoints: of several processes not while a window is open, as long as that can wait."""

    def __init__(self, folder: RunFolder, trainer: Trainer, epochs: list[Epoch]) -> None:
        self._folder, self._trainer, self._epochs = folder, trainer, epochs
        self._due: float | None = None  # since when one is put off

    def after_epoch(self) -> bool:
        """Write one, or put it off; return whether the run is to stop here. All processes call this."""
        trainer, now = self._trainer, time.monotonic()
        stop = trainer.stop.now(watching=trainer.watching)
        late = self._due is not None and trainer.group.ranks.any(now - self._due > LONGEST_PUT_OFF)
        if trainer.watching and not (stop or late or trainer.finished):
            self._due = now if self._due is None else self._due
            trainer.put_off = self.write
        else:
            self.write()
        return stop

    def write(self) -> None:
        """Write one now."""
        self._due = self._trainer.put_off = None
        write_checkpoint(self._folder, self._trainer, self._epochs)


def _summary(folder: RunFolder, trainer: Trainer, result: Result) -> dict[str, Any]:
    apo, fields = trainer.apo, dict[str, Any]()
    if apo is not None:
        ledger = apo.ledger()
        fields = {"ledger": ledger.as_dict(), "ledger_text": str(ledger)}
        folder.add("ledger", seed=trainer.config.seed, ledger=ledger.as_dict(), text=str(ledger))
        apo.close()
    return folder.finish("train", result=result, **fields)


def _epoch_fields(epoch: Epoch) -> dict[str, Any]:
    return {name: getattr(epoch, name) for name in Epoch.__slots__} | {"widths": dict(epoch.widths)}
