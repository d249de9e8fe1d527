"""Modules that the example input does not run, and parameters that nothing reads: they are pinned, with a note.

How a module that does not run would read the channels of others is not known. What can be found is pinned: its own
parameters, those that it shares with modules that run, and parameters that lie beside an unread one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from torch import nn

from apoptosis.graph.explain import Code, Reason
from apoptosis.graph.groups.classes import classify
from apoptosis.graph.trace.ids import TensorInfo
from apoptosis.graph.trace.result import TraceResult

_LISTS = (nn.ParameterList, nn.ParameterDict)  # which no pass could run


def pin_unreached(trace: TraceResult, model: nn.Module, aliases: Mapping[str, str]) -> tuple[str, ...]:
    """Pin what the captures did not reach; return a note for each such module and parameter.

    Args:
        trace: of both captures.
        model: the captured model.
        aliases: further names of tied parameters -> first name.
    """
    modules = dict(model.named_modules())
    own = {name: dict(_own(trace, name, module, aliases)) for name, module in modules.items()}
    unread = {n: o for n, o in trace.channel_ids.tensors.items() if not o.is_buffer and not trace.reads.get(n)}
    idle = _idle(trace, own, unread)
    notes = [_module_note(name, count) for name, count in idle.items()]
    for name, info in unread.items():
        above = next((module for module in _lineage(name) if module in idle), None)
        reason = Code.UNREAD(name=name) if above is None else Code.NOT_RUN(module=above)
        if above is None:
            notes.append(reason.text)
        _pin(trace, info, reason)
    lists = {name for name, module in modules.items() if isinstance(module, _LISTS)}
    _pin_shared(trace, {name: held for name, held in own.items() if name not in lists})
    _pin_beside(trace, own, unread)
    without_rows = _without_rows(trace, own)
    for name, count in without_rows.items():
        notes.append(_no_rows_note(name, count))
        for info in _inside(own, name):
            _pin(trace, info, Code.NO_ROWS(module=name))
    _pin_siblings(trace, modules, own, idle)
    return tuple(notes)


def _without_rows(trace: TraceResult, own: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, int]:
    """Find the outermost modules that ran on empty tensors alone; the number of their parameters by name."""
    empty = [name for name in own if name in trace.ran - trace.fed]
    outer = [name for name in empty if not set(_lineage(name)[:-1]).intersection(empty)]
    counts = {name: sum(1 for _ in _inside(own, name)) for name in outer}
    return {name: count for name, count in counts.items() if count}


def _no_rows_note(name: str, count: int) -> str:
    held = f"its {count} parameters stay" if count > 1 else "its parameter stays"
    return (
        f"module '{name}' runs on zero rows of example_input: {held} as they are; give a larger example_input (of "
        "which a router sends some to every expert)"
    )


def _inside(own: Mapping[str, Mapping[str, TensorInfo]], name: str) -> Iterator[TensorInfo]:
    """Yield the parameters of a module and of those inside it."""
    return (info for module, held in own.items() if name in _lineage(module) for info in held.values())


def _pin_siblings(
    trace: TraceResult,
    modules: Mapping[str, nn.Module],
    own: Mapping[str, Mapping[str, TensorInfo]],
    idle: Iterable[str],
) -> None:
    """Pin the channels that a sibling of an idle module shares with other modules (an expert that got no row).

    A sibling has the same type and parameters of the same shapes, in the same list: another input may run the idle one
    in its place, on the same channels.
    """
    found: dict[str, str] = {}
    for name in idle:
        home = name.rpartition(".")[0]
        shapes = [info.shape for info in _inside(own, name)]
        for sibling in modules if isinstance(modules[home], nn.ModuleList | nn.ModuleDict) else ():
            like = sibling.rpartition(".")[0] == home and type(modules[sibling]) is type(modules[name])
            if like and sibling in trace.ran and [info.shape for info in _inside(own, sibling)] == shapes:
                found.setdefault(sibling, name)
    labels = classify(trace).labels if found else np.zeros(0, dtype=np.int64)
    for sibling, name in found.items():
        ids = np.concatenate([info.ids() for info in _inside(own, sibling)])
        outside = np.ones(labels.size, dtype=bool)
        outside[ids] = False
        shared = ids[np.isin(labels[ids], labels[outside])]
        trace.pin(shared, Code.SIBLING_NOT_RUN(module=name, sibling=sibling))


def _own(
    trace: TraceResult, name: str, module: nn.Module, aliases: Mapping[str, str]
) -> Iterator[tuple[str, TensorInfo]]:
    """Yield (leaf, parameter) of a module without those inside it."""
    for leaf, parameter in module._parameters.items():
        if parameter is not None:
            full = f"{name}.{leaf}" if name else leaf
            yield leaf, trace.channel_ids.tensors[aliases.get(full, full)]


def _idle(
    trace: TraceResult, own: Mapping[str, Mapping[str, TensorInfo]], unread: Mapping[str, TensorInfo]
) -> dict[str, int]:
    """Return the outermost modules of which no part runs and nothing is read, with the number of their parameters."""
    busy = set(trace.ran)
    busy |= {name for name, held in own.items() if any(info.name not in unread for info in held.values())}
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


def _pin(trace: TraceResult, info: TensorInfo, reason: Reason) -> None:
    trace.pin(info.ids(), reason)
    if len(info.shape) > 1 and not any((info.name, d) in trace.producers for d in range(len(info.shape))):
        trace.listed.setdefault((info.name, 0), info.name)


def _pin_shared(trace: TraceResult, own: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """Pin parameters that modules which run share with one that does not."""
    homes: dict[str, list[str]] = {}
    for name, held in own.items():
        for info in held.values():
            homes.setdefault(info.name, []).append(name)
    for tensor, names in homes.items():
        idle = [name for name in names if name not in trace.ran]
        if idle and len(idle) < len(names):
            why = Code.NOT_RUN_TOO(name=tensor, module=idle[0])
            trace.pin(trace.channel_ids.tensors[tensor].ids(), why)


def _pin_beside(
    trace: TraceResult, own: Mapping[str, Mapping[str, TensorInfo]], unread: Mapping[str, TensorInfo]
) -> None:
    """Pin parameters that have the length of an unread one in the same module: both must keep it."""
    for held in own.values():
        for lost in held.values():
            for info in held.values():
                if lost.name in unread and info.name not in unread and info.shape[:1] == lost.shape[:1] != ():
                    trace.pin(info.axis(0), Code.BESIDE_UNREAD(name=lost.name))
