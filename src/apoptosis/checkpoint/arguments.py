"""Arguments of save and load, checked before anything else happens, with one clear line each.

Holds: the types of their arguments, and that these belong together. Elsewhere: what a file holds
(checkpoint/save_load.py), the arguments of Apoptosis and shrink_ (apoptosis.model.arguments).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from apoptosis.distributed.sharded import has_shards
from apoptosis.distributed.wrappers import unwrapped
from apoptosis.errors import ArgumentError

Optimizers = Optimizer | Sequence[Optimizer] | None
_ORDER = "The arguments are path, model, optimizer, apo."


def check_given(function: str, path: object, model: object, optimizer: object, apo: object) -> None:
    """Check the types of what `save` and `load` were given, and that optimizer and run are of this model.

    Args: function: its name, for the message.

    Raises: ArgumentError: naming the argument; nothing was read or written.
    """
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(f"{function}: path is a {type(path).__name__}, not the name of a file. {_ORDER}")
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{function}: model is a {type(model).__name__}, not a torch.nn.Module. {_ORDER}")
    given: Any = optimizer if isinstance(optimizer, Sequence) else () if optimizer is None else (optimizer,)
    for entry in given:
        if not isinstance(entry, Optimizer):
            raise ArgumentError(
                f"{function}: optimizer is a {type(entry).__name__}, not a torch.optim.Optimizer. {_ORDER}"
            )
    own = {id(p) for p in model.parameters()}
    held = {id(p) for entry in given for group in entry.param_groups for p in group["params"]}
    if given and not has_shards(model) and not held & own:
        raise ArgumentError(f"{function}: optimizer holds no parameter of the model; it is of another one.")
    if apo is None:
        return
    methods = all(callable(getattr(apo, name, None)) for name in ("state_dict", "load_state_dict"))
    if isinstance(apo, type | nn.Module | Optimizer) or not methods:
        raise ArgumentError(f"{function}: apo is a {type(apo).__name__}, not the Apoptosis of a run. {_ORDER}")
    other = getattr(apo, "model", None)
    if isinstance(other, nn.Module) and unwrapped(other) is not unwrapped(model):
        raise ArgumentError(f"{function}: apo is the run of another {type(other).__name__} than the model given.")


def several(optimizer: Optimizers) -> tuple[Optimizer, ...]:
    """Return the optimizers that were given, none for None."""
    return (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer or ())
