"""Moments become a plan with certificates; nothing of the user's is touched."""

from apoptosis.planner.costs import macs_after
from apoptosis.planner.plan import SHORT_OF_ROWS, Plan, Request, make_plan, merged
from apoptosis.planner.views import Observations

__all__ = ["SHORT_OF_ROWS", "Observations", "Plan", "Request", "macs_after", "make_plan", "merged"]
