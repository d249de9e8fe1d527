"""Numbers that a module's forward pass splits channels by: how they change, and the plain attributes that hold them.

Holds: the vocabulary of attribute names, and what an event makes of `Structure.splits`. Elsewhere:
attributes that follow a tensor's dim (attributes.py), noticing splits (graph), any writing (transaction.py).
"""

from __future__ import annotations

import inspect
import linecache
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from apoptosis.errors import ShapeError, WidthsError
from apoptosis.modules.attention import is_attention
from apoptosis.records import IntArray, Split, Structure, TensorEdit


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitChange:
    """A grid (rows, columns) of channels that the forward pass of `module` makes, before and after an event."""

    module: str
    old: tuple[int, int]
    new: tuple[int, int]
    where: str = ""


_Follow = Callable[[int, SplitChange], int | None]
"""What an attribute of this value becomes; None: it is not about this grid."""


def _as(number: Callable[[int, int], int]) -> _Follow:
    """Follow a number of the grid, given by its rows and columns."""
    return lambda value, change: number(*change.new) if value == number(*change.old) else None


_rows, _columns = _as(lambda rows, columns: rows), _as(lambda rows, columns: columns)
_total = _as(lambda rows, columns: rows * columns)


def _lone_columns(value: int, change: SplitChange) -> int | None:
    """Follow one group per channel."""
    return _columns(value, change) if change.old[0] == 1 else None


def _columns_or_total(value: int, change: SplitChange) -> int | None:
    found = _columns(value, change)
    return _total(value, change) if found is None else found


def _packed_rows(value: int, change: SplitChange) -> int | None:
    """Follow a third or a half: the heads of queries, keys and values, or of two of them, may lie in one grid."""
    for times in (2, 3):
        if change.old[0] == times * value and value > 1 and change.new[0] % times == 0:
            return change.new[0] // times
    return None


def _packed_total(value: int, change: SplitChange) -> int | None:
    for times in (2, 3):
        heads = change.old[0] // times
        if change.old[0] == times * heads and heads > 1 and heads * change.old[1] == value:
            return change.new[0] // times * change.new[1] if change.new[0] % times == 0 else None
    return None


_KINDS: tuple[tuple[tuple[_Follow, ...], str], ...] = (
    (
        (_columns,),
        "head_dim head_size head_width head_features attention_head_size attention_head_dim dim_head d_head "
        "dim_per_head size_per_head hidden_dim_per_head hidden_size_per_attention_head hidden_per_head d_kv d_k d_v "
        "d_qk dk dv key_value_proj_dim v_head_dim qk_head_dim q_head_dim k_head_dim value_head_dim key_head_dim "
        "per_head_dim",
    ),
    (
        (_rows, _packed_rows),
        "num_heads n_heads n_head nhead heads h num_attention_heads n_attention_heads num_attn_heads attention_heads "
        "attn_heads num_key_value_heads n_kv_heads num_kv_heads kv_heads n_kv_head n_local_heads n_local_kv_heads "
        "num_query_heads num_q_heads num_v_heads num_k_heads",
    ),
    ((_rows, _lone_columns), "num_groups n_groups"),
    (
        (_columns_or_total, _packed_total),
        "all_head_size inner_dim dim_inner d_inner inner_size split_size intermediate_size intermediate_dim expert_dim "
        "ffn_dim hidden_features d_ff dim_ff attn_dim attention_dim value_dim key_dim qk_dim num_features num_channels",
    ),
    ((_total, _packed_total), "embed_dim embed_dims hidden_size hidden_dim d_model dim n_embd num_hidden"),
)
VOCABULARY: Mapping[str, tuple[_Follow, ...]] = {name: kinds for kinds, names in _KINDS for name in names.split()}
"""Attribute name -> how a value is read, the surer way first: as columns, rows, or rows times columns."""


def vocabulary_of(module: nn.Module) -> dict[str, int]:
    """Read the plain int attributes of a module whose names are in the vocabulary.

    nn.MultiheadAttention is left out: see attention.py.
    """
    if is_attention(module):
        return {}
    return {name: value for name, value in vars(module).items() if name in VOCABULARY and type(value) is int}


def unflattened_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Read the sizes of an nn.Unflatten, {} for other modules and sizes with names.

    Example:
        >>> unflattened_of(nn.Unflatten(1, (4, 2)))
        {'unflattened_size': (4, 2)}
    """
    sizes = module.unflattened_size if type(module) is nn.Unflatten else ()
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return {}
    return {"unflattened_size": tuple(sizes)}


def _refitted(sizes: tuple[int, ...], change: SplitChange) -> tuple[int, ...] | None:
    """Change one size: the first one that takes the change alone, the last such one where rows get shorter."""
    rows, columns = change.old
    known = math.prod(size for size in sizes if size > 0)
    wide = [size if size > 0 else rows * columns // known for size in sizes]
    if math.prod(wide) != rows * columns:
        return None
    part, whole = math.prod(change.new), rows * columns
    order = range(len(wide)) if change.new[1] == columns else reversed(range(len(wide)))
    at = next((i for i in order if wide[i] * part % whole == 0), None)
    if at is None:
        return None
    return tuple(size if i != at or size < 0 else size * part // whole for i, size in enumerate(sizes))


def removed_classes(structure: Structure, edits: Iterable[TensorEdit]) -> IntArray:
    """Return the channel classes that an event takes away, ascending."""
    gone = [np.zeros(0, dtype=np.int64)]
    for edit in edits:
        classes = structure.classes.get(edit.tensor, ())
        for dim, keep in edit.keep.items():
            if dim < len(classes):
                gone.append(np.delete(classes[dim], keep.cpu().numpy()))
    return np.unique(np.concatenate(gone))


def split_changes(structure: Structure, edits: Iterable[TensorEdit]) -> dict[str, tuple[SplitChange, ...]]:
    """Say what the event makes of every grid, by module; modules none of whose grids change are left out.

    Raises: ShapeError: a grid would lose more of one row than of another.
    """
    removed = removed_classes(structure, edits)
    found: dict[str, list[SplitChange]] = {}
    for split, stays in _grids(structure.splits, removed):
        left = stays.sum(1)
        left = left[left > 0]
        if not left.size:  # what was split is no longer there
            continue
        if bool((left != left[0]).any()):
            place = f" ({split.where})" if split.where else ""
            raise ShapeError(
                f"'{split.module}' splits channels into rows of equal length{place}, and would get unequal ones."
            )
        rows, columns = stays.shape
        new = int(left.size), int(left[0])
        found.setdefault(split.module, []).append(
            SplitChange(module=split.module, old=(rows, columns), new=new, where=split.where)
        )
    return {m: tuple(changes) for m, changes in found.items() if any(change.old != change.new for change in changes)}


def _grids(splits: Iterable[Split], removed: IntArray) -> list[tuple[Split, npt.NDArray[np.bool_]]]:
    """List the grids with the places that stay.

    Where an axis of heads is split off (from a batch, say) and channels run along another axis, there is a row of heads
    for every channel. A head stays as long as one of these rows has it.
    """
    found: list[tuple[Split, npt.NDArray[np.bool_]]] = []
    lone: dict[tuple[str, str, int], int] = {}
    for split in splits:
        stays = ~np.isin(split.classes, removed)
        key = (split.module, split.where, split.classes.shape[1])
        if len(stays) == 1 and key in lone:
            found[lone[key]][1][...] |= stays
            continue
        if len(stays) == 1:
            lone[key] = len(found)
        found.append((split, stays))
    return found


def followed(module: nn.Module, changes: Sequence[SplitChange]) -> dict[str, Any]:
    """Say what the module's attributes become: those of the vocabulary that hold a number of a grid that changes.

    A name says what it counts, which separates rows from columns of equal numbers. Where one attribute could
    stand for several grids that do not change alike, the lines of source that make the grids decide by naming it.

    Args:
        module: the module whose forward pass makes the grids.
        changes: all its grids, unchanged ones included.

    Raises: WidthsError: an attribute would have to be two numbers at once.

    Example:
        >>> block = nn.Module()
        >>> block.num_heads, block.head_dim, block.inner_dim = 4, 4, 16
        >>> followed(block, [SplitChange(module="block", old=(4, 4), new=(4, 3))])
        {'head_dim': 3, 'inner_dim': 12}
    """
    found: dict[str, Any] = {}
    for name, sizes in unflattened_of(module).items():
        refitted = {_refitted(sizes, change) for change in changes} - {None}
        if len(refitted) == 1 and refitted != {sizes}:
            found[name] = refitted.pop()
    for name, value in vocabulary_of(module).items():
        for follow in VOCABULARY[name]:
            votes = [(new, change) for change in changes if (new := follow(value, change)) is not None]
            if votes:
                new = _settled(module, name, value, votes)
                if new != value:
                    found[name] = new
                break
    return found


def _settled(module: nn.Module, name: str, value: int, votes: Sequence[tuple[int, SplitChange]]) -> int:
    votes = [vote for vote in votes if vote[1].old[0] > 1] or votes  # a single row may be a row of anything
    news = {new for new, _ in votes}
    if len(news) > 1:
        named = {new for new, change in votes if reads_attribute(module, change.where, name)}
        news = named or news - {value}
    if len(news) > 1:
        wanted = " and ".join(str(new) for new in sorted(news))
        raise WidthsError(f"attribute '{name}' of {type(module).__name__} ({value}) would have to be {wanted} at once.")
    return next(iter(news))


def reads_attribute(module: nn.Module, where: str, attribute: str) -> bool:
    """Whether the line of source at `where` reads that attribute of something."""
    file, _, line = where.rpartition(":")
    try:
        source = inspect.getsourcefile(type(module))
    except TypeError:  # a class without a file: typed in, or built in
        return False
    if source is None or Path(source).name != Path(file).name or not line.isdigit():
        return False
    return re.search(rf"\.{attribute}\b", linecache.getline(source, int(line))) is not None
