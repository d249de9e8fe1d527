"""Surgery: the only room that changes the user's objects."""

from apoptosis.surgery.attributes import check_registered, register_attributes
from apoptosis.surgery.checkpoint import load, save
from apoptosis.surgery.dry_run import check_optimizers
from apoptosis.surgery.edits import build_edits
from apoptosis.surgery.followers import as_follower, warn_of_averages
from apoptosis.surgery.layers import layers
from apoptosis.surgery.modules import Transaction, check_followers, named_tensors
from apoptosis.surgery.norms import norm_edits
from apoptosis.surgery.redundancy import check_together, inside, rebuild_buckets
from apoptosis.surgery.sharded_checkpoint import load_sharded, save_sharded
from apoptosis.surgery.values import apply_edit, merge_like, slice_like

__all__ = [
    "Transaction",
    "apply_edit",
    "as_follower",
    "build_edits",
    "check_followers",
    "check_optimizers",
    "check_registered",
    "check_together",
    "inside",
    "layers",
    "load",
    "load_sharded",
    "merge_like",
    "named_tensors",
    "norm_edits",
    "rebuild_buckets",
    "register_attributes",
    "save",
    "save_sharded",
    "slice_like",
    "warn_of_averages",
]
