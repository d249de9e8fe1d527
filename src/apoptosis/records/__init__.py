"""The frozen records that each stage hands to the next; they hold names, numbers and tensors, never live modules.

Holds: data without behaviour (a few derived properties at most). Elsewhere: anything that computes.
"""

from apoptosis.records.branch import Branch, EmptyProposal, StandIn, StandInKind
from apoptosis.records.calls import (
    Count,
    Follow,
    IntArray,
    Kept,
    PartialOp,
    ScalarOperands,
    Seen,
    Split,
    places_left,
)
from apoptosis.records.edits import ColumnFold, OffsetFold, RowScale, TensorEdit
from apoptosis.records.outputs import ModuleOutput
from apoptosis.records.reduction import Certificate, CertificateKind, Reduction, SiteReduction
from apoptosis.records.structure import (
    Convolution,
    FloatArray,
    Frozen,
    Group,
    LinearSite,
    Member,
    Neuron,
    Normal,
    NormSite,
    NormStrategy,
    NormWidths,
    Pin,
    ProductSite,
    Site,
    SiteKind,
    Structure,
)
from apoptosis.records.timings import Curve, Timings

__all__ = [
    "Branch",
    "Certificate",
    "CertificateKind",
    "ColumnFold",
    "Convolution",
    "Count",
    "Curve",
    "EmptyProposal",
    "FloatArray",
    "Follow",
    "Frozen",
    "Group",
    "IntArray",
    "Kept",
    "LinearSite",
    "Member",
    "ModuleOutput",
    "Neuron",
    "NormSite",
    "NormStrategy",
    "NormWidths",
    "Normal",
    "OffsetFold",
    "PartialOp",
    "Pin",
    "ProductSite",
    "Reduction",
    "RowScale",
    "ScalarOperands",
    "Seen",
    "Site",
    "SiteKind",
    "SiteReduction",
    "Split",
    "StandIn",
    "StandInKind",
    "Structure",
    "TensorEdit",
    "Timings",
    "places_left",
]
