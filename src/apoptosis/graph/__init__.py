"""A model's structure, measured by sending channel ids through one real forward pass.

Holds: model in, groups, sites and pins out. Elsewhere: statistics, decisions, edits.
"""

from apoptosis.graph.analysis import analyse, layout_of, replay
from apoptosis.graph.rules.table import register_rule
from apoptosis.graph.verify.emptied import verify_emptied
from apoptosis.graph.verify.factors import gains
from apoptosis.graph.verify.verification import verify, verify_up_to_scale

__all__ = ["analyse", "gains", "layout_of", "register_rule", "replay", "verify", "verify_emptied", "verify_up_to_scale"]
