"""From ties and pins to coupled channel groups and consumer sites.

Lives here: the union of everything found, channels with the same signature as groups, members, sites, neurons.
Does not live here: how it was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from apoptosis.graph.findings import Consumer, Findings, Reason
from apoptosis.graph.values import Axis
from apoptosis.records import Group, IntArray, Member, Neuron, Pin, Site

_NO_SITE = Reason("no consumer site reads these channels")
_BOTH = "'{}' is producer and consumer along the same axis"
_SHARED = "'{}' is the weight of '{}' and is read elsewhere too"


@dataclass(slots=True)
class Classes:
    """Channels: sets of slots that are removed together. labels: class of each slot; first_pin: per class, -1: none."""

    labels: IntArray
    first_pin: IntArray

    @property
    def pinned(self) -> IntArray:
        """The classes that are never removed, ascending."""
        return np.flatnonzero(self.first_pin >= 0).astype(np.int64)


def close(findings: Findings) -> None:
    """Pin what only the whole picture shows: weights in two roles, weights that others read too."""
    consumed = {(c.weight, c.dim) for c in findings.consumers.values()}
    owners = findings.slots.owners
    for name, dim in sorted(consumed & findings.producers.keys()):
        findings.pin(owners[name].axis(dim), Reason(_BOTH.format(name)))
    for consumer in findings.consumers.values():
        others = findings.reads[consumer.weight] - {consumer.module}
        if consumer.module is not None and others:
            text = _SHARED.format(consumer.weight, consumer.module)
            findings.pin(owners[consumer.weight].axis(consumer.dim), Reason(text))


def classify(findings: Findings) -> Classes:
    """Unite tied slots and give every pinned class its first reason."""
    size = findings.slots.num_slots
    if findings.ties:
        a = np.concatenate([t[0] for t in findings.ties])
        b = np.concatenate([t[1] for t in findings.ties])
        graph = coo_matrix((np.ones(a.size, dtype=np.int8), (a, b)), shape=(size, size))
        labels = connected_components(graph, directed=False)[1].astype(np.int64)
    else:
        labels = np.arange(size, dtype=np.int64)
    first = np.full(int(labels.max()) + 1, -1, dtype=np.int64)
    for number in range(len(findings.pins) - 1, -1, -1):
        first[labels[findings.pins[number][0]]] = number
    return Classes(labels, first)


def _axes(findings: Findings) -> list[Axis]:
    return [(name, dim) for name, owner in findings.slots.owners.items() for dim in range(len(owner.shape))]


def _signatures(findings: Findings, axes: Sequence[Axis], classes: Classes) -> tuple[IntArray, IntArray]:
    """Give a number to the signature of every class that owns a position along a producing axis.

    Returns: group per class (-1: none), and the slots of the producing axes in forward order.
    """
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


@dataclass(slots=True)
class _Draft:
    """A group being put together: positions (channels, m) per axis."""

    channels: IntArray
    positions: dict[Axis, IntArray]


def _drafts(findings: Findings, axes: Sequence[Axis], classes: Classes) -> list[_Draft]:
    group, ordered = _signatures(findings, axes, classes)
    drafts = [_Draft(ordered[group[ordered] == number], {}) for number in range(int(group.max()) + 1)]
    rank = np.zeros(group.size, dtype=np.int64)
    for draft in drafts:
        rank[draft.channels] = np.arange(draft.channels.size)
    for name, dim in axes:
        owner = findings.slots.owners[name]
        labels = classes.labels[owner.bases[dim] : owner.bases[dim] + owner.shape[dim]]
        groups = group[labels]
        for number in np.unique(groups[groups >= 0]).tolist():
            index = np.flatnonzero(groups == number)
            index = index[np.argsort(rank[labels[index]], kind="stable")]
            draft = drafts[number]
            draft.positions[(name, dim)] = index.reshape(draft.channels.size, -1).astype(np.int64)
    return drafts


def _input_columns(consumer: Consumer, columns: IntArray, num_columns: int) -> IntArray:
    if consumer.kind != "conv" or consumer.blocks == 1:
        return columns
    blocks = np.arange(consumer.blocks, dtype=np.int64) * num_columns
    return (columns[:, None, :] + blocks[None, :, None]).reshape(columns.shape[0], -1)


def _norm_of(findings: Findings, module: str) -> str | None:
    """Return the BatchNorm that alone reads a module's output, and reads nothing else."""
    readers = findings.readers.get(module, set())
    if len(readers) != 1:
        return None
    norm = next(iter(readers))
    statistics = f"{norm}.running_mean"
    if findings.normalised.get(norm) != {module} or statistics not in findings.slots.owners:
        return None
    return norm if findings.reads[statistics] <= {norm} else None


def _site(findings: Findings, consumer: Consumer, columns: IntArray) -> Site:
    num_columns = findings.slots.owners[consumer.weight].shape[consumer.dim]
    bias = consumer.bias
    if bias is not None and findings.reads[bias] - {consumer.module}:
        bias = None  # another reads it too: nothing may be folded into it
    return Site(
        module=str(consumer.module),
        kind=consumer.kind,
        weight=consumer.weight,
        dim=consumer.dim,
        bias=bias,
        columns=columns,
        input_columns=_input_columns(consumer, columns, num_columns),
        num_columns=num_columns,
        taps=consumer.taps,
        zero_padded=consumer.zero_padded,
        norm=_norm_of(findings, str(consumer.module)),
        dropout=consumer.dropout,
        macs=_per_forward(consumer.macs) * columns.shape[1] / num_columns,
    )


def _per_forward(macs: dict[str, float]) -> float:
    """Multiply-adds of one forward pass: in training mode, or in evaluation where only that computes it."""
    return macs.get("training", 0.0) or macs.get("evaluation", 0.0)


def _members(findings: Findings, draft: _Draft, consumed: frozenset[Axis]) -> tuple[Member, ...]:
    out = []
    order = list(findings.producers)
    for axis in sorted(draft.positions, key=lambda a: (a not in findings.producers, a in order and order.index(a))):
        if axis in consumed and axis not in findings.producers:
            continue
        name, dim = axis
        owner, positions = findings.slots.owners[name], draft.positions[axis]
        macs = _per_forward(findings.axis_macs[axis]) if axis in findings.axis_macs else 0.0
        out.append(
            Member(
                tensor=name,
                dim=dim,
                positions=positions,
                role="producer" if axis in findings.producers else "bias" if axis in findings.biases else "channelwise",
                is_buffer=owner.is_buffer,
                macs=macs * positions.shape[1] / owner.shape[dim],
            )
        )
    return tuple(out)


def _neuron(members: Sequence[Member], consumers: Sequence[Consumer]) -> Neuron | None:
    """Say how the group's channels are computed: one producer, one activation, the same at every site."""
    producers = [m for m in members if m.role == "producer"]
    biases = [m.tensor for m in members if m.role == "bias"]
    if len(producers) != 1 or producers[0].positions.shape[1] != 1 or len(biases) > 1:
        return None
    key = (producers[0].tensor, producers[0].dim)
    found = [paths.get(key) for consumer in consumers for paths in consumer.inputs]
    first = found[0] if found else None
    if first is None:
        return None
    for path in found:
        if path is None or (path.norm, path.activation, path.args, path.slopes) != (
            first.norm, first.activation, first.args, first.slopes
        ):  # fmt: skip
            return None
    known = {
        key[0],
        *biases,
        first.slopes,
        *(f"{first.norm}.{leaf}" for leaf in _NORM_LEAVES if first.norm is not None),
    }
    if any(m.tensor not in known for m in members):
        return None
    return Neuron(
        weight=key[0],
        dim=key[1],
        bias=biases[0] if biases else None,
        norm=first.norm,
        activation=first.activation,
        args=first.args,
        slopes=first.slopes,
        max_pool=any(path is not None and path.max_pool for path in found),
    )


_NORM_LEAVES = ("weight", "bias", "running_mean", "running_var")


def _base_name(findings: Findings, draft: _Draft) -> str:
    for axis, module in findings.producers.items():
        if axis in draft.positions:
            return module or axis[0]
    axis = next(a for a in findings.owners if a in draft.positions)
    return axis[0].rpartition(".")[0] or axis[0]


def _pin(name: str, num_channels: int, reason: Reason) -> Pin:
    return Pin(group=name, num_channels=num_channels, reason=reason.text, where=reason.where, remedy=reason.remedy)


def build_groups(findings: Findings, classes: Classes) -> tuple[Group, ...]:
    """Put the groups together, in forward order."""
    axes = _axes(findings)
    by_axis: dict[Axis, list[Consumer]] = {}
    for consumer in findings.consumers.values():
        by_axis.setdefault((consumer.weight, consumer.dim), []).append(consumer)
    consumed = frozenset(by_axis)
    groups: list[Group] = []
    names: dict[str, int] = {}
    for draft in _drafts(findings, axes, classes):
        base = _base_name(findings, draft)
        names[base] = names.get(base, 0) + 1
        name = base if names[base] == 1 else f"{base}#{names[base]}"
        readers = [(c, axis) for axis in draft.positions for c in by_axis.get(axis, ()) if c.module is not None]
        number = int(classes.first_pin[draft.channels[0]])
        reason = findings.pins[number][1] if number >= 0 else None if readers else _NO_SITE
        members = _members(findings, draft, consumed)
        groups.append(
            Group(
                name=name,
                num_channels=draft.channels.size,
                members=members,
                sites=tuple(_site(findings, c, draft.positions[axis]) for c, axis in readers),
                neuron=None if reason else _neuron(members, [c for c, _ in readers]),
                pin=None if reason is None else _pin(name, draft.channels.size, reason),
            )
        )
    return tuple(groups)
