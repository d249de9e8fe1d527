"""Builds coupled channel groups and their sites from ties and pins.

Holds: groups of channels with the same signature, members, neurons, names. Elsewhere: how ties were found (rules),
which positions are one channel (classes.py), sites (consumers.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from apoptosis.graph.explain import Code, Reason
from apoptosis.graph.groups.classes import Classes, all_axes, numbered
from apoptosis.graph.groups.consumers import per_forward, product_sites, products_of, site_of
from apoptosis.graph.groups.couplings import with_conflicts
from apoptosis.graph.groups.heads import HeadDraft, head_drafts
from apoptosis.graph.groups.norms import norm_sites
from apoptosis.graph.groups.output_paths import through
from apoptosis.graph.trace.result import Consumer, TraceResult
from apoptosis.graph.trace.values import Axis
from apoptosis.records import FloatArray, Group, IntArray, LinearSite, Member, Neuron, Site


@dataclass(slots=True)
class _Draft:
    """A group being put together: positions (channels, m) per axis."""

    channels: IntArray
    positions: dict[Axis, IntArray]


def _drafts(trace: TraceResult, classes: Classes, rows: Mapping[int, IntArray]) -> list[_Draft]:
    group, ordered = numbered(trace, classes)
    drafts = [
        _Draft(rows[number].reshape(-1) if number in rows else ordered[group[ordered] == number], {})
        for number in range(int(group.max()) + 1)
    ]
    rank = np.zeros(group.size, dtype=np.int64)
    for draft in drafts:
        rank[draft.channels] = np.arange(draft.channels.size)
    for name, dim in all_axes(trace):
        info = trace.channel_ids.tensors[name]
        labels = classes.labels[info.bases[dim] : info.bases[dim] + info.shape[dim]]
        groups = group[labels]
        for number in np.unique(groups[groups >= 0]).tolist():
            index = np.flatnonzero(groups == number)
            index = index[np.argsort(rank[labels[index]], kind="stable")]
            draft = drafts[number]
            draft.positions[(name, dim)] = index.reshape(draft.channels.size, -1).astype(np.int64)
    return drafts


def _members(trace: TraceResult, places: Mapping[Axis, IntArray], consumed: frozenset[Axis]) -> tuple[Member, ...]:
    out = []
    order = list(trace.producers)
    for axis in sorted(places, key=lambda a: (a not in trace.producers, a in order and order.index(a))):
        if axis in consumed and axis not in trace.producers:
            continue
        name, dim = axis
        info, positions = trace.channel_ids.tensors[name], places[axis]
        macs = per_forward(trace.axis_macs[axis]) if axis in trace.axis_macs else 0.0
        out.append(
            Member(
                tensor=name,
                dim=dim,
                positions=positions,
                role="producer" if axis in trace.producers else "bias" if axis in trace.biases else "channelwise",
                is_buffer=info.is_buffer,
                macs=macs * positions.shape[1] / info.shape[dim],
            )
        )
    return tuple(out)


def _neuron(members: Sequence[Member], consumers: Sequence[Consumer]) -> Neuron | None:
    """Return how the channels are computed, if by one producer and one activation, the same at every site."""
    producers = [m for m in members if m.role == "producer"]
    biases = [m.tensor for m in members if m.role == "bias"]
    if len(producers) != 1 or len(biases) > 1 or any(m.positions.shape[1] != 1 for m in members):
        return None  # a channel of several rows (one of every block of a transposed convolution) is no single neuron
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


def _base_name(trace: TraceResult, draft: _Draft) -> str:
    for axis, module in trace.producers.items():
        if axis in draft.positions:
            return module or axis[0]
    axis = next(a for a in trace.listed if a in draft.positions)
    return axis[0].rpartition(".")[0] or axis[0]


def _single_block(trace: TraceResult, classes: Classes, draft: _Draft) -> Reason | None:
    """Return why a group is a single block that cannot be removed, though it owns many positions; None for others.

    Such a group is listed position by position, like any group that is never pruned.
    """
    if draft.channels.size > 1:
        return None
    reasons = (
        why for channel_id, why in trace.atomic_blocks if int(classes.labels[channel_id[0]]) == int(draft.channels[0])
    )
    reason = next(reasons, None)
    num = next((p.shape[1] for axis, p in draft.positions.items() if axis in trace.producers), 1)
    if reason is not None and all(p.size % num == 0 for p in draft.positions.values()):
        draft.channels = np.repeat(draft.channels, num)
        draft.positions = {axis: p.reshape(num, -1) for axis, p in draft.positions.items()}
    return reason


def _list_left_over(trace: TraceResult, classes: Classes) -> None:
    """List weights that are part of no group, so that they become groups of their own (computed weights)."""
    listed = {*trace.producers, *trace.listed}
    known = [trace.channel_ids.tensors[name].axis(dim) for name, dim in listed]
    covered = np.unique(classes.labels[np.concatenate(known)]) if known else np.zeros(0, dtype=np.int64)
    for name, info in trace.channel_ids.tensors.items():
        if info.is_buffer or len(info.shape) < 2 or any((name, dim) in listed for dim in range(len(info.shape))):
            continue
        if not bool(np.isin(classes.labels[info.ids()], covered).any()):
            trace.listed[name, 0] = name


def build_groups(trace: TraceResult, classes: Classes, rows: Mapping[int, IntArray]) -> tuple[Group, ...]:
    """Build the groups, in forward order; whole heads come last.

    rows: by group number, the classes of the rows that keep equally many channels (see grids.classify_rectangular).
    """
    _list_left_over(trace, classes)
    by_axis: dict[Axis, list[Consumer]] = {}
    for consumer in trace.consumers.values():
        by_axis.setdefault((consumer.weight, consumer.dim), []).append(consumer)
    consumed, pairs = frozenset(by_axis), products_of(trace)
    groups: list[Group] = []
    names: dict[str, int] = {}
    drafts = _drafts(trace, classes, rows)
    product_macs = _per_draft(trace.product_macs, classes, drafts)
    elements = _per_draft(trace.elements, classes, drafts)
    for index, draft in enumerate(drafts):
        single, base = _single_block(trace, classes, draft), _base_name(trace, draft)
        names[base] = names.get(base, 0) + 1
        name = base if names[base] == 1 else f"{base}#{names[base]}"
        readers = [(c, axis) for axis in draft.positions for c in by_axis.get(axis, ()) if c.module is not None]
        linear = tuple(site_of(trace, c, draft.positions[axis]) for c, axis in readers)
        sites: tuple[Site, ...] = linear
        number = int(classes.first_pin[draft.channels[0]])
        reason = through(trace, number, draft.positions) if number >= 0 else single
        if reason is None:
            products, why = product_sites(trace, classes, draft.channels, pairs)
            sites, reason = (*sites, *products), why or (None if sites or products else Code.NO_SITE())
            norms, why = norm_sites(trace, classes, draft.channels)
            sites, reason = (*sites, *norms), reason or why
        members = _members(trace, draft.positions, consumed)
        least = max([_min_channels(c, site) for (c, _), site in zip(readers, linear, strict=True)], default=1)
        if reason is None and least >= draft.channels.size > 1:
            reason = Code.DEPTHWISE()
        plain = reason is None and len(sites) == len(linear)
        groups.append(
            Group(
                name=name,
                num_channels=draft.channels.size,
                members=members,
                sites=sites,
                neuron=_neuron(members, [c for c, _ in readers]) if plain else None,
                pin=None if reason is None else reason.pin(name, draft.channels.size),
                rows=len(rows.get(index, draft.channels[None])),
                min_channels=least,
                product_macs=product_macs[index] / draft.channels.size,
                elements=elements[index] / draft.channels.size,
            )
        )
    heads = []
    for whole in head_drafts(trace):
        group = _head_group(trace, whole, by_axis)
        if group is not None:
            names[group.name] = names.get(group.name, 0) + 1
            again = names[group.name]
            heads.append(group if again == 1 else replace(group, name=f"{group.name}#{again}"))
    return with_conflicts(groups, heads)


def _per_draft(
    counted: Iterable[tuple[IntArray, str, float]], classes: Classes, drafts: Sequence[_Draft]
) -> list[float]:
    """Return for every draft the part of what was counted that falls with its channels.

    counted: (ids, mode, amount): evenly spread over the ids, of which 0 is no channel's.
    """
    draft_of = np.full(classes.first_pin.size, len(drafts), dtype=np.int64)
    for index, draft in enumerate(drafts):
        draft_of[draft.channels] = index
    total: dict[str, FloatArray] = {}
    for ids, mode, amount in ((ids, mode, amount) for ids, mode, amount in counted if ids.size):
        owners = np.where(ids == 0, len(drafts), draft_of[classes.labels[ids]])
        share = np.bincount(owners, minlength=len(drafts) + 1) / ids.size
        total[mode] = total.get(mode, 0.0) + amount * share
    return [per_forward({mode: float(found[i]) for mode, found in total.items()}) for i in range(len(drafts))]


def _min_channels(consumer: Consumer, site: LinearSite) -> int:
    """Return the fewest channels that a site allows: with blocks of one, a convolution would be a depthwise one."""
    blocks = consumer.blocks if site.kind == "conv_transpose" else 1  # the blocks of a convolution share their columns
    alone = site.columns.size == site.num_columns and site.columns.shape[1] == blocks
    return 2 if consumer.blocks > 1 and alone else 1


def _head_group(trace: TraceResult, draft: HeadDraft, by_axis: Mapping[Axis, Sequence[Consumer]]) -> Group | None:
    """Return a group whose channels are whole heads, or None where nothing reads them."""
    readers = [(c, axis) for axis in draft.positions for c in by_axis.get(axis, ()) if c.module is not None]
    sites = tuple(site_of(trace, c, draft.positions[axis]) for c, axis in readers)
    members = _members(trace, draft.positions, frozenset(by_axis))
    under_norm = {norm.weight for norm in trace.norms.values()}
    if not sites or not members or any(m.tensor in under_norm for m in members):
        return None
    return Group(name=f"{draft.module}:heads", num_channels=draft.num_heads, members=members, sites=sites)
