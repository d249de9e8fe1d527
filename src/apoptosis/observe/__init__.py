"""Observation windows: the user's own forward passes become moments at consumer sites."""

from apoptosis.observe.watch import MIN_EXAMPLES, ROWS_PER_CHANNEL, Observation, reads_several_positions
from apoptosis.observe.window import NOTHING_SEEN, Observer

__all__ = ["MIN_EXAMPLES", "NOTHING_SEEN", "ROWS_PER_CHANNEL", "Observation", "Observer", "reads_several_positions"]
