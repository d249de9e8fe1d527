"""What a run amounts to: the numbers of one run, of a pair of runs, and of all seeds together.

Holds: these records and their arithmetic. Elsewhere: any measuring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from apoptosis.tools.recipes.loop import Epoch, Trainer

Record = dict[str, Any]
METHODS = ("dense", "apoptosis")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One run at its end.

    seconds_training: wall time of training, apoptosis included; seconds_run: evaluations included as well.
    step_seconds: seconds_training over steps; last_step_seconds: the same over the last epoch alone.
    test_metric, validation_metric: accuracy or AUC in 0..1; validation_metric is None where nothing is held out.
    macs: multiply-adds per example. apoptosis_seconds, hook_seconds: None without apoptosis.
    """

    method: str
    seed: int
    steps: int
    seconds_training: float
    seconds_run: float
    step_seconds: float
    last_step_seconds: float
    metric_name: str
    test_metric: float
    validation_metric: float | None
    loss: float
    parameters: int
    macs: int
    widths: Mapping[str, int]
    apoptosis_seconds: float | None = None
    hook_seconds: float | None = None
    epochs: Sequence[Epoch] = field(default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Both runs of one seed. ledger: what the removals cost at most, as plain values and as text."""

    seed: int
    dense: Result
    apoptosis: Result
    ledger: Mapping[str, Any]
    ledger_text: str
    calibration: float
    events: Sequence[Mapping[str, Any]]

    def as_dict(self) -> Record:
        """Return plain values, with what follows from the two results."""
        dense, slim = self.dense, self.apoptosis
        return {
            "seed": self.seed,
            "speedup_run": dense.seconds_run / slim.seconds_run,
            "speedup_training": dense.seconds_training / slim.seconds_training,
            "test_metric_difference": slim.test_metric - dense.test_metric,
            "parameters_ratio": dense.parameters / slim.parameters,
            "macs_ratio": dense.macs / slim.macs,
            "apoptosis_share": (slim.apoptosis_seconds or 0.0) / slim.seconds_run,
            "seconds_to_dense_metric": seconds_to_metric(slim.epochs, dense.validation_metric),
            "dense": asdict(dense),
            "apoptosis": asdict(slim),
            "ledger": dict(self.ledger),
            "ledger_text": self.ledger_text,
            "events": [dict(event) for event in self.events],
        }


def finish(trainer: Trainer, epochs: Sequence[Epoch]) -> Result:
    """Read the test split, once, and put the run's numbers together."""
    test_metric = trainer.evaluate_on("test")
    apo = trainer.apo
    return Result(
        method=trainer.method,
        seed=trainer.config.seed,
        steps=trainer.step,
        seconds_training=trainer.seconds,
        seconds_run=trainer.seconds + trainer.evaluation_seconds,
        step_seconds=trainer.seconds / trainer.step,
        last_step_seconds=trainer.last_epoch_seconds / trainer.steps_per_epoch,
        metric_name=trainer.data.metric,
        test_metric=test_metric,
        validation_metric=epochs[-1].metric if epochs else None,
        loss=epochs[-1].loss if epochs else float("nan"),
        parameters=trainer.parameters(),
        macs=trainer.macs(),
        widths=trainer.widths(),
        apoptosis_seconds=None if apo is None else apo.seconds,
        hook_seconds=None if apo is None else apo.hook_seconds,
        epochs=tuple(epochs),
    )


def seconds_to_metric(epochs: Sequence[Epoch], target: float | None) -> float | None:
    """Training seconds until the first epoch whose validation metric reaches `target`; None where none does.

    Example:
        >>> first = Epoch(epoch=1, step=9, seconds=2.0, loss=1.0, metric=0.5, parameters=1, macs=1, widths={})
        >>> seconds_to_metric([first], 0.4), seconds_to_metric([first], 0.6)
        (2.0, None)
    """
    if target is None:
        return None
    return next((e.seconds for e in epochs if e.metric is not None and e.metric >= target), None)


def overall(pairs: Sequence[Pair]) -> Record:
    """All seeds together: speed-ups as ratios of summed seconds, everything else as means over the seeds."""
    records = [pair.as_dict() for pair in pairs]

    def mean(key: str, method: str | None = None) -> float:
        values = [record[key] if method is None else record[method][key] for record in records]
        return float(sum(values) / len(values))

    def ratio(key: str) -> float:
        return mean(key, "dense") / mean(key, "apoptosis")

    reached = [record["seconds_to_dense_metric"] for record in records]
    known = [seconds for seconds in reached if seconds is not None]
    means = ("test_metric", "step_seconds", "parameters", "macs")
    return {
        "num_seeds": len(records),
        "speedup_run": ratio("seconds_run"),
        "speedup_training": ratio("seconds_training"),
        "parameters_ratio": ratio("parameters"),
        "macs_ratio": ratio("macs"),
        "test_metric_difference": mean("test_metric_difference"),
        **{f"{key}_{method}": mean(key, method) for key in means for method in METHODS},
        "apoptosis_share": mean("apoptosis_seconds", "apoptosis") / mean("seconds_run", "apoptosis"),
        "num_seeds_reaching_dense_metric": len(known),
        "seconds_to_dense_metric": sum(known) / len(known) if len(known) == len(reached) else None,
    }
