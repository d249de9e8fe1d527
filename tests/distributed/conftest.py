"""What every test with launchers ends with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from distributed.launched import Launched


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Launchers, and what they started, that a failed test has not waited for."""
    yield
    for launched in tuple(Launched.running):
        launched.kill()
