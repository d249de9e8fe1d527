"""Tensors of one size that meet channels in several places: zeros as wide as the heads of all layers, say.

Holds: which groups therefore keep the same share. Elsewhere: noticing such tensors (rules/broadcast.py),
other numbers that govern several groups (groups/ratio_constraints.py).

The elements of such a tensor are all the same along the axis, so that it matters how many there are, but not which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from apoptosis.graph.groups.classes import Classes
from apoptosis.graph.trace.findings import TraceResult
from apoptosis.records import Group, IntArray

Labels = Mapping[str, tuple[IntArray, ...]]


def same_extent(findings: TraceResult, groups: Sequence[Group], classes: Classes, labels: Labels) -> list[set[str]]:
    """Return the sets of groups whose channels meet one tensor that has a place for each of them.

    Args:
        findings: of all captures.
        groups: as found.
        classes: which channels are one.
        labels: class of every position, by tensor and dim.
    """
    shared = [ids for ids in findings.extents.values() if len(ids) > 1]
    if not shared:
        return []
    fine, whole = _owners(groups, labels)
    inside: dict[int, int] = {}
    for heads, inner, _ in (*findings.parts, *findings.heads):
        inside.update(zip(heads.tolist(), classes.labels[inner].tolist(), strict=True))
    out = []
    for ids in shared:
        names = set()
        for slot in np.unique(np.concatenate(ids)).tolist():
            names.add(whole.get(inside[slot]) if slot in inside else fine.get(int(classes.labels[slot])))
        out.append({name for name in names if name is not None})
    return [names for names in out if len(names) > 1]


def _owners(groups: Sequence[Group], labels: Labels) -> tuple[dict[int, str], dict[int, str]]:
    """Return the group of every class: of channels, and of whole heads."""
    fine: dict[int, str] = {}
    whole: dict[int, str] = {}
    for group in groups:
        for member in group.members:
            found = labels[member.tensor][member.dim][member.positions]
            coarse = bool((found != found[:, :1]).any())
            (whole if coarse else fine).update((int(label), group.name) for label in found.reshape(-1))
    return fine, whole
