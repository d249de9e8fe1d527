"""Checking, after an edit, that every column still meets the channel it was folded for.

Holds: the comparison of two structures through the positions that were kept. Elsewhere: rolling back.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from apoptosis.errors import StructureChangedError
from apoptosis.graph.trace.partial_ops import changed_split, changed_work
from apoptosis.graph.trace.scalars import changed_scalar
from apoptosis.graph.verify.factors import Kept, positions_left, rescale_edits
from apoptosis.model.kept import labels_after
from apoptosis.model.module_state import name_of
from apoptosis.records import IntArray, Structure, TensorEdit


def _group_names(structure: Structure) -> dict[int, str]:
    """Return the name of the group of each channel class."""
    out: dict[int, str] = {}
    for group in structure.groups:
        for member in group.members[:1]:
            for label in structure.classes[member.tensor][member.dim][member.positions[:, 0]].tolist():
                out.setdefault(label, group.name)  # whole heads come last and are not what single channels go by
    return out


def _first_clash(left: IntArray, right: IntArray) -> int | None:
    """Return an index at which `left` values meet two different `right` values, or None."""
    order = np.lexsort((right, left))
    clash = (left[order][1:] == left[order][:-1]) & (right[order][1:] != right[order][:-1])
    return int(order[1:][clash][0]) if bool(clash.any()) else None


def _last_ones(old: Structure, left: IntArray) -> IntArray:
    """Return the classes that are all that is left of their group.

    What tied their positions may be gone (of blocks of two channels each, laid out in turn, single ones are left); but
    there is no other channel of the group that they could be mixed up with.
    """
    group_of = _group_names(old)
    stay: dict[str, set[int]] = {}
    for label in np.unique(left).tolist():
        if label in group_of:
            stay.setdefault(group_of[label], set()).add(label)
    return np.array([label for labels in stay.values() if len(labels) == 1 for label in labels], dtype=np.int64)


def _changed(structure: Structure, axis: tuple[str, int], label: int, text: str) -> StructureChangedError:
    name, place = _group_names(structure).get(label, ""), f"dim {axis[1]} of '{axis[0]}'"
    return StructureChangedError(f"group '{name}', at {place} {text}." if name else f"{place} {text}.", group=name)


def verify_classes(old: Structure, new: Structure, kept: Kept) -> dict[int, int]:
    """Raise unless every position of every tensor carries the channel it carried, and no other.

    An axis that is left with one position carries no id of its own (it may as well be broadcast) and is passed over.

    Returns: class after the edit -> before.
    """
    names: list[tuple[str, int]] = []
    olds: list[IntArray] = []
    news: list[IntArray] = []
    for tensor, labels in new.classes.items():
        for dim, label in enumerate(labels):
            before = old.classes[tensor][dim]
            if (left := positions_left(kept, tensor, dim)) is not None:
                before = before[left]
            if before.shape != label.shape:
                raise StructureChangedError(
                    f"'{tensor}' has {label.size} positions along dim {dim}, {before.size} were kept."
                )
            if label.size == 1 and old.shapes[tensor][dim] > 1:
                continue
            names.append((tensor, dim))
            olds.append(before)
            news.append(label)
    if not names:
        return {}
    which = np.repeat(np.arange(len(names)), [o.size for o in olds])
    left, right = np.concatenate(olds), np.concatenate(news)
    for a, b, text in ((right, left, "meets channels that were apart"), (left, right, "no longer meets its channel")):
        at = _first_clash(a, b)
        if at is not None and a is left:  # rare, so only now
            several = np.flatnonzero(~np.isin(left, _last_ones(old, left)))
            found = _first_clash(left[several], right[several])
            at = None if found is None else int(several[found])
        if at is not None:
            text += ": the model picks channels by literal positions or sizes"
            raise _changed(old, names[int(which[at])], int(left[at]), text)
    fresh = np.isin(right, new.pinned_classes) & ~np.isin(left, old.pinned_classes)
    if bool(fresh.any()):
        at = int(np.flatnonzero(fresh)[0])
        text = "reaches an operator or an output that it did not reach before"
        raise _changed(old, names[int(which[at])], int(left[at]), text)
    return dict(zip(right.tolist(), left.tolist(), strict=True))


def verify(old: Structure, new: Structure, kept: Kept) -> None:
    """Compare the structure after an edit with the one before, through the positions that were kept.

    Every channel of `new` must be exactly one channel of `old`: the same positions of the same tensors tied together.
    Code that picks channels by literal positions (`h[:, ::2]`) keeps valid shapes and reads other channels; only this
    shows it. Operators that work on part of a group's channels have to work on the same ones, and splits to have the
    same rows. The plain numbers that the arithmetic uses must be the same (`h / h.shape[1] ** 0.5` changes them).

    Args:
        old: structure before the edit.
        new: structure of the edited model.
        kept: tensor name -> dim -> kept old positions, in their new order; axes that are not named are whole.

    Raises:
        StructureChangedError: names the group and the tensor where they differ, or the operator and its number.
    """
    _verify_structure(old, new, kept)
    for mode, calls in old.scalars.items():
        error = changed_scalar(calls, new.scalars.get(mode, ()))
        if error is not None:
            raise error


def verify_up_to_scale(old: Structure, new: Structure, kept: Kept) -> tuple[TensorEdit, ...]:
    """Verify as `verify` does, but for numbers that can be made up for: `scores / keys.size(-1) ** 0.5`.

    Args:
        old: structure before the edit.
        new: structure of the edited model.
        kept: tensor name -> dim -> kept old positions, in their new order; axes that are not named are whole.

    Returns: edits of the edited model's tensors with which its scores are scaled as they were; () for most.

    Raises:
        StructureChangedError: as `verify`, for every other number.
    """
    _verify_structure(old, new, kept)
    return rescale_edits(old, new, kept)


def _verify_structure(old: Structure, new: Structure, kept: Kept) -> None:
    if set(old.shapes) != set(new.shapes):
        odd = sorted(set(old.shapes) ^ set(new.shapes))
        raise StructureChangedError(f"the edit changed the set of tensors: {', '.join(odd[:3])}.")
    old_of = verify_classes(old, new, kept)
    _verify_kept(old, new, old_of)
    error = changed_split(old, new, old_of) or changed_work(old, new, old_of)
    if error is not None:
        raise error


def _verify_kept(old: Structure, new: Structure, old_of: Mapping[int, int]) -> None:
    """Raise unless what is kept between passes carries the channels that are left of it, in the same order."""
    if not old.kept or not new.kept:
        return
    stays = np.array(sorted(set(old_of.values())), dtype=np.int64)
    every = np.unique(np.concatenate([labels for axes in old.classes.values() for labels in axes]))
    before = {item.path: item for item in old.kept}
    for item in new.kept:
        known = before.get(item.path)
        if known is None or known.labels.ndim != item.labels.ndim:
            continue
        wanted = labels_after(known, np.setdiff1d(every, stays))
        if wanted.shape != item.labels.shape:
            continue
        pairs = zip(item.labels.reshape(-1).tolist(), wanted.reshape(-1).tolist(), strict=True)
        if any(label in old_of and old_of[label] != before_it for label, before_it in pairs):
            name = name_of(item.path)
            raise StructureChangedError(f"'{name}', kept between passes, has its channels in another order.")
