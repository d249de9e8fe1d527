"""The registry as a whole."""

from __future__ import annotations

from collections import Counter

import torch

from apoptosis.graph.rules.contraction import CONTRACTIONS
from apoptosis.graph.rules.experts import EXPERTS
from apoptosis.graph.rules.layout import LAYOUTS
from apoptosis.graph.rules.lookup import LOOKUPS
from apoptosis.graph.rules.movement import MOVES
from apoptosis.graph.rules.normalization import NORMS
from apoptosis.graph.rules.product import PRODUCTS
from apoptosis.graph.rules.reduction import REDUCTIONS
from apoptosis.graph.rules.table import ACTIVATIONS, RULES, SCALARS

TABLES = (CONTRACTIONS, EXPERTS, LAYOUTS, LOOKUPS, MOVES, NORMS, PRODUCTS, REDUCTIONS)

#: Functions that are followed as one operator, and operators of some releases alone.
ELSEWHERE = {"scaled_dot_product_attention", "_grouped_mm", "_upsample_lanczos2d_aa"}


def test_every_rule_is_that_of_an_operator() -> None:
    known = {name for name in RULES if hasattr(torch.ops.aten, name) or hasattr(torch.ops.aten, f"{name}_")}
    unknown = RULES.keys() - known - ELSEWHERE
    assert torch.__version__ < "2.13" or not unknown  # an older torch has fewer operators


def test_no_table_hides_an_entry_of_another() -> None:
    times = Counter(name for table in TABLES for name in table)
    assert [name for name, count in times.items() if count > 1] == []
    assert [name for name in times if name in ACTIVATIONS] == []


def test_numbers_that_are_written_are_compared() -> None:
    assert {"mul", "fill", "full", "constant_pad_nd", "scatter", "index_fill", "index_add"} <= SCALARS
    assert "native_group_norm" not in SCALARS  # its numbers are sizes


def test_what_is_elementwise_is_in_no_other_table() -> None:
    elementwise = {name for name, (rule, _) in RULES.items() if rule.__name__ == "_elementwise"}
    assert elementwise.isdisjoint(name for table in TABLES for name in table)
