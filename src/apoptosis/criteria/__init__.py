"""Criteria: which channels of a group are removed, and how the kept ones replace them.

A criterion orders the channels (rank) and says how the kept ones reproduce the others (reduce); every one returns a
Reduction, whose error is measured by one certificate formula. Elsewhere: modules, budgets, edits.
"""

from apoptosis.criteria.certificate import Proposal, at_width, choose, dropped_variance, relative_error
from apoptosis.criteria.compensated import compensated
from apoptosis.criteria.constraints import interleaved
from apoptosis.criteria.registry import criteria, get_criterion, register_criterion
from apoptosis.criteria.views import Criterion, GroupView, NeuronView, Ranking, SiteView

__all__ = [
    "Criterion",
    "GroupView",
    "NeuronView",
    "Proposal",
    "Ranking",
    "SiteView",
    "at_width",
    "choose",
    "compensated",
    "criteria",
    "dropped_variance",
    "get_criterion",
    "interleaved",
    "register_criterion",
    "relative_error",
]
