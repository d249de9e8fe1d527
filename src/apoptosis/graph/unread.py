"""What the example input does not reach: modules that never run, parameters that nothing reads.

Lives here: leaving them alone, by pins, and saying so. Does not live here: the captures that show what is reached.

How a module that never runs would read the channels of others is not known. What can be seen is pinned: its own
parameters, those that it shares with modules that do run, and what an unread parameter lies along.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from torch import nn

from apoptosis.graph.findings import Findings, Reason
from apoptosis.graph.slots import Owner

_REMEDY = "Give an example_input that takes this way, or delete it."
_LISTS = (nn.ParameterList, nn.ParameterDict)  # which no pass could run


def leave_alone(findings: Findings, model: nn.Module, aliases: Mapping[str, str]) -> tuple[str, ...]:
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
        text = f"parameter '{name}' is not read by the forward pass on example_input"
        if above is None:
            notes.append(text)
        else:
            text = f"the forward pass on example_input does not run '{above}'"
        _pin(findings, owner, Reason(text, remedy=_REMEDY))
    lists = {name for name, module in modules.items() if isinstance(module, _LISTS)}
    _pin_shared(findings, {name: held for name, held in own.items() if name not in lists})
    _pin_beside(findings, own, unread)
    return tuple(notes)


def _own(findings: Findings, name: str, module: nn.Module, aliases: Mapping[str, str]) -> Iterator[tuple[str, Owner]]:
    """Yield (leaf, parameter) of a module without those inside it."""
    for leaf, parameter in module._parameters.items():
        if parameter is not None:
            full = f"{name}.{leaf}" if name else leaf
            yield leaf, findings.slots.owners[aliases.get(full, full)]


def _idle(findings: Findings, own: Mapping[str, Mapping[str, Owner]], unread: Mapping[str, Owner]) -> dict[str, int]:
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
        "it on channels that have become fewer, it will fail"
    )


def _pin(findings: Findings, owner: Owner, reason: Reason) -> None:
    findings.pin(owner.slots(), reason)
    if len(owner.shape) > 1 and not any((owner.name, d) in findings.producers for d in range(len(owner.shape))):
        findings.owners.setdefault((owner.name, 0), owner.name)


def _pin_shared(findings: Findings, own: Mapping[str, Mapping[str, Owner]]) -> None:
    """Pin parameters that modules which run share with one that does not."""
    homes: dict[str, list[str]] = {}
    for name, held in own.items():
        for owner in held.values():
            homes.setdefault(owner.name, []).append(name)
    for tensor, names in homes.items():
        idle = [name for name in names if name not in findings.ran]
        if idle and len(idle) < len(names):
            text = f"'{tensor}' belongs to '{idle[0]}' too, which the forward pass on example_input does not run"
            findings.pin(findings.slots.owners[tensor].slots(), Reason(text, remedy=_REMEDY))


def _pin_beside(findings: Findings, own: Mapping[str, Mapping[str, Owner]], unread: Mapping[str, Owner]) -> None:
    """Pin what an unread parameter of a module lies along: both have to keep one length."""
    for held in own.values():
        for lost in held.values():
            for owner in held.values():
                if lost.name in unread and owner.name not in unread and owner.shape[:1] == lost.shape[:1] != ():
                    text = f"'{lost.name}' lies along them and is not read by the forward pass on example_input"
                    findings.pin(owner.axis(0), Reason(text, remedy=_REMEDY))
