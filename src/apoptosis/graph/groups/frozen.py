"""Parameters that require no gradient while others do: they keep their shape.

Holds: pins for their channels, and which pins go with them. Elsewhere: other pins (rules, groups/unused.py, copies.py).

A network of which nothing requires a gradient is simply a trained one, and nothing of it is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from apoptosis.graph.explain import Code
from apoptosis.graph.trace.result import TraceResult
from apoptosis.records import Pin

_TUNERS = frozenset(("BaseTunerLayer", "AuxiliaryTrainingWrapper", "ModulesToSaveWrapper"))  # of peft


def frozen_names(model: nn.Module) -> frozenset[str]:
    """Return the parameters that require no gradient in a model of which others do.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> _ = net[0].requires_grad_(False)
        >>> sorted(frozen_names(net)), frozen_names(net.requires_grad_(False))
        (['0.bias', '0.weight'], frozenset())
    """
    named = [(name, p) for name, p in model.named_parameters() if p.is_floating_point() or p.is_complex()]
    found = frozenset(name for name, p in named if not p.requires_grad)
    return frozenset() if len(found) == len(named) else found


def is_of_frozen(pin: Pin) -> bool:
    """Whether a pin holds only while parameters are frozen: its own reason, or that of the pin that it follows from."""
    return Code.FROZEN.code in (pin.code, pin.cause)


def keep_frozen(trace: TraceResult, model: nn.Module, frozen: frozenset[str]) -> None:
    """Pin the channels that frozen weights make or read, and all parameters of adapters.

    Frozen parameters that are only applied to channels (the gain of a norm) are cut with the weights around them.
    """
    tensors = trace.channel_ids.tensors
    axes = {*trace.producers, *((c.weight, c.dim) for c in trace.consumers.values())}
    for name, dim in sorted(axes):
        if name in frozen:
            trace.pin(tensors[name].axis(dim), Code.FROZEN(name=name))
    for name in _of_adapters(model):
        if name in tensors:
            trace.pin(tensors[name].ids(), Code.ADAPTER(name=name))


def _of_adapters(model: nn.Module) -> Iterator[str]:
    for prefix, module in model.named_modules():
        if any(cls.__name__ in _TUNERS and cls.__module__.startswith("peft.") for cls in type(module).__mro__):
            yield from (f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters())
