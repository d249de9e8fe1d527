"""Moments become a plan with certificates; nothing of the user's is touched."""

from apoptosis.planner.plan import Plan, Request, macs_after, make_plan, merged

__all__ = ["Plan", "Request", "macs_after", "make_plan", "merged"]
