"""How results are shown: text, HTML for notebooks, plots, a progress line; numbers for loggers."""
