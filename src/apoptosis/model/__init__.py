"""The user's model: its arguments, its own forward passes, its outputs."""
