"""Whole heads as channels of their own, beside the channels inside them.

Holds: which positions of which tensors belong to every head. Elsewhere: groups and sites (groups/build.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from apoptosis.graph.groups.classes import all_axes, classify
from apoptosis.graph.trace.result import TraceResult
from apoptosis.graph.trace.values import Axis
from apoptosis.records import IntArray


@dataclass(slots=True)
class HeadDraft:
    """The heads of one attention: `module` computes it; positions: (heads, m) per axis of a tensor."""

    module: str
    num_heads: int
    positions: dict[Axis, IntArray]


def head_drafts(trace: TraceResult) -> list[HeadDraft]:
    """Return the heads that may be removed as a whole, in forward order.

    Heads that share a channel are one (the queries of one key in grouped-query attention). Ties by broadcasting count
    where they lie within one head (its gain); what several heads share (a rotary table) is kept.
    """
    held = [*trace.heads, *trace.parts]
    if not held:
        return []
    classes = classify(trace, broadcast_ties=False)
    outer = np.concatenate([classes.labels[a] for a, _, _ in held])
    inner = np.concatenate([classes.labels[b] for _, b, _ in held])
    size = classes.first_pin.size
    joined = coo_matrix((np.ones(outer.size, dtype=np.int8), (outer, inner)), shape=(size, size))
    head_of = connected_components(joined, directed=False)[1].astype(np.int64)
    head_of, involved = _with_broadcasts(trace, classes.labels, head_of, np.unique(np.concatenate([outer, inner])))
    pinned = set(head_of[involved[classes.first_pin[involved] >= 0]].tolist())
    places = _places(trace, classes.labels, head_of, set(head_of[involved].tolist()) - pinned)
    module_of: dict[int, str] = {}
    for ids, _, module in held:
        for head in head_of[classes.labels[ids]].tolist():
            module_of.setdefault(head, module)
    alike: dict[tuple[object, ...], list[int]] = {}
    for head, axes in places.items():
        signature: tuple[object, ...] = (module_of[head], *((axis, len(found)) for axis, found in sorted(axes.items())))
        alike.setdefault(signature, []).append(head)
    out = []
    for key, heads in alike.items():
        if len(heads) > 1:
            ordered = sorted(heads, key=lambda head: min(found[0] for found in places[head].values()))
            axes = places[heads[0]]
            positions = {axis: np.array([places[head][axis] for head in ordered], dtype=np.int64) for axis in axes}
            out.append(HeadDraft(str(key[0]), len(heads), positions))
    return out


def _with_broadcasts(
    trace: TraceResult, labels: IntArray, head_of: IntArray, involved: IntArray
) -> tuple[IntArray, IntArray]:
    """Add to each head what is broadcast over channels of that head only.

    head_of: number of the head per class. involved: classes that belong to heads. Returns: both, with what was added.
    """
    if not trace.broadcast_ties:
        return head_of, involved
    pairs = np.concatenate([labels[np.stack(tie)] for tie in trace.broadcast_ties], axis=1)
    pairs = np.unique(np.concatenate([pairs, pairs[::-1]], axis=1), axis=1)
    while True:
        inside = np.zeros(head_of.size, dtype=np.bool_)
        inside[involved] = True
        one, other = pairs[:, ~inside[pairs[0]]]
        heads = np.where(inside[other], head_of[other], -1)
        lowest, highest = np.full((2, head_of.size), -1, dtype=np.int64)
        lowest[one] = heads.max(initial=-1) + 1
        np.minimum.at(lowest, one, heads)
        np.maximum.at(highest, one, heads)
        added = np.flatnonzero((lowest == highest) & (lowest >= 0))
        if not added.size:
            return head_of, involved
        head_of = head_of.copy()
        head_of[added] = lowest[added]
        involved = np.union1d(involved, added)


def _places(
    trace: TraceResult, labels: IntArray, head_of: IntArray, wanted: set[int]
) -> dict[int, dict[Axis, list[int]]]:
    """Positions by head and axis."""
    out: dict[int, dict[Axis, list[int]]] = {}
    is_wanted = np.zeros(int(head_of.max(initial=-1)) + 1, dtype=np.bool_)
    is_wanted[list(wanted)] = True
    for name, dim in all_axes(trace):
        info = trace.channel_ids.tensors[name]
        heads = head_of[labels[info.bases[dim] : info.bases[dim] + info.shape[dim]]]
        positions = np.flatnonzero(is_wanted[heads])
        order = np.argsort(heads[positions], kind="stable")
        own, positions = heads[positions][order], positions[order]
        starts = np.flatnonzero(np.diff(own, prepend=-1))
        for head, found in zip(own[starts].tolist(), np.split(positions, starts[1:]), strict=False):
            out.setdefault(head, {})[name, dim] = found.tolist()
    return out
