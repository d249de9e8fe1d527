"""Residual branches that may be emptied: what is left of one that has lost all its channels.

Holds: the branch, the stand-ins of its modules, and what is predicted of emptying it. Elsewhere: how a branch is found
(graph), the classes of the stand-ins (modules), carrying it out (surgery).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from apoptosis.records.reduction import Certificate, Reduction

StandInKind = Literal["constant", "branch", "empty", "pass", "written_out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StandIn:
    """What one module becomes when a branch is emptied; the module keeps its identity and gets another class.

    module: qualified name. kind: "constant": returns the constant for an input whose shape says how many positions
    there are; "branch": a whole module that returns the constant, in the shape of one of its arguments; "empty": gives
    a tensor that has no channels; "pass": returns its argument; "written_out": torch's transformer encoder or layer of
    it, which keeps its class and takes no fused pass any more.
    axis: of the channels in what it returns, counted from the last (-1). anchor: the argument (place, name) whose
    sizes along all other axes are those of what is returned; of "branch", and of "empty" where a module of several
    layers is replaced. extras: how many values beside the first are returned, all None; -1: a tensor is returned, no
    tuple. holder: name of the module inside that holds the constant ("branch"). after: names of dropouts inside that
    are applied to it ("branch"). dense: what is returned is written to in place, so that it needs memory of its own.
    """

    module: str
    kind: StandInKind
    axis: int = -1
    anchor: tuple[int, str] = (0, "")
    extras: int = -1
    holder: str = ""
    after: tuple[str, ...] = ()
    dense: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A part of the network that is constant once a group has lost all channels, and that meets the rest by addition.

    name: qualified name of the module that gives the constant: the last layer of the branch, or the norm behind it.
    groups: groups that go; the first `num_read` of them are read by that layer, the others lie in front of them.
    site: key of the layer's site. layer: qualified name of the layer; norm: of the BatchNorm behind it whose output the
    constant replaces, else None; norm_eps: its eps.
    bias: name of the parameter that the constant becomes; it is made where it is not there yet.
    stand_ins: what modules become, norms in front of the branch that nothing else reads included. removed: parameters
    and buffers that go.
    macs: multiply-adds of one forward pass on the example input that are saved at the widths of the capture.
    parameters: number of parameters that go.
    """

    name: str
    groups: tuple[str, ...]
    num_read: int
    site: str
    layer: str
    norm: str | None
    bias: str
    stand_ins: tuple[StandIn, ...]
    removed: tuple[str, ...]
    macs: float
    parameters: int
    norm_eps: float = 0.0

    @property
    def read(self) -> tuple[str, ...]:
        """The groups that the layer reads, whose means make the constant."""
        return self.groups[: self.num_read]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmptyProposal:
    """What emptying one branch would do.

    reductions: of the groups in `branch.read`, which keep nothing; hand them to `apply_reductions`, with no reduction
    of another group in `branch.groups`. error: relative rms of the site's output when only its mean is kept: 1.0 for
    every branch that varies, 0.0 where it is constant already. variance: E‖y - E y‖² of the layer's output y, summed
    over its channels, per position. Both are NaN where they were not asked for.
    rows: positions that were observed. certificates: by group.
    """

    branch: Branch
    reductions: tuple[Reduction, ...]
    error: float
    variance: float
    rows: int
    certificates: Mapping[str, tuple[Certificate, ...]]
