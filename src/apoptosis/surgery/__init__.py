"""Surgery: the only room that changes the user's objects."""

from apoptosis.surgery.edits import build_edits, site_key
from apoptosis.surgery.modules import Transaction, check_follower, named_tensors
from apoptosis.surgery.optimizers import check_optimizers
from apoptosis.surgery.values import apply_edit, merge_like, slice_like

__all__ = [
    "Transaction",
    "apply_edit",
    "build_edits",
    "check_follower",
    "check_optimizers",
    "merge_like",
    "named_tensors",
    "site_key",
    "slice_like",
]
