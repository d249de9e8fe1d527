"""What the example input does not reach: modules that never run, parameters that nothing reads.

Holds: leaving them alone, by pins, and saying so. Elsewhere: the captures that show what is reached.

How a module that never runs would read the channels of others is not known. What can be seen is pinned: its own
parameters, those that it shares with modules that do run, and what an unread parameter lies along.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from torch import nn

from apoptosis.graph.explain import Code, Reason
from apoptosis.graph.groups.classes import classify
from apoptosis.graph.trace.findings import TraceResult
from apoptosis.graph.trace.ids import TensorInfo

_LISTS = (nn.ParameterList, nn.ParameterDict)  # which no pass could run


def pin_unreached(findings: TraceResult, model: nn.Module, aliases: Mapping[str, str]) -> tuple[str, ...]:
    """Pin what the captures did not reach; return a note for every module and parameter of that kind.

    Args:
        findings: of both captures.
        model: the captured model.
        aliases: further names of tied parameters -> first name.
    """
    modules = dict(model.named_modules())
    own = {name: dict(_own(findings, name, module, aliases)) for name, module in modules.items()}
    unread = {n: o for n, o in findings.slots.owners.items() if not o.is_buffer and not findings.reads.get(n)}
    idle = _idle(findings, own, unread)
    notes = [_module_note(name, count) for name, count in idle.items()]
    for name, owner in unread.items():
        above = next((module for module in _lineage(name) if module in idle), None)
        reason = Code.UNREAD(name=name) if above is None else Code.NOT_RUN(module=above)
        if above is None:
            notes.append(reason.text)
        _pin(findings, owner, reason)
    lists = {name for name, module in modules.items() if isinstance(module, _LISTS)}
    _pin_shared(findings, {name: held for name, held in own.items() if name not in lists})
    _pin_beside(findings, own, unread)
    starved = _starved(findings, own)
    for name, count in starved.items():
        notes.append(_starved_note(name, count))
        for owner in _inside(own, name):
            _pin(findings, owner, Code.NO_ROWS(module=name))
    _pin_siblings(findings, modules, own, idle)
    return tuple(notes)


def _starved(findings: TraceResult, own: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, int]:
    """Find the outermost modules that ran on empty tensors alone; the number of their parameters by name."""
    empty = [name for name in own if name in findings.ran - findings.fed]
    outer = [name for name in empty if not set(_lineage(name)[:-1]).intersection(empty)]
    counts = {name: sum(1 for _ in _inside(own, name)) for name in outer}
    return {name: count for name, count in counts.items() if count}


def _starved_note(name: str, count: int) -> str:
    held = f"its {count} parameters stay" if count > 1 else "its parameter stays"
    return (
        f"module '{name}' runs on zero rows of example_input: {held} as they are; give a larger example_input (of "
        "which a router sends some to every expert)"
    )


def _inside(own: Mapping[str, Mapping[str, TensorInfo]], name: str) -> Iterator[TensorInfo]:
    """Yield the parameters of a module and of those inside it."""
    return (owner for module, held in own.items() if name in _lineage(module) for owner in held.values())


def _pin_siblings(
    findings: TraceResult,
    modules: Mapping[str, nn.Module],
    own: Mapping[str, Mapping[str, TensorInfo]],
    idle: Iterable[str],
) -> None:
    """Pin the channels from outside that a twin of an idle module reads or makes (an expert that no row came to).

    A twin is of the same type, in the same list, with parameters of the same shapes: another input may run the idle one
    in its place, on the same channels.
    """
    found: dict[str, str] = {}
    for name in idle:
        home = name.rpartition(".")[0]
        shapes = [owner.shape for owner in _inside(own, name)]
        for twin in modules if isinstance(modules[home], nn.ModuleList | nn.ModuleDict) else ():
            like = twin.rpartition(".")[0] == home and type(modules[twin]) is type(modules[name])
            if like and twin in findings.ran and [owner.shape for owner in _inside(own, twin)] == shapes:
                found.setdefault(twin, name)
    labels = classify(findings).labels if found else np.zeros(0, dtype=np.int64)
    for twin, name in found.items():
        slots = np.concatenate([owner.slots() for owner in _inside(own, twin)])
        outside = np.ones(labels.size, dtype=bool)
        outside[slots] = False
        shared = slots[np.isin(labels[slots], labels[outside])]
        findings.pin(shared, Code.TWIN_NOT_RUN(module=name, twin=twin))


def _own(
    findings: TraceResult, name: str, module: nn.Module, aliases: Mapping[str, str]
) -> Iterator[tuple[str, TensorInfo]]:
    """Yield (leaf, parameter) of a module without those inside it."""
    for leaf, parameter in module._parameters.items():
        if parameter is not None:
            full = f"{name}.{leaf}" if name else leaf
            yield leaf, findings.slots.owners[aliases.get(full, full)]


def _idle(
    findings: TraceResult, own: Mapping[str, Mapping[str, TensorInfo]], unread: Mapping[str, TensorInfo]
) -> dict[str, int]:
    """Find the outermost modules of which no part runs and nothing is read; the number of their parameters by name."""
    busy = set(findings.ran)
    busy |= {name for name, held in own.items() if any(owner.name not in unread for owner in held.values())}
    busy = {above for name in busy for above in _lineage(name)}
    inside = Counter(above for name, held in own.items() for above in _lineage(name) for _ in held)
    idle = [name for name in own if name not in busy and inside[name]]
    return {name: inside[name] for name in idle if not set(_lineage(name)[:-1]).intersection(idle)}


def _lineage(name: str) -> list[str]:
    """Return the modules that a module lies in, the root first, and itself.

    Example:
        >>> _lineage("body.0.fc")
        ['', 'body', 'body.0', 'body.0.fc']
    """
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def _module_note(name: str, count: int) -> str:
    held = f"its {count} parameters stay" if count > 1 else "its parameter stays"
    return (
        f"module '{name}' is not run by the forward pass on example_input: {held} as they are; if another input runs "
        "it on channels that have become fewer, it will fail (a larger example_input may run it)"
    )


def _pin(findings: TraceResult, owner: TensorInfo, reason: Reason) -> None:
    findings.pin(owner.slots(), reason)
    if len(owner.shape) > 1 and not any((owner.name, d) in findings.producers for d in range(len(owner.shape))):
        findings.owners.setdefault((owner.name, 0), owner.name)


def _pin_shared(findings: TraceResult, own: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """Pin parameters that modules which run share with one that does not."""
    homes: dict[str, list[str]] = {}
    for name, held in own.items():
        for owner in held.values():
            homes.setdefault(owner.name, []).append(name)
    for tensor, names in homes.items():
        idle = [name for name in names if name not in findings.ran]
        if idle and len(idle) < len(names):
            why = Code.NOT_RUN_TOO(name=tensor, module=idle[0])
            findings.pin(findings.slots.owners[tensor].slots(), why)


def _pin_beside(
    findings: TraceResult, own: Mapping[str, Mapping[str, TensorInfo]], unread: Mapping[str, TensorInfo]
) -> None:
    """Pin what an unread parameter of a module lies along: both have to keep one length."""
    for held in own.values():
        for lost in held.values():
            for owner in held.values():
                if lost.name in unread and owner.name not in unread and owner.shape[:1] == lost.shape[:1] != ():
                    findings.pin(owner.axis(0), Code.BESIDE_UNREAD(name=lost.name))
