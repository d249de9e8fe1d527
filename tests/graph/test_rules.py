"""The table of operators as a whole."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
import torch

import apoptosis.graph.rules.table as table
from apoptosis.graph.rules.table import OPERATORS

#: Functions that are followed as one operator, and operators of some releases alone.
ELSEWHERE = {"scaled_dot_product_attention", "_grouped_mm", "_upsample_lanczos2d_aa"}


def test_every_row_is_that_of_an_operator() -> None:
    known = {name for name in OPERATORS if hasattr(torch.ops.aten, name) or hasattr(torch.ops.aten, f"{name}_")}
    unknown = OPERATORS.keys() - known - ELSEWHERE
    assert torch.__version__ < "2.13" or not unknown  # an older torch has fewer operators


def test_an_operator_has_one_row() -> None:
    times = Counter(name for names, _ in table._ROWS for name in names.split())
    assert [name for name, count in times.items() if count > 1] == []
    with pytest.raises(ValueError, match=r"more than once in the table of operators: a\."):
        table._table((("a b", OPERATORS["mul"]), ("a", OPERATORS["div"])))


def test_numbers_that_are_written_are_compared() -> None:
    compared = {name for name, operator in OPERATORS.items() if operator.numbers is not None}
    assert {"mul", "fill", "full", "constant_pad_nd", "scatter", "index_fill", "index_add"} <= compared
    assert "native_group_norm" not in compared  # its numbers are sizes


def test_no_other_module_lists_operators() -> None:
    """What the library knows of an operator stands in its row: no second set of names anywhere."""
    here, found = Path(table.__file__), []
    for path in sorted(here.parent.parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path != here else ():
            words: list[str] = []
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                words = [e.value for e in node.elts if isinstance(e, ast.Constant) and isinstance(e.value, str)]
            elif isinstance(node, ast.Dict):
                words = [e.value for e in node.keys if isinstance(e, ast.Constant) and isinstance(e.value, str)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                words = node.value.split()
            named = [word for word in words if word in OPERATORS]
            if len(named) > 1 and len(named) == len(words):
                found.append(f"{path.name}:{node.lineno}: {named}")
    assert found == []
