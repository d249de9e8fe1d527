"""One network of each of timm's modules and every model type of transformers that can be built small: what may shrink.

Holds: which networks (timm_networks.py, transformers_networks.py, shrunk_config.py), the measurement of one
(measure.py), processes with a time limit (workers.py), the page (page.py). Run it with `python -m benchmarks.zoo`.
"""
