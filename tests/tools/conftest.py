"""What the tests of the command share."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from apoptosis.tools.cli.app import run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Run the command, which has to refuse in one line that says so."""

    def check(arguments: Sequence[str], what: str, status: int = 2) -> None:
        assert run(arguments) == status, arguments
        out, err = capsys.readouterr()
        assert err.startswith("apoptosis: error: "), err
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert len(err) < 700
        assert what in err, err
        assert "Traceback" not in out + err

    return check
