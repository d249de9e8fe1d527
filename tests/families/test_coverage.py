"""docs/coverage.md says what the committed figures say, and the figures are of all families."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from families.registry import FAMILIES

pytest.importorskip("pydantic", reason="the benchmarks need the extra cli")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def coverage():
    spec = importlib.util.spec_from_file_location("benchmarks_coverage", ROOT / "benchmarks" / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_made_from_the_figures(coverage):
    assert coverage.PAGE.read_text(encoding="utf-8") == coverage.page(coverage.read()), (
        "python -m benchmarks.coverage --page"
    )


def test_every_family_was_measured(coverage):
    missing = set(FAMILIES) - set(coverage.read()["families"])
    assert not missing, f"python -m benchmarks.coverage measures {sorted(missing)}"


def test_lists_only_grow(coverage):
    assert not coverage.shrunk_lists(coverage.read()["families"], FAMILIES)


def test_a_list_that_shrank_is_noticed(coverage):
    old = {"MLP": {"listed": {"0": 4, "3": 4, "6": 1}, "missing": {}}}
    family = FAMILIES["MLP"]
    assert coverage.shrunk_lists(old, FAMILIES) == ["MLP: '6' is not listed"]
    pinned = {"MLP": replace(family, missing={"0": "some reason"})}
    old["MLP"]["listed"].pop("6")
    assert coverage.shrunk_lists(old, pinned) == ["MLP: '0' was removable"]
    grown = {"MLP": replace(family, groups={**family.groups, "9": 1}, missing={"9": "not yet"})}
    assert coverage.shrunk_lists(old, grown) == []


def test_figures_are_within_what_the_oracle_allows(coverage):
    for name, record in coverage.read()["families"].items():
        assert record["errors"]["float64"] <= 1e-10, name
        assert record["errors"]["float32"] <= 1e-5, name
        assert record["removable"] <= record["channels"], name
        assert record["found"] <= record["planted"], name


def test_reasons_are_short_and_say_the_operator(coverage):
    reasons = {
        group["pin"]
        for record in coverage.read()["families"].values()
        for group in record["groups"].values()
        if group["pin"] is not None
    }
    assert "output" in reasons
    assert all(len(reason) < 120 and "aten." not in reason for reason in reasons)
