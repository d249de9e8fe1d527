"""The comparison of benchmarks/paper: a whole cell on bundled digits, and what is read off cells."""

import json

import pytest


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    pytest.importorskip("torch_pruning", reason="needs the baselines extra: pip install torch-apoptosis[baselines]")
    from benchmarks.paper.__main__ import main
    from benchmarks.paper.summary import read_cells

    folder = tmp_path_factory.mktemp("paper")
    assert main(["--quick", "--no-criteria", "--results", str(folder)]) == 0
    return read_cells(folder)


def test_all_methods_run_on_equal_terms(cells):
    (cell,) = cells
    found = cell["methods"]
    dense, own = found["dense"], found["apoptosis"]
    assert set(found) == {
        "dense", "apoptosis", "torch-pruning", "half width", "group lasso", "same widths", "same widths, longer",
        "train-prune-fine-tune", "early stopping",
    }  # fmt: skip
    assert own["macs"] < 0.9 * dense["macs"]
    for baseline in ("torch-pruning", "group lasso", "train-prune-fine-tune"):
        assert found[baseline]["macs"] <= own["macs"], baseline
    assert found["same widths"]["parameters"] == own["parameters"]
    pace = found["same widths"]["seconds"] / cell["epochs"]
    assert len(found["same widths, longer"]["points"]) == pytest.approx(own["seconds"] / pace, abs=1.001)
    steps = cell["epochs"] * (cell["train_rows"] // cell["batch"]) * cell["batch"]
    assert dense["run_macs"] == steps * dense["macs"]
    tuned = found["train-prune-fine-tune"]
    more = len(tuned["points"]) - cell["epochs"]
    assert tuned["run_macs"] == dense["run_macs"] + more * steps // cell["epochs"] * tuned["macs"]
    assert dense["points"][0]["parameters"] == dense["points"][-1]["parameters"]
    assert all(0.5 < record["test"] <= 1.0 for record in found.values())
    assert all(record["seconds"] <= record["run_seconds"] for record in found.values())


def test_the_tables_say_what_the_cells_say(cells):
    from benchmarks.paper.summary import summarise
    from benchmarks.paper.tables import aims, methods, overview

    rows = {row.method: row for row in summarise(cells)}
    found = cells[0]["methods"]
    dense, own = found["dense"], found["apoptosis"]
    assert rows["dense"].speedup == pytest.approx(1.0)
    assert rows["apoptosis"].parameters == pytest.approx(dense["parameters"] / own["parameters"])
    assert rows["apoptosis"].difference == pytest.approx(100 * (own["test"] - dense["test"]))
    text = methods(cells, [])
    assert len(text.splitlines()) == 2 + len(found)
    assert f"| {rows['apoptosis'].speedup:.2f}x |" in text
    assert f"{100 * dense['test']:.2f} %, {100 * own['test']:.2f} %" in overview(cells, [])
    as_core = [cells[0] | {"task": "mnist"}]
    lines = aims(as_core, []).splitlines()
    assert any("ahead of torch-pruning" in line for line in lines)
    assert any("3x faster" in line and f"{rows['apoptosis'].speedup:.2f}x" in line for line in lines)


def test_frontiers_and_profiles_of_events(tmp_path):
    pytest.importorskip("torch_pruning", reason="needs the baselines extra: pip install torch-apoptosis[baselines]")
    from dataclasses import replace

    from benchmarks.paper import frontier as module
    from benchmarks.paper.event_time import EVENT_TIME, read_event_time, run_event_time
    from benchmarks.paper.frontier import frontier_path, run_frontier
    from benchmarks.paper.pictures import draw_all
    from benchmarks.paper.tables import frontier
    from benchmarks.paper.tasks import QUICK

    task = replace(QUICK, epochs=8)
    data = task.load(None, None)
    tolerances = {"interpolative": (0.05, 0.4), "reconstruction": (0.3,), "magnitude": (0.9,)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TOLERANCES", tolerances)
        found = run_frontier(task, data, 0, lambda line: None)
    methods = [point["method"] for point in found["points"]]
    assert methods.count("interpolative") == methods.count("torch-pruning") == methods.count("same widths") == 2
    sizes = {p["tolerance"]: p["parameters"] for p in found["points"] if p["method"] == "interpolative"}
    assert sizes[0.4] < sizes[0.05]
    assert len(frontier([], [found]).splitlines()) == 2 + len(methods)
    times = run_event_time(task, data, lambda line: None)
    parts = times["events"][0]["parts"]
    assert {"plan", "capture", "probe", "surgery", "moments"} <= {
        name for name, seconds in parts.items() if seconds > 0
    }
    for path, value in ((frontier_path(tmp_path, "digits"), found), (tmp_path / EVENT_TIME, times)):
        path.write_text(json.dumps(value))
    assert read_event_time(tmp_path / EVENT_TIME) == [json.loads(json.dumps(times))]
    drawn = draw_all([], [found], [times], tmp_path / "pictures")
    assert {path.name for path in drawn} == {"paper-frontier.svg", "paper-certificates.svg", "paper-events.svg"}


def test_cells_are_plain_json(cells, tmp_path):
    from benchmarks.paper.cells import cell_path, write_cell

    path = cell_path(tmp_path, "digits", 7)
    write_cell(path, cells[0])
    assert json.loads(path.read_text()) == cells[0]


def row_of(differences, **changes):
    from benchmarks.paper.summary import Row

    values = dict(
        task="mnist", method="apoptosis", seeds=len(differences), unit=100, metric=0.9, interval=None, speedup=4,
        difference=sum(differences) / len(differences), differences=tuple(differences), cpu_speedup=4.0, parameters=9.0,
        seed_ids=tuple(range(len(differences))),
        macs=9.0, run_macs=5.0, own_share=0.02, reached=0, reached_share=None, latency={}, memory=None,
        dense_step=0.03, metric_name="accuracy",
    )  # fmt: skip
    return Row(**(values | changes))


def test_tasks_are_pooled_as_tasks_and_baselines_seed_by_seed():
    from benchmarks.paper.summary import pooled, targets

    middle, width = pooled([[0.0, 0.2], [-1.0, -1.0, -1.0]])
    assert middle == pytest.approx((0.1 - 1.0) / 2)
    assert width == pytest.approx(12.706 * 0.1 / 2, rel=1e-3)  # the variance is all of the first task, one degree
    own = row_of([-0.1, 0.1, 0.0])
    baselines = {"torch-pruning": [-1.1, -0.9, -1.0], "group lasso": [-0.5, 0.4, -0.2], "same widths": [0.3, 0.3, 0.3]}
    rows = [own, *(row_of(found, method=name) for name, found in baselines.items())]
    met = {what: verdict for what, _, verdict in targets(rows, [])}
    assert met["ahead of torch-pruning on every task, points"] is True
    assert met["ahead of group lasso on every task, points"] == "no clear difference"
    assert met["ahead of same widths on every task, points"] is False
    assert met["mnist (dense step 30 ms): at least 85 % of what the multiply-adds of the run promise"] is False
    assert met["own share at most 1 % of the run"] is False


def test_a_small_network_is_chosen_on_validation_examples():
    from benchmarks.paper.summary import targets

    def point(tolerance, parameters, validation, test, method="interpolative"):
        found = {"method": method, "tolerance": tolerance, "parameters": parameters}
        return found | {"validation": validation, "test": test}

    dense = point(None, 4000, 0.9, 0.9, "dense")
    lucky = point(0.1, 50, 0.88, 0.9)  # 80x, but not by its validation metric
    points = [dense, lucky, point(0.05, 100, 0.895, 0.893), point(0.01, 1000, 0.9, 0.9)]
    (found,) = [t for t in targets([row_of([0.0])], [{"task": "mnist", "points": points}]) if "30x" in t[0]]
    assert found[1] == "tolerance 0.05: 40.0x, -0.70 points"
    assert found[2] is True


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


def test_missing_data_gets_one_line(capsys, tmp_path):
    from benchmarks.paper.__main__ import main

    assert main(["--only", "gpt", "--data-dir", str(tmp_path), "--results", str(tmp_path / "cells")]) == 1
    printed = capsys.readouterr().err
    assert "input.txt" in printed
    assert len(printed.splitlines()) == 1


def test_unknown_tasks_and_missing_cells_are_named(capsys, tmp_path):
    from benchmarks.paper.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(["--only", "nowhere"])
    assert stop.value.code != 0
    assert "nowhere" in capsys.readouterr().err
    assert main(["--table", "--results", str(tmp_path)]) == 1
    assert "no cells" in capsys.readouterr().err
