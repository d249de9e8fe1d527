"""Which channels every operator works on, and whether an edit made it work on others.

Holds: the record of calls, and the comparison of calls and of splits before and after an edit. Elsewhere:
which channel a column reads (verification.py), plain numbers (scalars.py).

Code that picks channels by literal positions and treats them apart (`gelu(h[:, :5])`, `h[:, 0] *= 2`) keeps valid
shapes after an edit, and every column still meets its channel; only what happened on the way differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from apoptosis.errors import StructureChangedError
from apoptosis.graph.explain import place_of
from apoptosis.graph.trace.result import TraceResult
from apoptosis.graph.trace.tracer import Call
from apoptosis.records import Group, IntArray, PartialOp, Split, Structure

_FEW = 1 << 16  # calls on more ids are not recorded


def note_work(call: Call) -> None:
    """Note the channels among the operands of one call."""
    tracer = call.tracer
    if isinstance(tracer.module, nn.MultiheadAttention):  # runs other operators once it is narrower
        return
    found = []
    for tensor in call.tensors():
        value = tracer.memory.recorded(tensor) if tracer.view(tensor) is None else None
        if value is not None and value.has_channels and value.ids.size <= _FEW:
            found.append(_distinct_ids(tracer.trace, value.ids))
    if found:
        ids = found[0] if len(found) == 1 else np.unique(np.concatenate(found))
        tracer.trace.operations[tracer.mode].append((call.label, tracer.module_name, tracer.where(), ids))


def _distinct_ids(trace: TraceResult, ids: IntArray) -> IntArray:
    """Return the different ids, ascending; what moves through many operators unchanged is looked at once."""
    known = trace.distinct.get(id(ids))
    if known is None:
        known = trace.distinct[id(ids)] = (ids, np.unique(ids))  # held, so that the address stays its own
    return known[1]


def partial_work(
    trace: TraceResult, groups: Sequence[Group], labels: IntArray, classes: Mapping[str, tuple[IntArray, ...]]
) -> dict[str, tuple[PartialOp, ...]]:
    """Return per mode the calls that worked on part of a group that may shrink."""
    group_of = np.full(int(labels.max()) + 1, -1, dtype=np.int64)
    sizes: list[int] = []
    for group in groups:
        member = group.members[0] if group.pin is None and group.members else None
        if member is not None and not _is_coarse(classes[member.tensor][member.dim][member.positions]):
            group_of[classes[member.tensor][member.dim][member.positions[:, 0]]] = len(sizes)
            sizes.append(group.num_channels)
    out: dict[str, tuple[PartialOp, ...]] = {}
    for mode, calls in trace.operations.items():
        kept = []
        for operator, module, where, ids in calls:
            found = np.unique(labels[ids[ids != 0]])
            found = found[group_of[found] >= 0]
            if not found.size:
                continue
            counts = np.bincount(group_of[found], minlength=len(sizes))
            if bool(((counts > 0) & (counts < np.array(sizes))).any()):
                kept.append(PartialOp(operator=operator, classes=found, module=module, where=where))
        out[mode] = tuple(kept)
    return out


def _is_coarse(classes: IntArray) -> bool:
    """Whether the channels of a group are whole heads, of several classes each."""
    return bool((classes != classes[:, :1]).any())


def changed_work(old: Structure, new: Structure, old_of: Mapping[int, int]) -> StructureChangedError | None:
    """Return an error that says which operator works on other channels than before, or None.

    old_of: class after the edit -> before.
    """
    left = frozenset(old_of.values())
    for mode, calls in old.partial_ops.items():
        after = new.partial_ops.get(mode, ())
        before = [(call, frozenset(call.classes.tolist()) & left) for call in calls]
        now = [(call, frozenset(old_of[c] for c in call.classes.tolist() if c in old_of)) for call in after]
        pairs = zip(before, now, strict=False)
        odd = next((call for (call, expected), (_, found) in pairs if expected != found), None)
        if odd is None and len(before) != len(now):
            odd = (before if len(before) > len(now) else now)[min(len(before), len(now))][0]
        if odd is not None:
            return _changed("operator " + odd.operator, "works on other channels than before", odd)
    return None


def changed_split(old: Structure, new: Structure, old_of: Mapping[int, int]) -> StructureChangedError | None:
    """Return an error that says which split has rows of other channels than before, or None."""
    left = frozenset(old_of.values())
    expected: dict[str, set[tuple[tuple[int, ...], ...]]] = {}
    for split in old.splits:
        expected.setdefault(split.module, set()).update(_forms(split, {c: c for c in left}))
    for split in new.splits:
        if split.classes.size > 1 and split.module in expected and not _forms(split, old_of) & expected[split.module]:
            return _changed("the rows into which channels are split", "hold others than before", split)
    return None


def _forms(split: Split, old_of: Mapping[int, int]) -> set[tuple[tuple[int, ...], ...]]:
    """Write the grid in classes before the edit, without what is gone; one column is written like one row.

    The order inside a row does not count: shuffled rows that are left with one column each lie in another one, and what
    meets at every place is compared by itself.
    """
    rows = [tuple(sorted(old_of[c] for c in row if c in old_of)) for row in split.classes.tolist()]
    rows = [row for row in rows if row]
    if all(len(row) == 1 for row in rows):
        rows = [tuple(sorted(row[0] for row in rows))]
    return {tuple(dict.fromkeys(rows))}


def _changed(what: str, how: str, at: PartialOp | Split) -> StructureChangedError:
    text = f"{what}{place_of(at.module, at.where)} {how}: the model picks channels by literal positions or sizes."
    return StructureChangedError(text, module=at.module, places=(at.where,))
