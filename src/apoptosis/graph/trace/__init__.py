"""One forward pass followed operator by operator: which channels every tensor carries."""
