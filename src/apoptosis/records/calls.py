"""What the operators of a pass showed beside the groups: numbers that follow widths, calls on parts, kept tensors.

Holds: records that surgery and checks read. Elsewhere: the structure that holds them (structure.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalarOperands:
    """The plain numbers that one call of an operator used: `operator` in `module`, `where` = "file.py:line"."""

    operator: str
    values: tuple[complex, ...]
    module: str = ""
    where: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PartialOp:
    """One call of an operator that worked on part of a group's channels only: their classes, ascending."""

    operator: str
    classes: IntArray
    module: str = ""
    where: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """An axis of channels that the forward pass of `module` splits into rows of equal length, or cuts into equal parts.

    classes: (rows, columns), the channel class (Structure.classes) at each place; where: "file.py:line". Plain
    attributes of the module that hold rows, columns or rows * columns are updated after an event.
    """

    module: str
    classes: IntArray
    where: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Count:
    """A number of places along an axis of channels that an operator was given: a size of a view, an end of a slice.

    modules: those that were running, the innermost first. classes: (number, further): the channel classes at each of
    the places that it counts. where: "file.py:line". After an event the number has to be that of the places at which a
    channel is left.
    """

    modules: tuple[str, ...]
    number: int
    classes: IntArray
    where: str = ""

    def is_of(self, follow: Follow, value: int) -> bool:
        """Whether the operator was given this number of a module, which is `value` now."""
        at = self.where in follow.places and follow.module in self.modules
        return at and self.number * follow.times == value

    def without(self, removed: IntArray) -> int:
        """Return at how many of the places a channel is left when these classes go."""
        return places_left(self.classes, removed)


def places_left(classes: IntArray, removed: IntArray) -> int:
    """Return at how many places, the rows of `classes`, a channel is left.

    Example:
        >>> places_left(np.array([[3], [4], [5]]), np.array([4]))
        2
    """
    return int((~np.isin(classes, removed)).any(axis=1).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Follow:
    """A plain number of a module that is updated with a width: an int attribute, or the entry `index` of a sequence.

    places: lines at which operators are given the number (Count.where). groups: further groups of that width. times:
    the number is that many times what the operators are given (`split(x, self.width // 2)`).
    """

    module: str
    attribute: str
    index: int | None = None
    places: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    times: int = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kept:
    """A tensor that the model keeps in an attribute from one forward pass to the next (a hidden state, a cache).

    path: the module's name, the attribute, then keys and indices inside of it. labels: for every position the number of
    its channel as in Structure.classes, -1 for none; an axis along which all are the same has size 1. copy_of: the
    parameter or buffer that it is a view of, or is computed from position by position; it is cut alike.
    """

    path: tuple[str | int, ...]
    labels: IntArray
    copy_of: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """What a contraction reads in a replayed pass; the tensors are the model's own, and must not be kept.

    site: key of the site. x: (..., positions), positions as in Site.input_columns. right: the right operand of a sum of
    products laid out likewise, else None.
    """

    site: str
    x: Tensor
    right: Tensor | None = None
