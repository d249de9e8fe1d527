"""Channels: sets of ids that are removed together, and which of them are alike.

Holds: the union of ties, the first pin of every channel, what only the whole picture pins, and the number of the
group that every channel belongs to. Elsewhere: what a group consists of (groups/build.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from apoptosis.graph.explain import Code
from apoptosis.graph.trace.result import Consumer, TraceResult
from apoptosis.graph.trace.values import Axis
from apoptosis.records import IntArray


@dataclass(slots=True)
class Classes:
    """Channels: sets of ids that are removed together. labels: class of each id; first_pin: per class, -1: none."""

    labels: IntArray
    first_pin: IntArray

    @property
    def pinned(self) -> IntArray:
        """The classes that are never removed, ascending."""
        return np.flatnonzero(self.first_pin >= 0).astype(np.int64)


def close(trace: TraceResult) -> None:
    """Pin weights in two roles, and weights and gains that have further readers: known once all captures are done."""
    consumed = {(c.weight, c.dim) for c in trace.consumers.values()}
    tensors = trace.channel_ids.tensors
    for name, dim in sorted(consumed & trace.producers.keys()):
        trace.pin(tensors[name].axis(dim), Code.BOTH_ENDS(name=name))
    for consumer in trace.consumers.values():
        others = trace.reads[consumer.weight] - own_readers(consumer)
        if consumer.module is not None and others:
            why = Code.SHARED_WEIGHT(name=consumer.weight, module=consumer.module)
            trace.pin(tensors[consumer.weight].axis(consumer.dim), why)
        if consumer.normal is not None:
            counts = [n for (name, _), n in trace.read_counts.items() if name == consumer.normal.gain]
            if max(counts, default=1) > 1:
                why = Code.SHARED_GAIN(name=consumer.normal.gain)
                trace.pin(tensors[consumer.weight].axis(consumer.dim), why)


def own_readers(consumer: Consumer) -> set[str | None]:
    """Return the readers of a consumer's weight and bias that are the consumer itself."""
    called = consumer.functional or consumer.conv is not None
    return {consumer.module, f"@{consumer.module}"} if called else {consumer.module}


def classify(trace: TraceResult, *, broadcast_ties: bool = True) -> Classes:
    """Unite tied ids and give every pinned class its first reason.

    broadcast_ties: whether a position that is broadcast over several channels is tied to all of them, and pins inside
        of heads count; False for whole heads.
    """
    size = trace.channel_ids.num_ids
    ties = trace.ties + trace.broadcast_ties if broadcast_ties else trace.ties
    if ties:
        a = np.concatenate([t[0] for t in ties])
        b = np.concatenate([t[1] for t in ties])
        graph = coo_matrix((np.ones(a.size, dtype=np.int8), (a, b)), shape=(size, size))
        labels = connected_components(graph, directed=False)[1].astype(np.int64)
    else:
        labels = np.arange(size, dtype=np.int64)
    first = np.full(int(labels.max()) + 1, -1, dtype=np.int64)
    for number in range(len(trace.pins) - 1, -1, -1):
        if not broadcast_ties and number in trace.inner_pins:
            continue
        first[labels[trace.pins[number][0]]] = number
    return Classes(labels, first)


def hard_pins(trace: TraceResult, classes: Classes) -> npt.NDArray[np.bool_]:
    """Return which classes are pinned even for whole heads."""
    found: npt.NDArray[np.bool_] = classes.first_pin >= 0
    if not trace.inner_pins:
        return found
    found = np.zeros(found.size, dtype=np.bool_)
    for number, (ids, _) in enumerate(trace.pins):
        if number not in trace.inner_pins:
            found[classes.labels[ids]] = True
    return found


def all_axes(trace: TraceResult) -> list[Axis]:
    """Return every axis of every parameter and buffer."""
    return [(name, dim) for name, info in trace.channel_ids.tensors.items() for dim in range(len(info.shape))]


def numbered(trace: TraceResult, classes: Classes) -> tuple[IntArray, IntArray]:
    """Give a number to the signature of every class that owns a position along a producing axis.

    Returns: group per class (-1: none), and the ids of the producing axes in forward order.
    """
    axes = all_axes(trace)
    listed = [*trace.producers, *(a for a in trace.listed if a not in trace.producers)]
    num = int(classes.labels.max()) + 1
    weights = np.random.default_rng(0).integers(1, 2**63, size=len(axes) + 1, dtype=np.uint64)
    id_weights = np.zeros(classes.labels.size, dtype=np.uint64)
    for weight, (name, dim) in zip(weights, axes, strict=False):
        info = trace.channel_ids.tensors[name]
        id_weights[info.bases[dim] : info.bases[dim] + info.shape[dim]] = weight
    signature = np.zeros(num, dtype=np.uint64)
    np.add.at(signature, classes.labels, id_weights)
    signature[classes.pinned] += weights[-1]
    group = np.full(num, -1, dtype=np.int64)
    parts = [trace.channel_ids.tensors[name].axis(dim) for name, dim in listed]
    ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    _, first = np.unique(classes.labels[ids], return_index=True)
    ordered = classes.labels[ids[np.sort(first)]]
    _, seen, number = np.unique(signature[ordered], return_index=True, return_inverse=True)
    group[ordered] = np.argsort(np.argsort(seen))[number]  # numbered in the order in which they come
    return group, ordered
