"""Wrappers that removal does not reach through: refused by name, before anything has changed.

Holds: the table of them, and gradients of single examples, which come by hooks. To support one, give it a file of its
own that implements the protocol (protocol.py), and take its row out of this table.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from apoptosis.distributed.protocol import Wrapper, is_named, register_wrapper
from apoptosis.errors import ArgumentError

_BEHIND = "Give the module that it was made from."
_SHARD = "Shard with torch.distributed.fsdp.fully_shard, or train it with DistributedDataParallel."
_PER_EXAMPLE = (
    "gradients are taken example by example (Opacus, BackPACK), by hooks in backward that keep activations of the old "
    "widths"
)
_LATER = "Train without apoptosis, take the hooks off, and shrink_() the trained network."
# class name -> (where it is defined, what it does, what to do)
_REFUSED: dict[str, tuple[str, str, str]] = {
    "FullyShardedDataParallel": (
        "torch.distributed",
        "each process holds a shard of every unit's parameters as one flat tensor, which no channel can be cut out of",
        _SHARD,
    ),
    "DataParallel": (
        "torch.nn",
        "it copies the module to every device at each pass, and a window sees only copies",
        "Give its .module and train that on one device.",
    ),
    "AbstractGradSampleModule": ("opacus", _PER_EXAMPLE, f"{_LATER} (to_standard_module() gives it back.)"),
    "DeepSpeedEngine": (
        "deepspeed",
        "it keeps parameters and gradients in flat buffers, which no channel can be cut out of",
        _SHARD,
    ),
    "ScriptModule": ("torch.jit", "its shapes and its code are fixed (TorchScript)", _BEHIND),
    "_StatefulGraphModule": ("torch.export", "its shapes are written into an exported graph", _BEHIND),
    "UnflattenedModule": ("torch.export", "its shapes are written into an exported graph", _BEHIND),
}


class _Refused(Wrapper):
    """One class of the table."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._package, self._why, self._remedy = _REFUSED[name]

    def matches(self, candidate: object) -> bool:
        return is_named(candidate, self.name, self._package)

    def check(self, wrapped: Any, name: str) -> None:
        shown = type(wrapped).__name__ if self.name.startswith("Abstract") else self.name
        raise ArgumentError(f"{_called(name)} is a {shown}: {self._why}. {self._remedy}")


class _PerExample(Wrapper):
    """Hooks that compute gradients of single examples; they need no wrapper around the model."""

    name = "gradients of single examples"

    def matches(self, candidate: object) -> bool:
        if not isinstance(candidate, nn.Module):
            return False
        hooks = (*candidate._forward_hooks.values(), *candidate._backward_hooks.values())
        return (
            any(str(getattr(hook, "__module__", "")).startswith(("opacus.", "backpack.")) for hook in hooks)
            or any(p is not None and hasattr(p, "grad_sample") for p in candidate._parameters.values())
            or "autograd_grad_sample_hooks" in vars(candidate)
        )

    def check(self, wrapped: Any, name: str) -> None:
        raise ArgumentError(f"{_called(name)}: {_PER_EXAMPLE}. {_LATER}")


def _called(name: str) -> str:
    return f"module '{name}'" if name else "the model"


register_wrapper(_PerExample())
for _name in _REFUSED:
    register_wrapper(_Refused(_name))
