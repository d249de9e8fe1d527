"""The examples run as they stand, and what they train is smaller afterwards."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ALONE = ("image_classifier", "tabular", "transformer_fine_tuning", "shrink_and_ship")


@pytest.mark.filterwarnings("default")  # other libraries' own
@pytest.mark.parametrize("name", ALONE)
def test_an_example_runs_and_its_network_shrinks(name, tmp_path, monkeypatch, capfd):
    """What an event costs beside its arithmetic is fixed: a busy machine would have none on networks this small."""
    if name == "transformer_fine_tuning":
        pytest.importorskip("transformers")
    monkeypatch.setattr("apoptosis.engine.beginning.overhead_macs", lambda *args, **options: 1e9)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    before, after = (int(n.replace(",", "")) for n in re.search(r"parameters ([\d,]+)->([\d,]+)", out).groups())
    assert after < before
    if name == "shrink_and_ship":
        assert float(re.search(r"without the library: (\S+)", out).group(1)) < 1e-5


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        *ALONE,
        "several_processes",
        "own_work",
    }  # the last two: test_launch.py, tools/test_own_work.py
