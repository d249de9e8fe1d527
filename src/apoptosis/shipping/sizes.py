"""Inputs of other sizes than the example's: which of their axes may vary, and calls of such sizes to check files on.

Holds: rows (examples) and length (of token sequences), found by the inputs' shapes and by running the network.
Elsewhere: running it on them (check.py), telling torch.export (programs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from apoptosis.model.evaluate import Call

ROWS, LENGTH = "rows", "length"
Axes = tuple[Mapping[int, str], ...]
"""For every leaf of a call, by dimension, the size that it has: {0: "rows", 1: "length"}; {} where nothing varies."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calls:
    """Calls of the network. traced: what it is exported on. checks: what files are compared on, the example first.

    axes: of which sizes may differ between them. num_like_example: how many of the checks, the first ones, have the
    example's sizes.
    """

    traced: Call
    checks: tuple[Call, ...]
    axes: Axes
    num_like_example: int

    @property
    def names(self) -> tuple[str, ...]:
        """The sizes that vary."""
        return tuple(dict.fromkeys(name for axes in self.axes for name in axes.values()))

    @property
    def fixed(self) -> Calls:
        """The example alone, no size of which varies."""
        number = self.num_like_example
        axes: Axes = tuple({} for _ in self.axes)
        return Calls(traced=self.checks[0], checks=self.checks[:number], axes=axes, num_like_example=number)


def find_sizes(call: Call, runs: Callable[[Call], bool], wanted: Sequence[str] = (ROWS, LENGTH)) -> Calls:
    """Find out which sizes of the inputs may vary.

    Args:
        call: the example.
        runs: says whether the network runs on a call; asked for some of other sizes.
        wanted: of these sizes.
    """
    leaves = _leaves(call)
    axes = _axes(leaves)
    names = [name for name in wanted if any(name in found.values() for found in axes)]
    now = {name: _size(leaves, axes, name) for name in names}
    free = [name for name in names if runs(resized(call, axes, {name: now[name] + 1}))]
    kept: Axes = tuple({dim: name for dim, name in found.items() if name in free} for found in axes)
    altered = with_other_values(call)
    checks: tuple[Call, ...] = (call, altered) if runs(altered) else (call,)
    like = len(checks)
    if not free:
        return Calls(traced=call, checks=checks, axes=kept, num_like_example=like)
    wide = {name: max(2, now[name]) for name in free}  # torch.export writes sizes of 1 into the program
    if len(set(wide.values())) < len(wide):
        wide[ROWS] += 1
    others = [resized(call, kept, {name: wide[name] + 1 for name in free}), resized(call, kept, {free[0]: 1})]
    checks += tuple(other for other in others if runs(other))
    return Calls(traced=resized(call, kept, wide), checks=checks, axes=kept, num_like_example=like)


def resized(call: Call, axes: Axes, sizes: Mapping[str, int]) -> Call:
    """Return a call with other sizes: the first rows, or all of them again and again.

    Example:
        >>> resized(((torch.arange(2),), {}), ({0: "rows"},), {"rows": 3})[0][0].tolist()
        [0, 1, 0]
    """
    leaves, form = tree_flatten((call[0], dict(call[1])))
    found = []
    for leaf, by_dim in zip(leaves, axes, strict=True):
        for dim, name in by_dim.items():
            if name in sizes:
                index = torch.arange(sizes[name], device=leaf.device) % leaf.shape[dim]
                leaf = leaf.index_select(dim, index)
        found.append(leaf)
    args, kwargs = tree_unflatten(found, form)
    return args, kwargs


def with_other_values(call: Call) -> Call:
    """Return a call of the same sizes with other values: a file that has the example's written out would differ.

    Whole numbers stay among those that occur, in other places; masks have another last column.

    Example:
        >>> args, _ = with_other_values(((torch.tensor([[5, 6, 7]]), torch.ones(1, 3).bool(), torch.ones(1, 1)), {}))
        >>> args[0].tolist(), args[1].tolist(), args[2].tolist()
        ([[7, 5, 6]], [[True, True, False]], [[0.5]])
    """
    args, kwargs = tree_map_only(Tensor, _altered, (call[0], dict(call[1])))
    return args, kwargs


def _altered(x: Tensor) -> Tensor:
    if x.layout is not torch.strided or x.is_nested or not x.dim() or not x.numel():
        return x
    if x.is_floating_point() or x.is_complex():
        return x.detach().roll(1, 0) * 0.5
    if x.dtype != torch.bool and int(x.max()) > 1:
        return x.roll(1, -1)
    if x.shape[-1] < 2:
        return x
    other = x.clone()
    other[..., -1] = x[..., -1].logical_not().to(x.dtype)
    return other


def spec(call: Call, axes: Axes, leaf_spec: Callable[[Mapping[int, str]], Any]) -> Any:
    """Return something for every leaf in the form of a call, as torch.export takes dynamic_shapes."""
    leaves, form = tree_flatten((call[0], dict(call[1])))
    found = [leaf_spec(by_dim) if isinstance(x, Tensor) else None for x, by_dim in zip(leaves, axes, strict=True)]
    args, kwargs = tree_unflatten(found, form)
    return kwargs or args


def _leaves(call: Call) -> list[Any]:
    return tree_flatten((call[0], dict(call[1])))[0]


def _size(leaves: list[Any], axes: Axes, name: str) -> int:
    return next(
        int(x.shape[dim]) for x, found in zip(leaves, axes, strict=True) for dim, n in found.items() if n == name
    )


def _axes(leaves: list[Any]) -> Axes:
    tensors = [x for x in leaves if isinstance(x, Tensor) and x.dim() and x.layout is torch.strided and not x.is_nested]
    if not tensors:
        return tuple({} for _ in leaves)
    rows = tensors[0].shape[0]
    words = next((x.shape[1] for x in tensors if _is_words(x) and x.shape[1] > 1), 0)
    found = []
    for x in leaves:
        own: dict[int, str] = {}
        if any(x is t for t in tensors):
            if x.shape[0] == rows:
                own[0] = ROWS
            elif x.dim() > 1 and x.shape[1] == rows:
                own[1] = ROWS
            if _is_words(x) and x.shape[1] == words and 1 not in own:
                own[1] = LENGTH
        found.append(own)
    return tuple(found)


def _is_words(x: Tensor) -> bool:
    """Whether it looks like token ids or their mask: whole numbers or truth values, (rows, length)."""
    return x.dim() == 2 and not x.is_floating_point() and not x.is_complex()
