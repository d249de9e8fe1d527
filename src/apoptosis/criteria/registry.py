"""The criteria by name.

Holds: the registry, filled from one literal tuple, and the check of the answers of a user's criterion.
Elsewhere: any criterion.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from apoptosis.criteria.baselines import CONSTANT, MAGNITUDE, RANDOM
from apoptosis.criteria.least_squares import GREEDY, INTERPOLATIVE, RECONSTRUCTION
from apoptosis.criteria.merging import DUPLICATE, PAIRWISE
from apoptosis.criteria.views import Criterion, GroupView, Ranking
from apoptosis.errors import ArgumentError
from apoptosis.records import Reduction

_BUILT_IN = (INTERPOLATIVE, RECONSTRUCTION, GREEDY, CONSTANT, PAIRWISE, DUPLICATE, MAGNITUDE, RANDOM)
_REGISTRY: dict[str, Criterion] = {criterion.name: criterion for criterion in _BUILT_IN}


def register_criterion(criterion: Criterion) -> None:
    """Add a criterion, to be named in `criterion=` and on the command line.

    Its answers are checked: an order without every channel, or a reduction of another shape, is refused by name before
    anything changes. Its errors are measured by the same certificate as those of every criterion.

    Raises: ArgumentError: it has no name, or the name is taken; the message lists those that are.

    References: docs/extending.md, with an example.
    """
    name = getattr(criterion, "name", None)
    if not isinstance(name, str) or not callable(getattr(criterion, "rank", None)):
        raise ArgumentError(f"{criterion!r} is no criterion: it has no name, or no rank() (docs/extending.md).")
    if not criterion.name or criterion.name in _REGISTRY:
        raise ArgumentError(f"a criterion named '{criterion.name}' is registered already; there are {_listed()}.")

    def rank(view: GroupView) -> Ranking:
        ranking = criterion.rank(view)
        if not isinstance(ranking, Ranking):
            raise _wrong(criterion, "rank", view, f"a Ranking, not a {type(ranking).__name__}")
        order = ranking.order.sort().values.cpu()
        if not torch.equal(order, torch.arange(view.num_channels, device="cpu")):
            raise _wrong(criterion, "rank", view, f"an order of all {view.num_channels} channels, each once")
        return ranking

    def reduce(view: GroupView, keep: Tensor) -> Reduction:
        reduction = criterion.reduce(view, keep)
        if not isinstance(reduction, Reduction):
            raise _wrong(criterion, "reduce", view, f"a Reduction, not a {type(reduction).__name__}")
        if reduction.group != view.name or not torch.equal(reduction.keep, keep):
            raise _wrong(criterion, "reduce", view, "a reduction to the channels that were asked for")
        shape, num = (keep.numel(), view.num_channels), view.num_channels
        for site in view.sites:
            found = reduction.sites.get(site.key)
            if found is None or found.mix.shape != shape or not bool(torch.isfinite(found.mix).all()):
                raise _wrong(criterion, "reduce", view, f"a finite mix of shape {shape} for site '{site.key}'")
            offset = found.offset
            if offset is not None and (offset.shape != (num,) or not bool(torch.isfinite(offset).all())):
                raise _wrong(criterion, "reduce", view, f"finite offsets of shape ({num},) for site '{site.key}'")
        return reduction

    _REGISTRY[criterion.name] = replace(criterion, rank=rank, reduce=reduce)


def _wrong(criterion: Criterion, verb: str, view: GroupView, wanted: str) -> ArgumentError:
    return ArgumentError(f"criterion '{criterion.name}': {verb} of group '{view.name}' must return {wanted}.")


def _listed() -> str:
    return ", ".join(criteria())


def get_criterion(name: str) -> Criterion:
    """Look a criterion up.

    Raises: ArgumentError: there is none of that name; the message lists what there is.

    Example:
        >>> get_criterion("interpolative").needs_data
        True
    """
    if name not in _REGISTRY:
        raise ArgumentError(f"no criterion '{name}'; there are {_listed()}.")
    return _REGISTRY[name]


def criteria() -> tuple[str, ...]:
    """Names of all registered criteria, built-in ones first."""
    return tuple(_REGISTRY)
