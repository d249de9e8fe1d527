"""Redundant neurons are removed while a PyTorch network trains.

Holds: the public face, imported when it is asked for, so that the command can say in a line of its own why torch
could not be loaded. Source of the idea: Siegel, Daily, Vishnu, "Adaptive Neuron Apoptosis for Accelerating Deep
Learning on Large Scale Systems", IEEE Big Data 2016 (arXiv 1610.00790).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apoptosis.checkpoint import load, load_sharded, save, save_sharded, set_widths_, widths_of
    from apoptosis.criteria import register_criterion
    from apoptosis.decide.ledger import Event, Ledger
    from apoptosis.distributed.protocol import register_wrapper
    from apoptosis.engine import Apoptosis
    from apoptosis.graph.rules.table import register_rule
    from apoptosis.graph.trace.activations import register_activation
    from apoptosis.model.passes import is_internal_forward, is_own_pass
    from apoptosis.oneshot import shrink_
    from apoptosis.planner import Plan
    from apoptosis.shipping import ship
    from apoptosis.surgery.attributes import register_attributes
    from apoptosis.surgery.optimizers import register_optimizer

__all__ = [
    "Apoptosis",
    "Event",
    "Ledger",
    "Plan",
    "is_internal_forward",
    "is_own_pass",
    "load",
    "load_sharded",
    "register_activation",
    "register_attributes",
    "register_criterion",
    "register_optimizer",
    "register_rule",
    "register_wrapper",
    "save",
    "save_sharded",
    "set_widths_",
    "ship",
    "shrink_",
    "widths_of",
]
__version__ = "0.1.0"
_HOMES = {
    "Apoptosis": "engine",
    "Event": "decide.ledger",
    "Ledger": "decide.ledger",
    "Plan": "planner",
    "is_internal_forward": "model.passes",
    "is_own_pass": "model.passes",
    "register_activation": "graph.trace.activations",
    "register_attributes": "surgery.attributes",
    "register_criterion": "criteria",
    "register_optimizer": "surgery.optimizers",
    "register_rule": "graph.rules.table",
    "register_wrapper": "distributed.protocol",
    "ship": "shipping",
    "shrink_": "oneshot",
}
_MODULES = frozenset(("errors", "events", "distributed", "launch", "graph", "surgery", "criteria", "records"))


def __getattr__(name: str) -> Any:
    if name in __all__:
        found = getattr(import_module(f"apoptosis.{_HOMES.get(name, 'checkpoint')}"), name)
    elif name in _MODULES:
        found = import_module(f"apoptosis.{name}")
    else:
        raise AttributeError(f"module 'apoptosis' has no attribute '{name}'")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
