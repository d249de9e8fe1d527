"""What is known about one activation: the channel ids of its elements, and how simply they were computed.

Holds: the Value record and pure index arithmetic on id arrays. Elsewhere: tensors, operators, the model.

An id array has the number of axes of its tensor; an axis along which the ids are constant has size 1, whatever the
tensor's size is there. Id 0 means "not a channel".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from apoptosis.records import IntArray

Axis = tuple[str, int]
"""A tensor's qualified name and one of its dimensions."""

SIZE_LIMIT = 1 << 24
"""Largest id array that is ever expanded; what would need more is pinned."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What values without channels are. text: for messages.

    literal: the code of the model makes them, so that the next pass has the same ones. kept: left by the pass before.
    """

    text: str
    literal: bool = False
    kept: bool = False

    def __str__(self) -> str:
        return self.text


CONSTANT = Origin("a constant", literal=True)
INPUT = Origin("the network input")

CHANNELS, LITERAL = "channels", "literal"
"""What a Multiple may be of, beside the sums of a product of activations (by `result.pairs_of`)."""


def weight_named(name: str) -> str:
    """Return what a Multiple of a parameter is of."""
    return f"weight:{name}"


class TooLargeError(Exception):
    """An id array would grow beyond SIZE_LIMIT; never leaves this package."""


class Multiple(NamedTuple):
    """What a value is a multiple of, and the plain numbers in between: (call in the mode's scalars, place, power)."""

    of: str
    numbers: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True, slots=True)
class Path:
    """The steps from a producer to here: [normalisation] -> [activation] -> pooling."""

    norm: str | None = None
    activation: str = "identity"
    args: tuple[float, ...] = ()
    slopes: str | None = None
    activated: bool = False
    max_pool: bool = False
    pooled: bool = False


Paths = Mapping[Axis, Path | None]


@dataclass(frozen=True, slots=True)
class Value:
    """Ids of an activation and what led to it.

    is_filler: no ids, and the values say nothing of their position (fills, independent noise): meets channels
    harmlessly. origin: what values without ids are, for messages. paths: per producer, the steps since it; None: not
    simple. dropout: rate of a dropout with nothing but data movement since. keep: set on a Bernoulli mask, its keep
    rate. source: module whose contraction this is the untouched output of. linear: the producers that this is
    homogeneous in: it scales with their weights and biases, by positive numbers. scaled: nothing but movement and plain
    factors, the same for all channels, since the producer that `linear` names. even: without ids: the axes, counted
    from the last (-1), along which all elements are alike though laid out apart; what is of one size along them has one
    token (see TraceResult.extents).
    gains: the parameter that this is, times plain numbers; () for anything else.
    multiple: the plain numbers that this was scaled with, where they are followed (multiples.py alone sets it).
    """

    ids: IntArray
    is_filler: bool = False
    origin: Origin = CONSTANT
    paths: Paths = field(default_factory=dict)
    dropout: float = 0.0
    keep: float | None = None
    source: str | None = None
    linear: frozenset[Axis] = frozenset()
    scaled: bool = False
    even: Mapping[int, object] = field(default_factory=dict)
    multiple: Multiple | None = None
    gains: tuple[Axis, ...] = ()

    @property
    def has_channels(self) -> bool:
        """Whether any element is a channel."""
        return self.ids.size > 1 or (self.ids.size == 1 and int(self.ids.flat[0]) != 0)

    def moved(self, ids: IntArray) -> Value:
        """Return the same value with its elements rearranged."""
        return replace(self, ids=ids, even={})


def nothing(ndim: int, origin: Origin = CONSTANT, *, is_filler: bool = False) -> Value:
    """Return a value that carries no channel."""
    return Value(np.zeros((1,) * ndim, dtype=np.int64), is_filler=is_filler, origin=origin)


def drop_paths(paths: Sequence[Paths]) -> Paths:
    """Return the producers of all operands, none of them simple any more."""
    return {key: None for part in paths for key in part}


def joined(paths: Sequence[Paths]) -> Paths:
    """Return the paths of tensors laid side by side: what disagrees for one producer is not simple."""
    out: dict[Axis, Path | None] = {}
    for part in paths:
        for key, path in part.items():
            out[key] = path if key not in out or out[key] == path else None
    return out


def collapse(ids: IntArray) -> IntArray:
    """Shrink to size 1 every axis along which the ids are constant.

    Example:
        >>> collapse(np.array([[3, 4], [3, 4]])).tolist()
        [[3, 4]]
    """
    for axis, size in enumerate(ids.shape):
        if size > 1:
            first = ids.take([0], axis=axis)
            if bool((ids == first).all()):
                ids = first
    return ids


def expand(ids: IntArray, shape: Sequence[int], axes: Sequence[int] | None = None) -> IntArray:
    """Give `axes` (all when None) their full size; the result is read-only.

    Raises: TooLargeError: more than SIZE_LIMIT elements.
    """
    target = list(ids.shape)
    for axis in range(len(target)) if axes is None else axes:
        target[axis] = shape[axis]
    if int(np.prod(target, dtype=np.float64)) > SIZE_LIMIT:
        raise TooLargeError
    return np.broadcast_to(ids, target)


def align(ids: IntArray, ndim: int) -> IntArray:
    """Prepend axes of size 1 up to `ndim`, as broadcasting does."""
    return ids.reshape((1,) * (ndim - ids.ndim) + ids.shape)


def unpaired(one: IntArray, other: IntArray) -> IntArray:
    """Return the ids that meet values without a channel, 0 elsewhere.

    Example:
        >>> unpaired(np.array([3, 0, 4]), np.array([5, 6, 0])).tolist()
        [0, 6, 4]
    """
    found: IntArray = np.where((one == 0) != (other == 0), one + other, 0)
    return found


def without_gaps(ids: IntArray) -> IntArray:
    """Fill positions without a channel, along axes on which all others carry one and the same.

    Example:
        >>> without_gaps(np.array([[3, 0], [3, 0], [4, 4]])).tolist()
        [[3], [3], [4]]
    """
    for axis in sorted(varying(ids)):
        most = ids.max(axis=axis, keepdims=True)
        if varying(most) and bool(((ids == 0) | (ids == most)).all()):
            ids = most
    return ids


def varying(ids: IntArray) -> frozenset[int]:
    """Return the axes along which the ids vary."""
    return frozenset(axis for axis, size in enumerate(ids.shape) if size > 1)


def blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[range, range]]:
    """Yield the smallest blocks of consecutive axes that a reshape maps onto each other, before and after.

    Example:
        >>> list(blocks((10, 2, 3), (10, 6)))
        [(range(0, 1), range(0, 1)), (range(1, 3), range(1, 2))]
    """
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        a, i = (old[i], i + 1) if i < len(old) else (1, i)
        b, j = (new[j], j + 1) if j < len(new) else (1, j)
        while a != b:
            if a < b:
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        yield range(i0, i), range(j0, j)


def reshape(ids: IntArray, old: Sequence[int], new: Sequence[int]) -> IntArray:
    """Reshape an id array of a tensor of shape `old` as the tensor is reshaped to `new`.

    Consecutive axes are matched into the smallest blocks of equal size; only blocks in which ids vary are expanded.

    Example:
        >>> reshape(np.array([[[5], [6]]]), (10, 2, 3), (10, 6)).tolist()  # channels of 3 positions, flattened
        [[5, 5, 5, 6, 6, 6]]
        >>> reshape(np.array([[5, 6]]), (30, 2), (10, 3, 2)).shape
        (1, 1, 2)
    """
    if ids.size == 1 or 0 in old:
        return ids.reshape(-1)[:1].reshape((1,) * len(new)) if ids.size else np.zeros((1,) * len(new), dtype=np.int64)
    source, target = list(ids.shape), [1] * len(new)
    for before, after in blocks(old, new):
        if any(source[k] > 1 for k in before):
            source[before.start : before.stop] = old[before.start : before.stop]
            target[after.start : after.stop] = new[after.start : after.stop]
    if int(np.prod(source, dtype=np.float64)) > SIZE_LIMIT:
        raise TooLargeError
    return collapse(np.broadcast_to(ids, source).reshape(target))
