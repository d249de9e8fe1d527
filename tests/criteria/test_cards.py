"""Every criterion has its method card, with all sections; no card is left over."""

from __future__ import annotations

from pathlib import Path

import pytest

from apoptosis.criteria import criteria

CARDS = Path(__file__).parents[2] / "docs" / "criteria"
SECTIONS = ("How to use", "Suggested settings", "Technical details", "When it fails", "Attribution")


def test_cards_and_criteria_are_the_same() -> None:
    assert {card.stem for card in CARDS.glob("*.md")} - {"README"} == set(criteria())


@pytest.mark.parametrize("name", criteria())
def test_a_card_has_every_section_in_order(name: str) -> None:
    lines = (CARDS / f"{name}.md").read_text(encoding="utf-8").splitlines()
    assert [line[3:] for line in lines if line.startswith("## ")] == list(SECTIONS)
    assert f'criterion="{name}"' in "\n".join(lines)
