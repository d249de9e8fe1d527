"""Every reason for a pin comes with what would unpin it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from torch import nn
from torch.nn.utils import parametrizations, prune

import apoptosis.graph
from apoptosis.graph.explain import layer_of, parametrized, usual_hint

HERE = Path(apoptosis.graph.__file__).parent
_SAYS = {"pin": 1, "pin_owner": 1, "_pin": 1, "no_rule": 1, "Reason": 0}


def _text(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "x" for part in node.values)
    return None


def reasons() -> list[tuple[str, str]]:
    """(place, text) of every reason in the sources that is given without a remedy of its own."""
    found = []
    for path in sorted(HERE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            place = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in (
                "text",
                "_NO_SITE",
                "_BOTH",
                "_SHARED",
            ):
                found.append((place, _text(node.value)))
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            at = _SAYS.get(name)
            if at is not None and at < len(node.args) <= at + 1 and not node.keywords:
                found.append((place, _text(node.args[at])))
    return [(place, text) for place, text in found if text]


def test_the_reasons_are_found() -> None:
    assert len(reasons()) > 20


@pytest.mark.parametrize(("place", "text"), reasons())
def test_every_reason_has_its_remedy(place: str, text: str) -> None:
    assert usual_hint(text), f"{place}: add what unpins '{text}' to graph/explain.py"


def test_an_unknown_reason_has_none() -> None:
    assert usual_hint("it rains") == ""


def test_computed_weights_name_the_way_out() -> None:
    layer = parametrizations.weight_norm(nn.Linear(3, 2))
    remedy = "Take the parametrization (WeightNorm) off: parametrize.remove_parametrizations(a.b, 'weight')."
    assert parametrized([("a.b", layer)]) == remedy
    inner = [
        ("a.b.parametrizations.weight.0", layer.parametrizations.weight[0]),
        ("a.b.parametrizations.weight", layer.parametrizations.weight),
        ("a.b", layer),
    ]
    assert parametrized(inner) == remedy
    assert parametrized([("p", prune.identity(nn.Linear(3, 2), "weight"))]).endswith("prune.remove(p, 'weight').")
    assert parametrized([("c", nn.Linear(3, 2)), ("a.b", layer)]) == ""
    assert parametrized([]) == ""
    assert layer_of("parametrizations.weight.0") == ""
