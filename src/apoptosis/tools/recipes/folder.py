"""The folder of a run: what lies where, and the guard against writing over another run.

Holds: names, the configuration, the log, the summary, TensorBoard scalars. Elsewhere: training.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch

from apoptosis.decide.log import EventLog, to_json
from apoptosis.errors import ArgumentError, DataError
from apoptosis.storage.files import replacing
from apoptosis.tools.recipes.config import RunConfig
from apoptosis.tools.recipes.loop import Epoch, LogRecord, Trainer
from apoptosis.tools.recipes.machine import machine, versions

SCHEMA = 1  # of summaries
CONFIG, LOG, SUMMARY, CHECKPOINT = "config.json", "events.jsonl", "summary.json", "last.safetensors"
DATA = "data.json"  # of data of the user's own: classes, columns, statistics


class RunFolder:
    """An open run folder; use it as a context.

    Args:
        path: created when absent. resume: the folder must hold a run already; otherwise it must hold none, but for one
            that ended before its first checkpoint.
        writes: False for a process that only reads checkpoints there: rank 0 of its run writes all the rest.

    Raises: ArgumentError: a run lies there already, or another process writes it now. DataError: none does, to resume.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, *, resume: bool = False, writes: bool = True) -> None:
        self.path, self._writes = path, writes
        self._scalars: dict[str, Any] = {}
        if not writes:
            return
        if resume and not (path / CONFIG).is_file():
            raise DataError(f"'{path}' is not the folder of a run: it holds no {CONFIG}.")
        if not resume:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(f"run folder '{path}' cannot be made: {error.strerror}.") from error
            if (path / CONFIG).exists() and has_results(path):
                raise ArgumentError(f"'{path}' holds a run already: resume it with --resume, or name another folder.")
        self._begun = resume or (path / CONFIG).exists()
        self._log = EventLog(path / LOG)
        self._lock = _locked(path / LOG)

    @property
    def checkpoint(self) -> Path:
        """Where the last checkpoint lies."""
        return self.path / CHECKPOINT

    def begin(
        self, config: RunConfig, device: torch.device, *, about: Mapping[str, Any] = MappingProxyType({}), **more: Any
    ) -> None:
        """Write configuration, versions and machine; from here on the folder is that of a run.

        about: what a later use of the network has to know of the data; written as a file of its own.
        """
        self._head = {"config": config.model_dump(mode="json"), "versions": versions(), "machine": machine(device)}
        if self._writes:
            self._begun = True
            config.write(self.path / CONFIG)
            if about:
                write_json(self.path / DATA, about)
            self._log.append("run", **self._head, **more)

    def event_logger(self, seed: int, kept: list[Mapping[str, Any]] | None = None) -> LogRecord:
        """Return what apoptosis' records are to be given to; `kept` collects the events among them as well."""

        def log(record: Mapping[str, Any]) -> None:
            fields = {key: value for key, value in record.items() if key not in ("kind", "time")}
            self.add(str(record.get("kind", "event")), method="apoptosis", seed=seed, **fields)
            if kept is not None and record.get("kind", "event") == "event":
                kept.append(fields)

        return log

    def add_epoch(self, trainer: Trainer, epoch: Epoch) -> None:
        """Log one epoch of a run, for TensorBoard, too, if its configuration says so."""
        fields = asdict(epoch)
        method, seed = trainer.method, trainer.config.seed
        self.add("epoch", method=method, seed=seed, metric_name=trainer.data.metric, **fields)
        if trainer.config.tensorboard and self._writes:
            self._add_scalars(f"{method}-seed{seed}", epoch)

    def add(self, kind: str, **fields: Any) -> None:
        """Log a record of another kind."""
        if self._writes:
            self._log.append(kind, **fields)

    def _add_scalars(self, name: str, epoch: Epoch) -> None:
        """Write one epoch's scalars for TensorBoard, below tensorboard/."""
        if name not in self._scalars:
            from torch.utils.tensorboard import SummaryWriter

            self._scalars[name] = SummaryWriter(str(self.path / "tensorboard" / name))
        values = {key: getattr(epoch, key) for key in ("loss", "metric", "seconds", "parameters", "macs")}
        values |= {f"width/{group}": width for group, width in epoch.widths.items()}
        for tag, value in values.items():
            if value is not None:
                self._scalars[name].add_scalar(tag, value, epoch.step)

    def finish(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Log the summary and write it as JSON; return it."""
        summary = {"schema": SCHEMA, **self._head, **fields}
        self.add("summary", **summary)
        summary = {"kind": kind, **summary}
        if self._writes:
            write_json(self.path / SUMMARY, summary)
        return summary

    def close(self) -> None:
        """Close what is open; closing twice does nothing. A folder whose run never began is removed if it is empty."""
        if not self._writes:
            return
        self._log.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if not self._begun:
            self._begun = True
            (self.path / LOG).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()
        for writer in self._scalars.values():
            writer.close()
        self._scalars = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values as JSON; the file appears whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(to_json(dict(values)), indent=2, ensure_ascii=False) + "\n")


def has_results(path: Path) -> bool:
    """Whether a run folder holds more than a beginning: a checkpoint, networks or a summary."""
    return (path / SUMMARY).exists() or any(path.glob("*.safetensors"))


def _locked(log: Path) -> int | None:
    """Keep other processes from writing the same run; the lock ends with the process, however that ends.

    Returns: a descriptor to close; None where the file system has no locks.

    Raises: ArgumentError: another process has it.
    """
    try:
        import fcntl
    except ImportError:  # of another kind of system
        return None
    descriptor = os.open(log, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ArgumentError(f"'{log.parent}' is being written by another process: name another folder.") from error
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
