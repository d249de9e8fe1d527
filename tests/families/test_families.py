"""Every family, every property of the oracle; a failure is named by both."""

from functools import lru_cache

import pytest
import torch

from families.oracle import CHECKS, check_group, operate
from families.registry import FAMILIES

CASES = [
    (name, check, dtype)
    for name in FAMILIES
    for dtype in (torch.float64, torch.float32)
    for check, (_, dtypes) in CHECKS.items()
    if dtype in dtypes
]
MISSING = [(family.name, group) for family in FAMILIES.values() for group in family.missing]


@lru_cache(maxsize=2)
def operation(name, dtype):
    return operate(FAMILIES[name], dtype)


@pytest.mark.parametrize(
    ("name", "check", "dtype"), CASES, ids=[f"{n}-{c}-{str(d).removeprefix('torch.')}" for n, c, d in CASES]
)
def test_family(name, check, dtype):
    CHECKS[check][0](operation(name, dtype))


@pytest.mark.parametrize(("name", "group"), MISSING, ids=[f"{n}-{g}" for n, g in MISSING])
@pytest.mark.xfail(strict=False, reason="listed, not removable yet")
def test_missing(name, group):
    check_group(operation(name, torch.float64), group)


@pytest.mark.parametrize("name", FAMILIES)
def test_lists_are_of_the_family(name):
    family = FAMILIES[name]
    assert family.groups, "a family lists at least one group that must not be pinned"
    assert set(family.missing) <= set(family.groups)
    assert all(number > 0 for number in family.groups.values())
