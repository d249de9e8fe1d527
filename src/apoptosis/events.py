"""The log of a run: what `Apoptosis(log=...)` gives, as JSON lines (`EventLog`) or as scalars for other loggers."""

from apoptosis.decide.log import EventLog, read_events
from apoptosis.display.loggers import scalars, to_mlflow, to_tensorboard, to_wandb

__all__ = ["EventLog", "read_events", "scalars", "to_mlflow", "to_tensorboard", "to_wandb"]
