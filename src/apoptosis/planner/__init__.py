"""Moments become a plan with certificates; nothing of the user's is touched."""

from apoptosis.planner.branches import branches_of, groups_to_observe, may_be_empty, propose_empty
from apoptosis.planner.costs import Cost, Costs, macs_after
from apoptosis.planner.couplings import with_tied
from apoptosis.planner.plan import Plan, make_plan, merged
from apoptosis.planner.proposals import Request
from apoptosis.planner.reasons import Cause, Why, summary, waits
from apoptosis.planner.views import Observations

__all__ = [
    "Cause",
    "Cost",
    "Costs",
    "Observations",
    "Plan",
    "Request",
    "Why",
    "branches_of",
    "groups_to_observe",
    "macs_after",
    "make_plan",
    "may_be_empty",
    "merged",
    "propose_empty",
    "summary",
    "waits",
    "with_tied",
]
