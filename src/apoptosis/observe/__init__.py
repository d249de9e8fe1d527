"""Observation windows: moments at consumer sites, collected from the user's forward passes."""

from apoptosis.observe.accumulators import (
    MIN_EXAMPLES,
    ROWS_PER_CHANNEL,
    Observation,
    in_both,
    needs_float64,
    needs_whole_inputs,
)
from apoptosis.observe.hooks import CHANGED_BY_OTHERS, NOTHING_SEEN
from apoptosis.observe.unfinished import UNFINISHED
from apoptosis.observe.window import Observer

__all__ = [
    "CHANGED_BY_OTHERS",
    "MIN_EXAMPLES",
    "NOTHING_SEEN",
    "ROWS_PER_CHANNEL",
    "UNFINISHED",
    "Observation",
    "Observer",
    "in_both",
    "needs_float64",
    "needs_whole_inputs",
]
