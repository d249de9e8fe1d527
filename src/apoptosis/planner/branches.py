"""What emptying residual branches would do: the constant that is left, the error, and what is saved.

Holds: one proposal for every branch that may be emptied and was observed. Elsewhere: which branches there are (graph),
which are worth it (the caller), carrying it out (surgery).
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from apoptosis.criteria import relative_error
from apoptosis.criteria.views import moments_of, offset_of, output_variance
from apoptosis.graph.explain import may_go_whole
from apoptosis.planner.views import GroupData, Observations, make_view
from apoptosis.records import Branch, Certificate, EmptyProposal, Group, Reduction, SiteReduction, Structure

ROUNDOFF = 1e-6
"""Relative rms that stands for tolerance 0: single precision."""
_NOTE = "of the output of a branch of which the mean is kept and nothing else"


def branches_of(structure: Structure) -> tuple[Branch, ...]:
    """Return the residual branches that may be emptied, in forward order.

    Those that read pinned groups are left out, but for groups of which the model's code cannot lose a part, because it
    has sizes written out: it may well lose all.
    """
    pinned = {group.name for group in structure.groups if not may_go_whole(group.pin)}
    found = {group.branch.name: group.branch for group in structure.groups if group.branch is not None}
    return tuple(branch for branch in found.values() if not pinned.intersection(branch.read))


def may_be_empty(structure: Structure, least: Mapping[str, int]) -> frozenset[str]:
    """Return the names of the groups that may lose all their channels.

    Args: least: channels that were asked to stay; a branch of which a group keeps some is not emptied.
    """
    kept = {name for name, width in least.items() if width}
    branches = [branch for branch in branches_of(structure) if not kept.intersection(branch.groups)]
    return frozenset(name for branch in branches for name in branch.groups)


def groups_to_observe(structure: Structure) -> tuple[Group, ...]:
    """Return the open groups, and those pinned ones that a branch which may be emptied reads, in forward order.

    Windows that are to tell what emptying would do (`propose_empty`) observe these in place of `open_groups`.
    """
    read = {name for branch in branches_of(structure) for name in branch.read}
    return tuple(group for group in structure.groups if group.pin is None or group.name in read)


def propose_empty(
    model: nn.Module,
    structure: Structure,
    observations: Observations,
    *,
    names: Container[str] | None = None,
    seed: int = 0,
    errors: bool = True,
) -> tuple[EmptyProposal, ...]:
    """Say for every branch that may be emptied, and whose layer was observed, what that would do; nothing is changed.

    Args:
        model: read only.
        structure: of the model.
        observations: by (group name, site key).
        names: of the branches that are asked about (`Branch.name`), or of groups of theirs; None for all.
        seed: of random choices about a view.
        errors: False leaves errors, variances and certificates out, which is where the time goes.

    Returns: the proposals, in forward order. Each may be applied alone or with others: branches share no group.

    Raises: NonFiniteError: statistics hold NaN or infinity.
    """
    groups = {group.name: group for group in structure.groups}
    found = []
    for branch in branches_of(structure):
        if names is not None and not any(name in names for name in (branch.name, *branch.groups)):
            continue
        read = [groups[name] for name in branch.read]
        if all((group.name, site.key) in observations for group in read for site in group.sites):
            data = [make_view(model, group, observations, seed, neurons=False) for group in read]
            found.append(_proposal(branch, data, errors=errors))
    return tuple(found)


def _proposal(branch: Branch, data: Sequence[GroupData], *, errors: bool) -> EmptyProposal:
    reductions, certificates = list[Reduction](), {}
    error, variance, rows = 0.0, 0.0, list[int]()
    for one in data:
        name, view = one.view.name, next(site for site in one.view.sites if site.key == branch.site)
        view = replace(view, centred=True)  # the constant is a bias of its own
        keep = torch.zeros(0, dtype=torch.int64, device="cpu")
        mix = torch.zeros(0, one.view.num_channels, dtype=torch.float64, device=moments_of(view).device)
        made = SiteReduction(mix=mix, offset=offset_of(view, keep, mix))
        reductions.append(Reduction(group=name, keep=keep, sites={branch.site: made}))
        rows.append(moments_of(view).num_rows)
        if not errors:
            continue
        own = relative_error(view, keep, made)
        error += own / one.ratios[branch.site]
        variance += output_variance(view)
        bound = Certificate(kind="empirical", subject=branch.site, value=own, rows=rows[-1], note=_NOTE)
        certificates[name] = (bound,)
    return EmptyProposal(
        branch=branch,
        reductions=tuple(reductions),
        error=error if errors else math.nan,
        variance=variance if errors else math.nan,
        rows=min(rows),
        certificates=certificates,
    )


def within(
    proposals: Iterable[EmptyProposal], tolerance: float, allotted: Mapping[str, float]
) -> Iterator[EmptyProposal]:
    """Yield the proposals that change the output of their layer by at most a tolerance, or what a group is allotted."""
    for proposal in proposals:
        own = [allotted.get(name, tolerance) for name in proposal.branch.read]
        if proposal.error <= max(min(own), ROUNDOFF):
            yield proposal
