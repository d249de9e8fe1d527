"""Channels: sets of slots that are removed together, and which of them are alike.

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
from apoptosis.graph.trace.findings import Consumer, TraceResult
from apoptosis.graph.trace.values import Axis
from apoptosis.records import IntArray


@dataclass(slots=True)
class Classes:
    """Channels: sets of slots that are removed together. labels: class of each slot; first_pin: per class, -1: none."""

    labels: IntArray
    first_pin: IntArray

    @property
    def pinned(self) -> IntArray:
        """The classes that are never removed, ascending."""
        return np.flatnonzero(self.first_pin >= 0).astype(np.int64)


def close(findings: TraceResult) -> None:
    """Pin what only the whole picture shows: weights in two roles, weights that others read too."""
    consumed = {(c.weight, c.dim) for c in findings.consumers.values()}
    owners = findings.slots.owners
    for name, dim in sorted(consumed & findings.producers.keys()):
        findings.pin(owners[name].axis(dim), Code.BOTH_ENDS(name=name))
    for consumer in findings.consumers.values():
        others = findings.reads[consumer.weight] - own_readers(consumer)
        if consumer.module is not None and others:
            why = Code.SHARED_WEIGHT(name=consumer.weight, module=consumer.module)
            findings.pin(owners[consumer.weight].axis(consumer.dim), why)
        if consumer.normal is not None:
            counts = [n for (name, _), n in findings.read_counts.items() if name == consumer.normal.gain]
            if max(counts, default=1) > 1:
                why = Code.SHARED_GAIN(name=consumer.normal.gain)
                findings.pin(owners[consumer.weight].axis(consumer.dim), why)


def own_readers(consumer: Consumer) -> set[str | None]:
    """Who may read a consumer's weight and bias without anybody else being concerned."""
    called = consumer.functional or consumer.conv is not None
    return {consumer.module, f"@{consumer.module}"} if called else {consumer.module}


def classify(findings: TraceResult, *, broadcast_ties: bool = True) -> Classes:
    """Unite tied slots and give every pinned class its first reason.

    broadcast_ties: whether what meets several channels by broadcasting is tied to all of them, and pins inside heads
        count (they do, but for whole heads).
    """
    size = findings.slots.num_slots
    ties = findings.ties + findings.broadcast_ties if broadcast_ties else findings.ties
    if ties:
        a = np.concatenate([t[0] for t in ties])
        b = np.concatenate([t[1] for t in ties])
        graph = coo_matrix((np.ones(a.size, dtype=np.int8), (a, b)), shape=(size, size))
        labels = connected_components(graph, directed=False)[1].astype(np.int64)
    else:
        labels = np.arange(size, dtype=np.int64)
    first = np.full(int(labels.max()) + 1, -1, dtype=np.int64)
    for number in range(len(findings.pins) - 1, -1, -1):
        if not broadcast_ties and number in findings.inner_pins:
            continue
        first[labels[findings.pins[number][0]]] = number
    return Classes(labels, first)


def hard_pins(findings: TraceResult, classes: Classes) -> npt.NDArray[np.bool_]:
    """Return which classes are pinned for whole heads, too."""
    found: npt.NDArray[np.bool_] = classes.first_pin >= 0
    if not findings.inner_pins:
        return found
    found = np.zeros(found.size, dtype=np.bool_)
    for number, (slots, _) in enumerate(findings.pins):
        if number not in findings.inner_pins:
            found[classes.labels[slots]] = True
    return found


def all_axes(findings: TraceResult) -> list[Axis]:
    """Return every axis of every parameter and buffer."""
    return [(name, dim) for name, owner in findings.slots.owners.items() for dim in range(len(owner.shape))]


def numbered(findings: TraceResult, classes: Classes) -> tuple[IntArray, IntArray]:
    """Give a number to the signature of every class that owns a position along a producing axis.

    Returns: group per class (-1: none), and the slots of the producing axes in forward order.
    """
    axes = all_axes(findings)
    listed = [*findings.producers, *(a for a in findings.owners if a not in findings.producers)]
    num = int(classes.labels.max()) + 1
    weights = np.random.default_rng(0).integers(1, 2**63, size=len(axes) + 1, dtype=np.uint64)
    slot_weights = np.zeros(classes.labels.size, dtype=np.uint64)
    for weight, (name, dim) in zip(weights, axes, strict=False):
        owner = findings.slots.owners[name]
        slot_weights[owner.bases[dim] : owner.bases[dim] + owner.shape[dim]] = weight
    signature = np.zeros(num, dtype=np.uint64)
    np.add.at(signature, classes.labels, slot_weights)
    signature[classes.pinned] += weights[-1]
    group = np.full(num, -1, dtype=np.int64)
    parts = [findings.slots.owners[name].axis(dim) for name, dim in listed]
    slots = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    _, first = np.unique(classes.labels[slots], return_index=True)
    ordered = classes.labels[slots[np.sort(first)]]
    _, seen, number = np.unique(signature[ordered], return_index=True, return_inverse=True)
    group[ordered] = np.argsort(np.argsort(seen))[number]  # numbered in the order in which they come
    return group, ordered
