"""The comparison's tasks of what people train: tiny ones on bundled data, cells that stop and go on, cuts to widths."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def importable():
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module", autouse=True)
def extras():
    pytest.importorskip("torch_pruning", reason="needs the baselines extra: pip install torch-apoptosis[baselines]")
    pytest.importorskip("transformers", reason="needs the families extra: pip install torch-apoptosis[families]")


class Stopped(BaseException):
    """A process that was killed."""


def test_a_cell_that_was_stopped_ends_as_one_that_was_not(tmp_path, monkeypatch):
    from benchmarks.paper import cells
    from benchmarks.paper.tasks import QUICK_TASKS

    task = replace(QUICK_TASKS["digits-resnet"], epochs=2)
    data = task.load(None, 600)
    names = ["apoptosis", "half width", "torch-pruning"]
    whole = cells.run_cell(task, data, 0, lambda line: None, names=names)

    path, said = cells.cell_path(tmp_path, task.name, 0), []

    def stop(line):
        said.append(line)
        if "epoch  2 half width" in line:
            raise Stopped

    monkeypatch.setattr(cells, "ASIDE", -1.0)  # put aside after every turn
    with pytest.raises(Stopped):
        cells.run_cell(task, data, 0, stop, names=names, path=path)
    assert (tmp_path / "unfinished" / path.stem / "half-width.pt").exists()
    said.clear()
    again = cells.run_cell(task, data, 0, said.append, names=names, path=path)
    assert any("goes on after" in line for line in said)
    assert not any("epoch  1" in line for line in said)
    assert again["resumed"] == 1
    assert set(again["methods"]) == set(whole["methods"]) == {"dense", *names}
    assert not (tmp_path / "unfinished" / path.stem).exists()
    for name, record in again["methods"].items():
        for key in ("test", "macs", "run_macs", "parameters"):
            assert record[key] == whole["methods"][name][key], (name, key)
        assert [p["validation"] for p in record["points"]] == [p["validation"] for p in whole["methods"][name]["points"]]
