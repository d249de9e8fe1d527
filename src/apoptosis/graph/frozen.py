"""Parameters that require no gradient while others do: what is trained beside them reads them in the shape they have.

Lives here: which ones stay, by pins, and trained weights that a frozen copy averages. Does not live here: what else
pins (rules, unread.py).

A network of which nothing requires a gradient is simply a trained one, and nothing of it is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from apoptosis.graph.findings import Findings, Reason

FROZEN = "requires no gradient"  # in the reason of every such pin
_REMEDY = "frozen='cut' lets it shrink where nothing else needs its old shape."
_ADAPTER = "belongs to an adapter of peft, whose configuration and base model hold the shape it has"
_AVERAGED = "is followed by the frozen copy"  # a momentum encoder, a target network
_OUTSIDE = "Keep the copy outside the model and call apo.follow(copy); else frozen='cut', where nothing ties the two."
_ALIKE = 0.5  # cosine of a weight and its average, at least; of two layers that were trained apart it is about 0
_LOOKED_AT = 65_536  # numbers of the largest weight that are compared
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


def keep_frozen(findings: Findings, model: nn.Module, frozen: frozenset[str]) -> None:
    """Pin the channels that frozen weights make or read, and all that an adapter holds.

    Frozen parameters that channels only meet (the gain of a norm) follow the trainable weights around them.
    """
    owners = findings.slots.owners
    axes = {*findings.producers, *((c.weight, c.dim) for c in findings.consumers.values())}
    for name, dim in sorted(axes):
        if name in frozen:
            own = f"'{name}' {FROZEN}, while other parameters are trained beside it"
            findings.pin(owners[name].axis(dim), Reason(own, remedy=_REMEDY))
    for copy, origin in _averages(model, frozen):
        for name in _names(model, origin):
            if name in owners:
                own = f"'{name}' {_AVERAGED} '{copy}', which a training loop updates place by place"
                findings.pin(owners[name].slots(), Reason(own, remedy=_OUTSIDE))
    for name in _of_adapters(model):
        if name in owners:
            findings.pin(owners[name].slots(), Reason(f"'{name}' {_ADAPTER}", remedy=_REMEDY))


def _of_adapters(model: nn.Module) -> Iterator[str]:
    for prefix, module in model.named_modules():
        if any(cls.__name__ in _TUNERS and cls.__module__.startswith("peft.") for cls in type(module).__mro__):
            yield from (f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters())


def _averages(model: nn.Module, frozen: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield (frozen module, trained module) where the one looks like an average or an old copy of the other.

    Both are of one class with parameters of the same names and shapes, nothing of the one requires a gradient and all
    of the other does, and their largest weights point the same way. Modules inside of such a pair are not listed again.
    """
    kinds: dict[object, tuple[list[str], list[str]]] = {}
    for prefix, module in model.named_modules():
        shapes = {name: p.shape for name, p in module.named_parameters()}
        if not prefix or not any(len(shape) > 1 for shape in shapes.values()):
            continue
        full = {f"{prefix}.{name}" for name in shapes}
        copies, origins = kinds.setdefault((type(module), tuple(sorted(shapes.items()))), ([], []))
        if full <= frozen:
            copies.append(prefix)
        elif full.isdisjoint(frozen):
            origins.append(prefix)
    found: list[tuple[str, str]] = []
    for copies, origins in kinds.values():
        for origin in origins:
            inside = any(origin.startswith(f"{other}.") for _, other in found)
            copy = None if inside else next((c for c in copies if _alike(model, c, origin)), None)
            if copy is not None:
                found.append((copy, origin))
    yield from found


def _alike(model: nn.Module, one: str, other: str) -> bool:
    a, b = (_largest(dict(model.get_submodule(name).named_parameters())) for name in (one, other))
    if a.is_meta or b.is_meta or a.device != b.device:
        return False
    a, b = (x.detach().reshape(-1)[:_LOOKED_AT].to(torch.float32) for x in (a, b))
    return bool(a @ b > _ALIKE * a.norm() * b.norm())


def _largest(parameters: Mapping[str, Tensor]) -> Tensor:
    return max((p for _, p in sorted(parameters.items()) if p.dim() > 1), key=Tensor.numel)


def _names(model: nn.Module, prefix: str) -> list[str]:
    return [f"{prefix}.{name}" for name, _ in model.get_submodule(prefix).named_parameters()]
