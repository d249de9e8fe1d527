"""The network of a run that the user's factory makes.

Holds: making it, each time anew, for the data of the run. Elsewhere: importing the factory (own), whether it goes
together with the data (fitting).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from apoptosis.errors import ApoptosisError, ArgumentError
from apoptosis.tools.recipes.datasets import Dataset
from apoptosis.tools.recipes.fitting import placed_on, run_on
from apoptosis.tools.recipes.own import call_factory, network_of, what_went_wrong

_PROBE_BYTES = 2**28  # of held-out inputs on which events are measured, where these are not limited otherwise
_MADE: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def own_network(spec: str, kwargs: str, data: Dataset, device: torch.device) -> nn.Module:
    """Call the user's factory; parameters called `shape` and `num_classes` are told what the data have.

    Args: spec: package.module:factory. kwargs: its arguments, as JSON. data: of the run. device: where to train.

    Raises: ArgumentError: it fails, gives no network or one without parameters, or the same one twice.
    """
    offered: dict[str, Any] = {"shape": data.shape} if data.shape else {}
    if data.num_classes:
        offered |= {"num_classes": data.num_classes}
    network, _ = network_of(spec, call_factory(spec, kwargs, offered))
    if network in _MADE:
        raise ArgumentError(f"'{spec}' gives the same network every time: build a new one whenever it is called.")
    _MADE.add(network)
    network = network.to(device)
    if any(is_lazy(tensor) for tensor in (*network.parameters(), *network.buffers())):
        _materialise(network, data, device, spec)
    if not any(p.requires_grad for p in network.parameters()):
        raise ArgumentError(f"'{spec}' gives a network without a parameter that requires gradients.")
    return network


def _materialise(network: nn.Module, data: Dataset, device: torch.device, spec: str) -> None:
    """Run lazy modules once, which gives them their sizes."""
    try:
        with torch.no_grad():
            run_on(network.eval(), placed_on(data.train.between(0, 2)[0], device))
        network.train()
    except ApoptosisError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ArgumentError(f"'{spec}' fails on two examples of the data: {what_went_wrong(error)}") from error


def probe_limit(example: Any) -> int:
    """Return how many rows like those of `example`, which holds two, are kept in memory for measuring events."""
    size = sum(x.numel() * x.element_size() for x in tree_leaves(example) if isinstance(x, Tensor))
    return max(2, 2 * _PROBE_BYTES // max(1, size))
