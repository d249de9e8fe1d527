"""What the captures of a model add up to, before channels are counted: ties, pins, roles and reads.

Lives here: the store that rules write to (one for all captures of a model). Does not live here: any decision about
what becomes of it (groups.py).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from apoptosis.graph.slots import Slots
from apoptosis.graph.values import Axis, Paths
from apoptosis.records import IntArray, ScalarOperands, SiteKind


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something is pinned: one sentence, the user's line, the remedy."""

    text: str
    where: str = ""
    remedy: str = ""


@dataclass(slots=True)
class Consumer:
    """One weight axis that is contracted with channels by one module; gathered over calls and captures.

    module: None when no plain module does it. blocks: number of blocks of a grouped convolution.
    inputs: what is known of the input at each call. macs: per capture mode.
    """

    module: str | None
    kind: SiteKind
    weight: str
    dim: int
    bias: str | None
    taps: int = 1
    zero_padded: bool = False
    blocks: int = 1
    dropout: float = 0.0
    inputs: list[Paths] = field(default_factory=list)
    macs: dict[str, float] = field(default_factory=lambda: defaultdict(float))


@dataclass(slots=True)
class Findings:
    """Everything that the rules found out. Arrays hold slots."""

    slots: Slots
    ties: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    pins: list[tuple[IntArray, Reason]] = field(default_factory=list)
    producers: dict[Axis, str] = field(default_factory=dict)
    owners: dict[Axis, str] = field(default_factory=dict)
    biases: set[Axis] = field(default_factory=set)
    consumers: dict[tuple[str | None, str, int], Consumer] = field(default_factory=dict)
    axis_macs: dict[Axis, dict[str, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    macs: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    reads: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    read_order: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    readers: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    normalised: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    notes: list[str] = field(default_factory=list)
    scalars: dict[str, list[ScalarOperands]] = field(default_factory=lambda: defaultdict(list))

    def tie(self, a: IntArray, b: IntArray) -> None:
        """Record that slots which meet (after broadcasting, both not 0) are removed together."""
        if a.shape != b.shape:
            a, b = np.broadcast_arrays(a, b)
        a, b = a.reshape(-1), b.reshape(-1)
        both = (a != 0) & (b != 0)
        if not bool(both.all()):
            a, b = a[both], b[both]
        if a.size:
            self.ties.append((a, b))

    def pin(self, slots: IntArray, reason: Reason) -> None:
        """Record that the channels of these slots are never removed; zeros are passed over."""
        slots = slots.reshape(-1)
        slots = slots[slots != 0]
        if slots.size:
            self.pins.append((slots, reason))
