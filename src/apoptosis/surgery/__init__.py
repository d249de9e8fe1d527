"""Surgery: the only room that changes the user's objects."""

from apoptosis.surgery.attributes import register_attributes
from apoptosis.surgery.checkpoint import load, save
from apoptosis.surgery.edits import build_edits
from apoptosis.surgery.modules import Transaction, check_followers, named_tensors
from apoptosis.surgery.norms import norm_edits
from apoptosis.surgery.optimizers import check_optimizers
from apoptosis.surgery.values import apply_edit, merge_like, slice_like

__all__ = [
    "Transaction",
    "apply_edit",
    "build_edits",
    "check_followers",
    "check_optimizers",
    "load",
    "merge_like",
    "named_tensors",
    "norm_edits",
    "register_attributes",
    "save",
    "slice_like",
]
