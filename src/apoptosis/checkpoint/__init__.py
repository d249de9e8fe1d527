"""Checkpoints of shrunk networks."""

from apoptosis.checkpoint.save_load import load, save
from apoptosis.checkpoint.sharded import load_sharded, save_sharded
from apoptosis.checkpoint.widths import set_widths_, widths_of

__all__ = ["load", "load_sharded", "save", "save_sharded", "set_widths_", "widths_of"]
