"""Moments become a plan with certificates; nothing of the user's is touched."""

from apoptosis.planner.costs import macs_after
from apoptosis.planner.plan import Plan, Request, make_plan, merged
from apoptosis.planner.reasons import Cause, Why, summary, waits
from apoptosis.planner.tied import with_equals
from apoptosis.planner.views import Observations

__all__ = [
    "Cause",
    "Observations",
    "Plan",
    "Request",
    "Why",
    "macs_after",
    "make_plan",
    "merged",
    "summary",
    "waits",
    "with_equals",
]
