"""Edits of model and optimizers as one transaction; the only package that changes the user's objects."""

from apoptosis.surgery.attributes import check_registered, register_attributes
from apoptosis.surgery.averaged_models import (
    as_averaged_model,
    check_averaged_models,
    named_tensors,
    warn_of_averages,
)
from apoptosis.surgery.build import build_edits
from apoptosis.surgery.dry_run import check_optimizers
from apoptosis.surgery.nested_optimizers import layers
from apoptosis.surgery.norms import norm_edits
from apoptosis.surgery.transaction import Transaction
from apoptosis.surgery.values import apply_edit, merge_like, slice_like

__all__ = [
    "Transaction",
    "apply_edit",
    "as_averaged_model",
    "build_edits",
    "check_averaged_models",
    "check_optimizers",
    "check_registered",
    "layers",
    "merge_like",
    "named_tensors",
    "norm_edits",
    "register_attributes",
    "slice_like",
    "warn_of_averages",
]
