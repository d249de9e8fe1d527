"""docs/theory.md and tests/numerics/test_theorems.py name each other, theorem by theorem."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "theory.md"


def slug(name: str) -> str:
    return "test_" + re.sub(r"[^a-z]+", "_", name.lower()).strip("_")


def test_page_and_tests_name_each_other() -> None:
    text = PAGE.read_text(encoding="utf-8")
    headings = re.findall(r"^## Theorem (\d+) \((.+)\)$", text, flags=re.MULTILINE)
    assert [int(number) for number, _ in headings] == list(range(1, len(headings) + 1))
    assert len(re.findall(r"^## Theorem", text, flags=re.MULTILINE)) == len(headings)
    named = re.findall(r"^Test: `(\w+)`\.$", text, flags=re.MULTILINE)
    assert named == [slug(name) for _, name in headings]
    assert len(re.findall(r"^Proof\b", text, flags=re.MULTILINE)) == len(headings)
    tree = ast.parse((HERE / "test_theorems.py").read_text(encoding="utf-8"))
    tests = {
        node.name: node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert set(tests) == set(named)
    for name, node in tests.items():
        assert any("given(" in ast.unparse(decorator) for decorator in node.decorator_list), (
            f"{name} is no property test"
        )


def test_theorems_cited_in_the_code_and_on_the_pages_exist() -> None:
    known = set(re.findall(r"^## Theorem \d+ \((.+)\)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE))
    root = HERE.parents[1]
    cited = set()
    for path in [*(root / "src").rglob("*.py"), *(root / "docs").rglob("*.md")]:
        flat = re.sub(r"\s+", " ", path.read_text(encoding="utf-8"))
        cited |= set(re.findall(r'Theorem "([^"]+)"', flat))
    assert cited
    assert cited <= known
