"""The log of a run: `EventLog` writes what `Apoptosis(log=...)` gives as JSON lines."""

from apoptosis.decide.log import EventLog, read_events

__all__ = ["EventLog", "read_events"]
