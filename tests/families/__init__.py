"""Small random models of real families, and the one oracle that all of them are put to."""
