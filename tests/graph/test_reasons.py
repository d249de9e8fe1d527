"""Every reason for a pin has a code, a text and a remedy, and no module decides by the wording of a message."""

from __future__ import annotations

import ast
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import apoptosis
from apoptosis.graph import analyse
from apoptosis.graph.explain import NO_REMEDY, Code, Reason, reason_of

HERE = Path(apoptosis.__file__).parent
# Where the place that gives the reason names the remedy of the case, or the user asked for it.
WITHOUT_REMEDY = {Code.SHARED_WIDTH, Code.SHARED_NUMBER, Code.BROKEN, Code.EXCLUDED}
# Modules that read the text of others (torch, the operating system, what a user typed), for which there is no code.
FOREIGN = {
    "graph/trace/failures.py",  # what torch says of a failed forward pass
    "interrupts.py",  # allocators of torch and of other libraries
    "shipping/programs.py",  # onnxruntime, which puts its code in front
    "tools/cli/__init__.py",  # the loader of shared libraries
    "tools/cli/app.py",  # allocators of other libraries
    "tools/cli/options.py",  # what the user typed
    "tools/launch/group.py",  # torch.distributed
}
_MESSAGES = frozenset(("reason", "text", "message", "note", "remedy", "fault", "refused", "error"))
_QUERIES = frozenset(("startswith", "endswith", "partition", "rpartition", "find"))
_PATTERNS = frozenset(("match", "search", "findall", "fullmatch", "finditer"))


def _fields(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


@pytest.mark.parametrize("code", Code, ids=lambda code: code.code)
def test_every_code_has_a_text_and_a_remedy(code: Code) -> None:
    reason = code(**{name: 1.0 if name == "rms" else "x" for name in _fields(code.text + code.remedy)})
    assert reason.text
    assert "{" not in reason.text + reason.remedy
    assert (reason.remedy == NO_REMEDY) == (code in WITHOUT_REMEDY)
    assert not reason.remedy or ((reason.remedy.endswith(".") and reason.remedy[0].isupper()) or "=" in reason.remedy)


def test_every_code_is_given_somewhere() -> None:
    used = "\n".join(path.read_text(encoding="utf-8") for path in sorted(HERE.rglob("*.py")))
    assert [code.name for code in Code if f"Code.{code.name}" not in used] == []


def test_pins_carry_the_code() -> None:
    structure = analyse(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), (torch.zeros(2, 3),))
    assert {group.name: group.pin.code for group in structure.groups if group.pin} == {"0": "norm", "2": "output"}


def test_a_rule_of_the_user_s_may_give_a_text_of_its_own() -> None:
    reason = reason_of("averages {over} channels", "Do not.")
    assert reason == Reason(Code.OWN_RULE, "averages {over} channels", remedy="Do not.")
    assert reason_of("averages").remedy == Code.OWN_RULE.remedy


def _is_message(node: ast.expr) -> bool:
    """Whether an expression is the wording of a message: `pin.reason`, `text`, `str(error)`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "str" and node.args:
        return _is_message(node.args[0]) or "error" in ast.unparse(node.args[0])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("lower", "strip"):
        return _is_message(node.func.value)
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name in _MESSAGES


def _is_words(node: ast.expr) -> bool:
    return isinstance(node, ast.Name | ast.Attribute | ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value != ""
    )


def _by_wording(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield expressions that ask what a message says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for op, left, right in zip(node.ops, [node.left, *node.comparators], node.comparators, strict=False):
                equal = isinstance(op, ast.Eq | ast.NotEq) and (
                    (_is_message(left) and _is_words(right)) or (_is_message(right) and _is_words(left))
                )
                if equal or (isinstance(op, ast.In | ast.NotIn) and _is_message(right)):
                    yield node
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            asked = node.func.attr in _QUERIES and _is_message(node.func.value)
            if asked or (node.func.attr in _PATTERNS and any(_is_message(arg) for arg in node.args)):
                yield node


def test_no_module_decides_by_the_wording_of_a_message() -> None:
    found = []
    for path in sorted(HERE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = path.relative_to(HERE).as_posix()
        for node in _by_wording(tree):
            if name not in FOREIGN:
                found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "'x' in pin.reason",
        "reason == LEFT_OUT",
        "str(error).startswith('a')",
        "A not in str(error)",
        "re.findall(P, fault)",
    ],
)
def test_such_decisions_are_noticed(source: str) -> None:
    assert list(_by_wording(ast.parse(source)))
