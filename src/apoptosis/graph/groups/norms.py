"""Norms over channels as consumer sites.

Holds: sites of norms that are followed as one operator (rules/norm_modules.py). Elsewhere: which modules these are and
what an event makes of them (apoptosis.modules.norms, surgery.norms).
"""

from __future__ import annotations

import numpy as np

from apoptosis.graph.explain import Code, Reason
from apoptosis.graph.groups.classes import Classes
from apoptosis.graph.trace.result import Norm, TraceResult
from apoptosis.records import IntArray, NormSite


def norm_sites(trace: TraceResult, classes: Classes, channels: IntArray) -> tuple[tuple[NormSite, ...], Reason | None]:
    """Return the sites at which norms read the channels of one group, or why that pins the group.

    channels: classes of the group's channels, in order.
    """
    rank = np.full(int(classes.labels.max()) + 1, -1, dtype=np.int64)
    rank[channels] = np.arange(channels.size)
    found = []
    for norm in trace.norms.values():
        index = rank[classes.labels[norm.ids]]
        if bool((index < 0).all()):
            continue
        if index.size != channels.size or bool((np.sort(index) != np.arange(channels.size)).any()):
            return (), Code.NORM_SEVERAL()
        columns = np.argsort(index, kind="stable").astype(np.int64)[:, None]
        found.append(_site(norm, columns))
    return tuple(found), None


def _site(norm: Norm, columns: IntArray) -> NormSite:
    return NormSite(
        module=norm.module,
        weight=norm.weight,
        dim=norm.dim,
        columns=columns,
        input_columns=columns,
        num_columns=len(columns),
        strategy=norm.strategy,
        channels_first=norm.first,
    )
