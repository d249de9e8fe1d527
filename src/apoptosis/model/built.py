"""The shapes that a model was built with, known as long as the model lives.

Holds: what they were before anything was removed, over several runs, one-shot events and checkpoints, the plain numbers
and classes of modules then, and which names are one tensor or one module. A checkpoint says the shapes, so that `load`
knows a freshly built model by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]

_BUILT: WeakKeyDictionary[nn.Module, dict[str, tuple[int, ...]]] = WeakKeyDictionary()
_VALUES: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()
_SEEN: WeakKeyDictionary[nn.Module, dict[str, tuple[int, ...]]] = WeakKeyDictionary()
_TIES: WeakKeyDictionary[nn.Module, list[tuple[str, ...]]] = WeakKeyDictionary()
_NUMBERS: WeakKeyDictionary[nn.Module, dict[str, tuple[ref[nn.Module], dict[str, Any]]]] = WeakKeyDictionary()


def built_shapes(model: nn.Module, now: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shape that every tensor of `model` was built with; asked for the first time, these are those of now.

    A tensor that the user has put in since, of more dims or a larger size than the one before, counts as built now.

    Args:
        model: without its wrappers.
        now: shapes by name.
    """
    known, seen = _BUILT.get(model, {}), _SEEN.setdefault(model, {})
    _note_numbers(model)
    _note_ties(model)
    seen.update({name: tuple(shape) for name, shape in now.items() if not _holds(seen.get(name), shape)})
    found = {name: known[name] if _holds(known.get(name), shape) else tuple(shape) for name, shape in now.items()}
    _BUILT[model] = {**known, **found}  # tensors of branches that are empty now may come back with a checkpoint
    return dict(found)


def seen_shapes(model: nn.Module, now: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the largest shape that every tensor of `model` had in this process, whatever checkpoints say of it.

    Args: as for `built_shapes`.
    """
    built_shapes(model, now)
    return {name: _SEEN[model][name] for name in now}


def built_ties(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the names that were one module or one parameter, modules first, branches that are empty now included."""
    return list(_TIES.get(model, ()))


def take_place(model: nn.Module, made: Iterable[nn.Module]) -> None:
    """Let modules that were made anew have the numbers of those that were in their places before."""
    here = {id(module) for module in made}
    known = _NUMBERS.setdefault(model, {})
    for name, module in model.named_modules():
        if id(module) in here and name in known:
            known[name] = ref(module), known[name][1]


def built_numbers(model: nn.Module, name: str) -> dict[str, Any]:
    """Return the class (`__class__`) and the plain numbers that a module had before anything was removed.

    Args:
        model: without its wrappers.
        name: of a module in it.

    Returns: attribute -> value; {} where nothing is known, or where another module has taken the place.
    """
    seen = _NUMBERS.get(model, {}).get(name)
    return dict(seen[1]) if seen is not None and seen[0]() is model.get_submodule(name) else {}


def built_values(model: nn.Module) -> dict[str, Tensor]:
    """Return by name the buffers that no state_dict holds, as they were before anything was removed."""
    return dict(_VALUES.get(model, {}))


def _note_numbers(model: nn.Module) -> None:
    known, values = _NUMBERS.setdefault(model, {}), _VALUES.setdefault(model, {})
    for name, module in model.named_modules():
        if name not in known or known[name][0]() is not module:
            for leaf in module._non_persistent_buffers_set:  # an event puts others in their place: these cost nothing
                if (buffer := module._buffers.get(leaf)) is not None:
                    values[f"{name}.{leaf}".lstrip(".")] = buffer.detach()
            numbers = {key: _copied(value) for key, value in vars(module).items() if _is_plain(value)}
            known[name] = ref(module), {"__class__": type(module), **numbers}


def _note_ties(model: nn.Module) -> None:
    modules, parameters = dict[int, list[str]](), dict[int, list[str]]()
    for name, module in model.named_modules(remove_duplicate=False):
        modules.setdefault(id(module), []).append(name)
    for name, p in model.named_parameters(remove_duplicate=False):
        parameters.setdefault(id(p), []).append(name)
    found = [tuple(names) for names in (*modules.values(), *parameters.values()) if len(names) > 1]
    here = {name for names in (*modules.values(), *parameters.values()) for name in names}
    old = [names for names in _TIES.get(model, ()) if not here.issuperset(names)]  # of branches that are empty now
    _TIES[model] = [*old, *(names for names in found if not any(set(names) <= set(other) for other in old))]


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return type(value) in (tuple, list) and all(type(entry) is int for entry in value)
    return type(value) in (int, float, bool)


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def is_known(model: nn.Module) -> bool:
    """Whether `model` shrank, or took over a checkpoint, in this process."""
    return model in _BUILT


def note_built(model: nn.Module, shapes: Shapes) -> None:
    """Note the shapes that a model which takes over a checkpoint was built with."""
    _BUILT[model] = {**_BUILT.get(model, {}), **{name: tuple(shape) for name, shape in shapes.items()}}


def _holds(built: tuple[int, ...] | None, now: tuple[int, ...]) -> bool:
    return built is not None and len(built) == len(now) and all(a >= b for a, b in zip(built, now, strict=True))
