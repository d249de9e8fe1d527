"""Redundant neurons are removed while a PyTorch network trains.

Lives here: the public face. Source of the idea: Siegel, Daily, Vishnu, "Adaptive Neuron Apoptosis for Accelerating Deep
Learning on Large Scale Systems", IEEE Big Data 2016 (arXiv 1610.00790).
"""

from apoptosis.criteria import register_criterion
from apoptosis.engine import Apoptosis
from apoptosis.graph.neurons import register_activation
from apoptosis.graph.rules import register_rule
from apoptosis.ledger import Event, Ledger
from apoptosis.oneshot import shrink_
from apoptosis.passes import is_own_pass
from apoptosis.planner import Plan
from apoptosis.surgery import load, load_sharded, save, save_sharded
from apoptosis.surgery.attributes import register_attributes

__all__ = [
    "Apoptosis",
    "Event",
    "Ledger",
    "Plan",
    "is_own_pass",
    "load",
    "load_sharded",
    "register_activation",
    "register_attributes",
    "register_criterion",
    "register_rule",
    "save",
    "save_sharded",
    "shrink_",
]
__version__ = "0.1.0"
