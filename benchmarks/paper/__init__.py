"""The comparison: apoptosis side by side with what a user would pick instead: `python -m benchmarks.paper --help`."""
