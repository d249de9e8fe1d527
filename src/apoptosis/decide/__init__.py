"""When to prune, how much, whether a step is kept, and the record of it."""
