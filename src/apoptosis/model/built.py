"""The shapes that a model was built with, known as long as the model lives.

Holds: what they were before anything was removed, over several runs, one-shot events and checkpoints. A checkpoint says
them, so that `load` knows a freshly built model by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from torch import nn

Shapes = Mapping[str, tuple[int, ...]]

_BUILT: WeakKeyDictionary[nn.Module, dict[str, tuple[int, ...]]] = WeakKeyDictionary()


def built_shapes(model: nn.Module, now: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shape that every tensor of `model` was built with; asked for the first time, these are those of now.

    A tensor that the user has put in since, of more dims or a larger size than the one before, counts as built now.

    Args:
        model: without its wrappers.
        now: shapes by name.
    """
    known = _BUILT.get(model, {})
    found = {name: known[name] if _holds(known.get(name), shape) else tuple(shape) for name, shape in now.items()}
    _BUILT[model] = found
    return dict(found)


def is_known(model: nn.Module) -> bool:
    """Whether `model` shrank, or took over a checkpoint, in this process."""
    return model in _BUILT


def note_built(model: nn.Module, shapes: Shapes) -> None:
    """Note the shapes that a model which takes over a checkpoint was built with."""
    _BUILT[model] = {name: tuple(shape) for name, shape in shapes.items()}


def _holds(built: tuple[int, ...] | None, now: tuple[int, ...]) -> bool:
    return built is not None and len(built) == len(now) and all(a >= b for a, b in zip(built, now, strict=True))
