"""Every network that once broke an oracle holds, or is marked as open."""

import pytest

from families.regressions import CASES, Case
from families.trial import check


def marked(case: Case) -> object:
    marks = pytest.mark.xfail(strict=True, raises=AssertionError, reason=case.open) if case.open else ()
    return pytest.param(case, marks=marks, id=case.name)


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_case(case: Case) -> None:
    check(case.network, case.seed)


@pytest.mark.parametrize("case", [case for case in CASES if case.open], ids=lambda case: case.name)
def test_open_cases_fail_as_they_say(case: Case) -> None:
    with pytest.raises(AssertionError, match=case.message):
        check(case.network, case.seed)


def test_names_are_unique_and_open_cases_say_how_they_fail() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(bool(case.open) == bool(case.message) for case in CASES)
