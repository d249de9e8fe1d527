"""What is proposed for a group, and how far it may change what reads it: reductions and certificates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

CertificateKind = Literal["worst_case", "empirical", "accuracy"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SiteReduction:
    """z ~= z[keep] @ mix + offset at one site. mix: (kept, channels) float64; offset: (channels,) or None for zero."""

    mix: Tensor
    offset: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reduction:
    """Which channels of one group are kept, and how each site replaces the others.

    keep: (kept,) sorted int64. sites: key `module:weight:dim` -> SiteReduction. merge: (kept, channels), set only for
    pairwise merges, whose producers' first moments follow the chain rule: m'_k = sum_j merge[k, j] m_j.
    """

    group: str
    keep: Tensor
    sites: Mapping[str, SiteReduction]
    merge: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """One bound on a change, with its kind and its subject.

    kind "worst_case": absolute rms at the site for inputs of the stated norm; "empirical": relative rms at the site on
    `rows` rows; "accuracy": upper limit on the share of predictions that changed, at `confidence`
    (confidence 1.0 and population False: exact on those rows only).
    """

    kind: CertificateKind
    subject: str
    value: float
    rows: int = 0
    confidence: float = 1.0
    population: bool = False
    note: str = ""
