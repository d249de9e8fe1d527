"""Every family, every property of the oracle; a failure is named by both.

With FAMILIES=all in the environment, near twins of other families (registry.VARIANTS) are asked everything too.
"""

import os
from functools import lru_cache

import pytest
import torch

from families.oracle import CHECKS, check_group, operate
from families.registry import FAMILIES, VARIANTS

ALL = os.environ.get("FAMILIES") == "all"
OF_VARIANTS = {"planted", "eval outputs", "train outputs", "attributes"}


@lru_cache(maxsize=1)
def operation(name, dtype):
    return operate(FAMILIES[name], dtype)


def cases():
    """All checks of a family in one precision stand together, so that its operation is made once."""
    for name, family in FAMILIES.items():
        brief = name in VARIANTS and not ALL
        for dtype in (torch.float64, torch.float32):
            short = str(dtype).removeprefix("torch.")
            for check, (_, dtypes) in CHECKS.items():
                if dtype in dtypes and not (brief and (dtype == torch.float32 or check not in OF_VARIANTS)):
                    yield pytest.param(name, dtype, check, id=f"{name}-{short}-{check}")
            if dtype == torch.float64:
                for group, reason in family.missing.items():
                    mark = pytest.mark.xfail(raises=AssertionError, strict=True, reason=reason)
                    yield pytest.param(name, dtype, f"missing:{group}", id=f"{name}-missing-{group}", marks=mark)


@pytest.mark.parametrize(("name", "dtype", "check"), list(cases()))
def test_family(name, dtype, check):
    done = operation(name, dtype)
    if check.startswith("missing:"):
        check_group(done, check.removeprefix("missing:"))
    else:
        CHECKS[check][0](done)


@pytest.mark.parametrize("name", FAMILIES)
def test_lists_are_of_the_family(name):
    family = FAMILIES[name]
    assert family.groups, "a family lists at least one group that must not be pinned"
    assert set(family.missing) <= set(family.groups)
    assert all(number > 0 for number in family.groups.values())


def test_variants_are_families():
    if "BERT, sdpa" in FAMILIES:  # with the extra that brings them
        assert set(FAMILIES) >= VARIANTS
