"""Observation windows: moments at consumer sites, collected from the user's forward passes."""

from apoptosis.observe.accumulators import (
    MIN_EXAMPLES,
    MIN_ROWS,
    ROWS_PER_CHANNEL,
    WHOLE_COLUMNS,
    Observation,
    in_both,
    needs_float64,
    needs_whole_inputs,
    rows_per_channel,
)
from apoptosis.observe.hooks import CHANGED_BY_OTHERS, NOTHING_SEEN
from apoptosis.observe.spread import Look, growth
from apoptosis.observe.unfinished import UNFINISHED
from apoptosis.observe.window import Observer

__all__ = [
    "CHANGED_BY_OTHERS",
    "MIN_EXAMPLES",
    "MIN_ROWS",
    "NOTHING_SEEN",
    "ROWS_PER_CHANNEL",
    "UNFINISHED",
    "WHOLE_COLUMNS",
    "Look",
    "Observation",
    "Observer",
    "growth",
    "in_both",
    "needs_float64",
    "needs_whole_inputs",
    "rows_per_channel",
]
