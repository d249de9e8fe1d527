"""Records of attempts as flat scalars, and where loggers of other libraries take them.

Holds: names and values; nothing of those libraries is imported. Elsewhere: the records (engine.event_builder), the log
file (decide.log).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from apoptosis.errors import ArgumentError

Record = Mapping[str, Any]
Log = Callable[[dict[str, Any]], None]
_PAIRS = ("parameters", "macs")


def scalars(record: Any) -> dict[str, float]:
    """Return what a logger of numbers can take of a record: flat names, finite floats.

    An event has, under "event/": step, parameters_before, parameters_after, macs_before, macs_after (per example),
    bytes_freed, seconds, tolerance, channels_removed, rolled_back (0 or 1), site_error (the largest relative rms that a
    certificate states), what was measured by its own name (output_rms, flips, ...), and width/GROUP after it. Other
    attempts have "attempt/step" and what was measured. A ledger has, under "ledger/", its numbers. Characters of a name
    that loggers refuse become "_".

    Args:
        record: what `log=` is given, an `Event` or a `Ledger`.

    Raises: ArgumentError: it is none of these.

    Example:
        >>> scalars({"kind": "event", "step": 7, "groups": {"fc": [8, 6]}, "parameters": [80, 60]})
        {'event/step': 7.0, 'event/parameters_before': 80.0, 'event/parameters_after': 60.0, \
'event/channels_removed': 2.0, 'event/width/fc': 6.0}
    """
    if isinstance(record, Mapping):
        found, kind = dict(record), record.get("kind")
    elif hasattr(record, "as_dict"):
        found = record.as_dict()
        kind = "ledger" if "site_cost" in found else "event" if "certificates" in found else None
        found |= {"rolled_back": False} if kind == "event" else {}
    else:
        found, kind = {}, None
    if kind not in ("event", "attempt", "ledger"):
        raise ArgumentError(f"{type(record).__name__} is no record: give what log= is given, an Event or a Ledger.")
    flat = {"step": found.get("step")}
    for name in _PAIRS:
        flat |= dict(zip((f"{name}_before", f"{name}_after"), found.get(name) or (), strict=False))
    plain = ("bytes_freed", "seconds", "tolerance", "rolled_back", "considered", "events", "attempts", "accuracy_cost")
    flat |= {name: found.get(name) for name in (*plain, "hook_seconds")}
    errors = [c["value"] for c in found.get("certificates") or () if c["kind"] == "empirical"]
    errors += (found.get("site_cost") or {}).values()
    flat |= {"site_error": max(errors)} if errors else {}
    flat |= found.get("measured") or {}
    groups = {name: pair for name, pair in (found.get("groups") or {}).items() if not isinstance(pair, str)}
    if kind == "event" and groups:
        flat |= {"channels_removed": sum(before - after for before, after in groups.values())}
        flat |= {f"width/{name}": after for name, (_, after) in groups.items()}
    return _named(kind, flat)


def _named(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers under names that every logger takes; two that become one get a number."""
    named: dict[str, float] = {}
    for name, value in values.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            continue
        key = first = f"{kind}/{re.sub(r'[^A-Za-z0-9_./ -]', '_', name)}"
        number = 1
        while key in named:
            number += 1
            key = f"{first}_{number}"
        named[key] = float(value)
    return named


def to_tensorboard(writer: Any) -> Log:
    """Return a `log=` that writes to TensorBoard. writer: a SummaryWriter (anything with `add_scalar`)."""
    _check(writer, "add_scalar", "to_tensorboard", "a SummaryWriter")

    def log(record: dict[str, Any]) -> None:
        for name, value in scalars(record).items():
            writer.add_scalar(name, value, record["step"])

    return log


def to_mlflow(mlflow: Any) -> Log:
    """Return a `log=` that writes to MLflow, or to what has its `log_metrics(values, step=)`, as loggers of Lightning.

    Args:
        mlflow: the module `mlflow`, with a run under way, or a logger.
    """
    _check(mlflow, "log_metrics", "to_mlflow", "the module mlflow")

    def log(record: dict[str, Any]) -> None:
        mlflow.log_metrics(scalars(record), step=record["step"])

    return log


def to_wandb(run: Any) -> Log:
    """Return a `log=` that writes to Weights & Biases.

    No step is given, as W&B drops what comes with an earlier one than its own: `run.define_metric("event/*",
    step_metric="event/step")` draws over optimizer steps.

    Args:
        run: what `wandb.init` returns, or the module (anything with `log(values)`).
    """
    _check(run, "log", "to_wandb", "what wandb.init() returns")

    def log(record: dict[str, Any]) -> None:
        run.log(scalars(record))

    return log


def _check(given: object, method: str, name: str, wanted: str) -> None:
    if not callable(getattr(given, method, None)):
        raise ArgumentError(f"{name}({type(given).__name__}): it has no {method}(); give {wanted}.")
