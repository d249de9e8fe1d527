"""Copies of trained weights that the model itself holds: averages, momentum encoders, old weights of a penalty.

Holds: recognising copies by shape and direction, and pinning the originals. Elsewhere: copies outside of the model,
which are not visible here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from apoptosis.graph.explain import Code
from apoptosis.graph.trace.result import TraceResult
from apoptosis.numerics.alike import alike

_DEPTH = 3  # levels of lists and dictionaries in an attribute that are searched for tensors


def keep_copied(trace: TraceResult, model: nn.Module, frozen: frozenset[str]) -> None:
    """Pin the channels of trained weights of which the model holds a copy that must keep its shape.

    frozen: parameters that require no gradient while others do.
    """
    tensors, reads = trace.channel_ids.tensors, trace.reads
    unread = frozenset(name for name in tensors if not reads.get(name))
    for copy, kind, origin in _averages(model, frozen, unread):
        for name in (f"{origin}.{name}" for name, _ in model.get_submodule(origin).named_parameters()):
            if name in tensors:
                trace.pin(tensors[name].ids(), Code.COPIED_MODULE(name=name, kind=kind, copy=copy))
    for place, name in _kept(model, frozen, unread):
        if name in tensors:
            trace.pin(tensors[name].ids(), Code.COPIED(name=name, place=place))


def _averages(model: nn.Module, frozen: frozenset[str], unread: frozenset[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (module, "frozen" or "unread", trained module) where the one looks like an old copy of the other.

    Both are of one class with parameters of the same names and shapes, nothing of the one is trained by the passes and
    all of the other is, and their largest weights point the same way. Modules inside of such a pair are not listed
    again.
    """
    kinds: dict[object, tuple[list[tuple[str, str]], list[str]]] = {}
    for prefix, module in model.named_modules():
        shapes = {name: p.shape for name, p in module.named_parameters()}
        if not prefix or not any(len(shape) > 1 for shape in shapes.values()):
            continue
        full = {f"{prefix}.{name}" for name in shapes}
        copies, origins = kinds.setdefault((type(module), tuple(sorted(shapes.items()))), ([], []))
        if full <= frozen or full <= unread:
            copies.append((prefix, "frozen" if full <= frozen else "unread"))
        elif full.isdisjoint(frozen | unread):
            origins.append(prefix)
    found: list[str] = []
    for copies, origins in kinds.values():
        for origin in origins:
            inside = any(origin.startswith(f"{other}.") for other in found)
            copy = None if inside else next((c for c in copies if _modules_alike(model, c[0], origin)), None)
            if copy is not None:
                found.append(origin)
                yield *copy, origin


def _kept(model: nn.Module, frozen: frozenset[str], unread: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield (place, weight) for tensors in unread buffers and in plain attributes that look like copies of a weight."""
    weights: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
    for name, p in model.named_parameters():
        if p.dim() > 1 and name not in frozen:
            weights.setdefault(tuple(p.shape), []).append((name, p))
    own = {id(p) for p in (*model.parameters(), *model.buffers())}
    places = [(f"the buffer '{name}'", "", b) for name, b in model.named_buffers() if name in unread]
    for prefix, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in ("_parameters", "_buffers", "_modules"):
                full = f"{prefix}.{attribute}" if prefix else attribute
                made = attribute if isinstance(value, Tensor) else ""
                places += [(f"the attribute '{full}'", made, x) for x in _tensors(value, _DEPTH) if id(x) not in own]
    for place, made, tensor in places:
        for name, weight in weights.get(tuple(tensor.shape), ()):
            # what hooks compute before every pass (weight_norm, prune): 'weight' from 'weight_v', 'weight_orig'
            if made and name.rpartition(".")[2].startswith(made):
                continue
            if alike(weight, tensor) and weight.data_ptr() != tensor.data_ptr():
                yield place, name


def _tensors(value: object, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item, depth - 1)


def _modules_alike(model: nn.Module, one: str, other: str) -> bool:
    a, b = (_largest(tuple(model.get_submodule(name).named_parameters())) for name in (one, other))
    return alike(a, b)


def _largest(parameters: Sequence[tuple[str, Tensor]]) -> Tensor:
    return max((p for _, p in sorted(parameters, key=lambda item: item[0]) if p.dim() > 1), key=Tensor.numel)
