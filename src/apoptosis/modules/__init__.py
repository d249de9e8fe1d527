"""Modules that a shrunk model may contain; checkpoints of whole models name them."""
