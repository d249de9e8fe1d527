"""The comparison of benchmarks/paper: a whole cell on bundled digits, and what is read off cells."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def importable():
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    pytest.importorskip("torch_pruning", reason="needs the rivals extra: pip install torch-apoptosis[rivals]")
    from benchmarks.paper.__main__ import main
    from benchmarks.paper.summary import read_cells

    folder = tmp_path_factory.mktemp("paper")
    assert main(["--quick", "--no-criteria", "--results", str(folder)]) == 0
    return read_cells(folder)


def test_all_contestants_run_on_equal_terms(cells):
    (cell,) = cells
    found = cell["contestants"]
    dense, own = found["dense"], found["apoptosis"]
    assert set(found) == {
        "dense", "apoptosis", "torch-pruning", "half width", "group lasso", "same widths", "same widths, longer",
        "train-prune-fine-tune", "early stopping",
    }  # fmt: skip
    assert own["macs"] < 0.6 * dense["macs"]
    for rival in ("torch-pruning", "group lasso", "train-prune-fine-tune"):
        assert found[rival]["macs"] <= own["macs"], rival
    assert found["same widths"]["parameters"] == own["parameters"]
    assert dense["points"][0]["parameters"] == dense["points"][-1]["parameters"]
    assert all(0.5 < record["test"] <= 1.0 for record in found.values())
    assert all(record["seconds"] <= record["run_seconds"] for record in found.values())


def test_the_table_says_what_the_cells_say(cells):
    from benchmarks.paper.summary import summarise, tell

    rows = {row.contestant: row for row in summarise(cells)}
    found = cells[0]["contestants"]
    assert rows["dense"].speedup == pytest.approx(1.0)
    assert rows["apoptosis"].parameters == pytest.approx(
        found["dense"]["parameters"] / found["apoptosis"]["parameters"]
    )
    assert rows["apoptosis"].difference == pytest.approx(100 * (found["apoptosis"]["test"] - found["dense"]["test"]))
    assert f"| {rows['apoptosis'].speedup:.2f}x |" in tell(list(rows.values()))


def test_cells_are_plain_json(cells, tmp_path):
    from benchmarks.paper.cells import cell_path, write_cell

    path = cell_path(tmp_path, "digits", 7)
    write_cell(path, cells[0])
    assert json.loads(path.read_text()) == cells[0]


def test_intervals_are_students():
    from benchmarks.paper.summary import geometric, half_width

    assert half_width([1.0]) is None
    assert half_width([1.0, 3.0]) == pytest.approx(12.706, rel=1e-3)
    assert geometric([2.0, 8.0]) == pytest.approx(4.0)


def test_layers_start_anew_at_their_present_widths():
    import torch

    from benchmarks.paper.networks import ViT
    from benchmarks.paper.training import fresh_like

    net = ViT(width=16, heads=2, depth=1, hidden=24)
    before = {name: p.clone() for name, p in net.named_parameters()}
    torch.manual_seed(1)
    fresh_like(net)
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert {"positions", "blocks.0.fc1.weight", "head.bias"} <= moved
    odd = torch.nn.Module()
    odd.free = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="reset_parameters"):
        fresh_like(odd)


def test_unknown_grounds_and_missing_cells_are_told(capsys, tmp_path):
    from benchmarks.paper.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(["--only", "nowhere"])
    assert stop.value.code != 0
    assert "nowhere" in capsys.readouterr().err
    assert main(["--table", "--results", str(tmp_path)]) == 1
    assert "no cells" in capsys.readouterr().err
