"""Plain numbers of modules that were found to be widths: what an event makes of them, and how a checkpoint holds them.

Holds: reading and writing them, whatever they are called. Elsewhere: finding them (rehearsal), the
attributes of known types and names (attributes.py, splits.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from apoptosis.errors import CheckpointError, ShapeError, WidthsError
from apoptosis.records import Follow, IntArray, Structure, TensorEdit, places_left
from apoptosis.surgery.splits import removed_classes

MARK = "_apoptosis_widths"
"""Attribute in which a module keeps the names of those of its numbers that events have changed, for checkpoints."""


def number_of(module: nn.Module, attribute: str, index: int | None) -> int | None:
    """Return the int that an attribute, or an entry of a list or tuple, of the module itself holds; None for others.

    Example:
        >>> block = nn.Module()
        >>> block.width, block.parts = 4, [2, 3]
        >>> number_of(block, "width", None), number_of(block, "parts", 1), number_of(block, "training", None)
        (4, 3, None)
    """
    found = vars(module).get(attribute)
    if index is not None:
        found = found[index] if isinstance(found, list | tuple) and index < len(found) else None
    return found if type(found) is int else None


def value_of(model: nn.Module, follow: Follow) -> int:
    """Return what a number that follows is now. Raises: ShapeError: it is not there any more."""
    value = number_of(model.get_submodule(follow.module), follow.attribute, follow.index)
    if value is None:
        raise ShapeError(f"attribute '{follow.attribute}' of '{follow.module}' was a width and is no number any more.")
    return value


def number_changes(model: nn.Module, structure: Structure, edits: Iterable[TensorEdit]) -> dict[str, dict[str, Any]]:
    """Say what the numbers that follow become, by module and attribute.

    Raises: WidthsError: a number would have to be two at once, or is not there any more.
    """
    if not structure.follows:
        return {}
    removed, found = removed_classes(structure, edits), dict[str, dict[str, Any]]()
    for follow in structure.follows:
        module, value = model.get_submodule(follow.module), value_of(model, follow)
        news = _wanted(structure, follow, value, removed)
        if len(news) > 1:
            wanted = " and ".join(str(new) for new in sorted(news))
            raise WidthsError(
                f"attribute '{follow.attribute}' of '{follow.module}' ({value}) would have to be {wanted} at once."
            )
        new = next(iter(news), value)
        if new == value:
            continue
        changes = found.setdefault(follow.module, {})
        changes[follow.attribute] = _with(changes.get(follow.attribute, vars(module)[follow.attribute]), follow, new)
        changes[MARK] = tuple(sorted({*changes.get(MARK, vars(module).get(MARK, ())), follow.attribute}))
    return found


def _wanted(structure: Structure, follow: Follow, value: int, removed: IntArray) -> set[int]:
    news = {follow.times * count.without(removed) for count in structure.counts if count.is_of(follow, value)}
    for group in structure.groups:
        if group.name in follow.groups and group.num_channels == value and group.members:
            member = group.members[0]
            news.add(places_left(structure.classes[member.tensor][member.dim][member.positions], removed))
    return news


def _with(old: Any, follow: Follow, new: int) -> Any:
    if follow.index is None:
        return new
    entries = [new if i == follow.index else entry for i, entry in enumerate(old)]
    return tuple(entries) if isinstance(old, tuple) else entries


def followed_numbers(module: nn.Module) -> dict[str, Any]:
    """Read the numbers of a module that events have changed, with their names; {} where none was."""
    names = vars(module).get(MARK, ())
    return {MARK: tuple(names), **{name: vars(module)[name] for name in names if name in vars(module)}} if names else {}


def stored_numbers(module: nn.Module, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Say what makes the numbers of a module those that were saved; {} where a checkpoint has none.

    Raises: CheckpointError: an attribute that is no width here, or holds no sizes there.
    """
    names, known = stored.get(MARK, ()), vars(module).get(MARK, ())
    if not isinstance(names, tuple) or not all(isinstance(name, str) and name in stored for name in names):
        raise CheckpointError(f"the attributes of a {type(module).__name__} are damaged.")
    if not set(known) <= set(names):
        raise CheckpointError(
            f"a {type(module).__name__} has widths that it lacks: load it into a freshly built model."
        )
    for name in names:
        here, there = vars(module).get(name), stored[name]
        if _shape(here) is None or _shape(here) != _shape(there):
            raise CheckpointError(
                f"it is of another network: a {type(module).__name__} has no width in attribute '{name}' here."
            )
    return {MARK: names, **{name: stored[name] for name in names}} if names else {}


def _shape(value: Any) -> tuple[type, int] | None:
    """Tell an int from lists and tuples of ints by their length; None for anything else, and for what is no size."""
    entries = value if isinstance(value, list | tuple) else [value]
    if not all(type(entry) is int and entry > 0 for entry in entries):
        return None
    return type(value), len(entries)
