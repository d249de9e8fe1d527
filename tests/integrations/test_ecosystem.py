"""The table of docs/ecosystem.md: every row names a test that exists, and the version that is installed."""

import re
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = re.findall(
    r"^\| ([\w-]+) \| ([\d.]+) \| .+ \| `(\w+)` \|$",
    (ROOT / "docs" / "ecosystem.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)
TESTS = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))


def test_the_table_has_rows() -> None:
    assert len(ROWS) >= 8


@pytest.mark.parametrize(("library", "version", "test"), ROWS, ids=[row[2] for row in ROWS])
def test_every_row_is_a_test_against_the_version_that_is_installed(library: str, version: str, test: str) -> None:
    assert f"def {test}(" in TESTS
    try:
        found = metadata.version(library.lower())
    except metadata.PackageNotFoundError:
        pytest.skip(f"{library} is not installed")
    assert f"{found}.".startswith(f"{version}.")
