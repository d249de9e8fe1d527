"""The criteria by name.

Lives here: the registry, filled from one literal tuple. Does not live here: any criterion.
"""

from __future__ import annotations

from apoptosis.criteria.baselines import CONSTANT, MAGNITUDE, RANDOM
from apoptosis.criteria.least_squares import GREEDY, INTERPOLATIVE
from apoptosis.criteria.merging import DUPLICATE, PAIRWISE
from apoptosis.criteria.views import Criterion
from apoptosis.errors import ArgumentError

_BUILT_IN = (INTERPOLATIVE, GREEDY, CONSTANT, PAIRWISE, DUPLICATE, MAGNITUDE, RANDOM)
_REGISTRY: dict[str, Criterion] = {criterion.name: criterion for criterion in _BUILT_IN}


def register_criterion(criterion: Criterion) -> None:
    """Add a criterion of one's own.

    Raises: ArgumentError: the name is taken.
    """
    if criterion.name in _REGISTRY:
        raise ArgumentError(f"a criterion named '{criterion.name}' is registered already; choose another name.")
    _REGISTRY[criterion.name] = criterion


def get_criterion(name: str) -> Criterion:
    """Look a criterion up.

    Raises: ArgumentError: there is none of that name; the message lists what there is.

    Example:
        >>> get_criterion("interpolative").needs_data
        True
    """
    if name not in _REGISTRY:
        raise ArgumentError(f"no criterion '{name}'; there are {', '.join(criteria())}.")
    return _REGISTRY[name]


def criteria() -> tuple[str, ...]:
    """Names of all registered criteria, built-in ones first."""
    return tuple(_REGISTRY)
