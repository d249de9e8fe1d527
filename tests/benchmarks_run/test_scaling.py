"""The cost model against numbers made by it, and a quick run of the measurement from end to end."""

import importlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from apoptosis import Apoptosis
from distributed.launched import SRC, Launched
from distributed.warm import interpreter

ROOT = Path(__file__).resolve().parents[2]
model = importlib.import_module("benchmarks.cluster.model")
tables = importlib.import_module("benchmarks.cluster.tables")
scaling = importlib.import_module("benchmarks.scaling")
start = importlib.import_module("benchmarks.cluster.start")
why_no_mpi = start.why_no_mpi

COMPUTE = {"c0": 1e-3, "c1": 2e-11, "c2": 3e-9}
LINK = {"alpha": 1e-4, "beta": 8e-9}


def step(rows, parameters, size=1, **more):
    macs = float(parameters)
    return {"rows": rows, "parameters": parameters, "macs": macs, "payload": 4 * parameters, **more}


def test_the_fit_finds_the_constants_that_made_the_numbers():
    steps = [step(rows, p) for rows in (16, 64, 128) for p in (300_000, 3_000_000)]
    for s in steps:
        s["cpu_seconds"] = 2 * model.compute_seconds(COMPUTE, s["macs"], s["rows"], s["parameters"])
    assert model.fit_compute(steps, threads=2) == pytest.approx(COMPUTE)
    sums = [(n, {"bytes": b, "seconds": model.sum_seconds(LINK, n, b)}) for n in (2, 4) for b in (1e3, 1e5, 1e7)]
    assert model.fit_link(sums) == pytest.approx(LINK)


def test_a_ring_sends_what_rings_send():
    assert model.sum_seconds(LINK, 1, 1e9) == 0.0
    assert model.sum_seconds(LINK, 4, 1e6) == pytest.approx(6e-4 + 1.5e6 * 8e-9)


def test_errors_are_those_of_the_measured_steps():
    s = step(64, 1_000_000)
    found = 2 * model.compute_seconds(COMPUTE, s["macs"], 64, 1_000_000) + model.sum_seconds(LINK, 4, 4e6)
    links = [{"link": "slow", "steps": [{**s, "seconds": found / 1.1}]}]
    world = {"size": 4, "backend": "mpi", "threads": 1, "cores": 2, "links": links}
    assert model.errors([world], COMPUTE, {"MPI, slow": LINK})["MPI, slow"]["worst"] == pytest.approx(0.1)


def test_a_whole_run_is_the_sum_of_its_steps_and_events():
    run = {
        "steps": 100,
        "events": [{"step": 20, "share": 0.5, "seconds": 2.0}, {"step": 60, "share": 0.1, "seconds": 1.0}],
    }
    found = model.whole_run(1.0, 0.2, 4.0, (1000, 200), run)
    spent = 20 * 1.0 + 40 * 0.5 + 40 * 0.1 + 4.0 + 2.0
    assert found["speed_up"] == pytest.approx(100 / spent)
    assert found["event_share"] == pytest.approx(6.0 / spent)


def test_a_projection_gains_where_the_network_shrinks_and_nothing_where_it_does_not():
    links = {"slow": LINK}
    shrunk = model.project(COMPUTE, links, {"alexnet": (0.1, 0.4), "cifar10-conv": (1.0, 1.0)})
    for one in shrunk:
        if one["network"] == "ResNet-50":
            assert one["speed_up"] == 1.0
        else:
            assert one["speed_up"] > 2
        assert one["before"]["waiting"] <= one["before"]["seconds"]


def test_ratios_come_from_committed_runs():
    for parameters, macs in scaling.ratios(scaling.tasks()).values():
        assert 0 < parameters < 1
        assert 0 < macs < 1
    run = scaling.committed_run()
    assert [e["step"] for e in run["events"]] == sorted(e["step"] for e in run["events"])
    assert run["events"][-1]["step"] < run["steps"]
    assert run["events"][-1]["share"] == pytest.approx(371218 / 2913290)


def worlds(event_seconds=0.5):
    """Made-up figures of 1, 2 and 4 processes on 2 cores, gloo and MPI alike."""
    found = []
    for size, backend in ((1, "gloo"), (2, "gloo"), (4, "gloo"), (2, "mpi"), (4, "mpi")):
        links = []
        for name, link in {"1000 Mbit/s": LINK, "100 Mbit/s": {"alpha": 1e-4, "beta": 8e-8}}.items():
            steps = []
            for layout, parameters in (("dense", 3_000_000), ("shrunk", 300_000)):
                for rows in (128, 128 // size) if size > 1 else (128, 64, 32, 16):
                    s = step(rows, parameters, layout=layout, bytes_on_link=4.0 * parameters)
                    own = model.compute_seconds(COMPUTE, parameters, rows, parameters)
                    took = max(1, size // 2) * own + model.sum_seconds(link, size, 4 * parameters)
                    steps.append({**s, "seconds": took, "cpu_seconds": size * own})
            sums = [{"bytes": b, "seconds": model.sum_seconds(link, size, b)} for b in (1e4, 1e7)] if size > 1 else []
            event = {"seconds": event_seconds, "hook_seconds": 0.1, "bytes_on_link": 1e7, "cpu_seconds": 1.0}
            links.append({"link": name, "sums": sums, "steps": steps, "event": event})
        world = {"size": size, "backend": backend, "how": "namespaces", "threads": 1, "cores": 2}
        found.append(world | {"links": links[: 2 if size > 1 else 1]})
    return found


@pytest.mark.parametrize(("event_seconds", "met"), [(0.5, "yes"), (50.0, "no")])
def test_targets_are_met_or_not_by_the_figures(event_seconds, met):
    made = worlds(event_seconds)
    scaling.with_runs(made, scaling.committed_run())
    fitted = scaling.fit(made)
    assert all(abs(e["worst"]) < 1e-6 for e in fitted["errors"].values())
    found = scaling.targets(made, fitted)
    assert [t["met"] for t in found if "10 dense steps" in t["target"]] == [met] * 4
    assert [t["met"] for t in found if "least 5.0x faster, where" in t["target"]] == ["yes", "yes"]
    assert ["MPI" in t["target"] for t in found] == [False] * 6 + [True] * 6
    machine = {"cpu": "x", "cores": 2, "load_before": 0.1}
    result = scaling.followed(
        {
            "batch": 128,
            "machine": machine,
            "versions": {"torch": "2"},
            "why_no_mpi": "",
            "how": "namespaces",
            "seed": 0,
            "worlds": made,
        }
    )
    assert {p["link"] for p in result["projection"]} == {"1000 Mbit/s", "10 Gbit/s, assumed"}
    for name, make in tables.TABLES.items():
        assert name in ("scaling-setting", "scaling-whole") or make({"scaling": result}).count("\n") > 2
    efficiency = tables.scaling(result)
    assert "| 2 | gloo |" in efficiency
    assert "| 2 | MPI |" in efficiency
    assert "| 4 | " not in efficiency  # four processes share two cores: no speed-up is given
    assert all(line.endswith("– |") for line in tables.steps(result).splitlines() if line.startswith("| 4 "))


def setting_of(load, *worlds, why_no_mpi=""):
    several = [{"size": 2, "backend": backend, "how": how, "transport": name} for backend, how, name in worlds]
    return tables.setting(
        {"machine": {"cpu": "x", "cores": 2, "load_before": load}, "versions": {"torch": "2"}, "seed": 0,
         "why_no_mpi": why_no_mpi, "worlds": [{"size": 1}, *several]}
    )  # fmt: skip


@pytest.mark.parametrize(("load", "found"), [(0.1, "Nothing else ran"), (9.0, "shared with other programs")])
def test_the_page_says_whether_other_programs_ran(load, found):
    assert found in setting_of(load, ("gloo", "hook", "gloo"))


def test_the_page_says_what_carried_the_sums():
    both = ("gloo", "namespaces", "gloo"), ("mpi", "namespaces", "MPICH 5")
    assert "gloo and MPICH 5, links bounded by tc" in setting_of(0.1, *both)
    assert "acted" not in setting_of(0.1, *both)
    assert "(those of MPI acted by" in setting_of(0.1, both[0], ("mpi", "hook", "Open MPI"))
    assert "gloo (MPI: there is no mpirun)" in setting_of(0.1, both[0], why_no_mpi="there is no mpirun")


COMMAND = """
import sys
from benchmarks import scaling
from benchmarks.cluster import start
start.PYTHON = {python!r}
sys.exit(scaling.main())
"""


def run(*words, cwd, fresh=False):
    """The command, finished, and its status; it and its ranks are forked, or are Pythons of their own (fresh)."""
    program = ("-m", "benchmarks.scaling") if fresh else ("-c", COMMAND.format(python=interpreter()))
    done = Launched("none", 1, *program, "--quick", *words, cwd=cwd, fresh=fresh, PYTHONPATH=f"{SRC}:{ROOT}")
    try:
        return done, done.process.wait(500)
    finally:
        if done.process.poll() is None:
            os.kill(done.process.pid, signal.SIGTERM)  # it ends its ranks
        done.wait(30)


def quick(path, *words):
    done, status = run("--json", str(path), *words, cwd=path.parent)
    assert status == 0, done.printed() + done.told()
    result = json.loads(path.read_text())
    assert result["backends"] == (["gloo"] if why_no_mpi() else ["gloo", "mpi"])
    assert bool(result["why_no_mpi"]) == ("gloo alone" in done.printed()) == bool(why_no_mpi())
    assert [w["size"] for w in result["worlds"]] == [1, *(2 for _ in result["backends"])]
    for two in result["worlds"][1:]:
        assert [link["link"] for link in two["links"]] == ["unbounded", "100 Mbit/s"]
        assert two["transport"] == "gloo" if two["backend"] == "gloo" else "MPI" in two["transport"]
    for name in ("scaling-steps", "scaling-events", "scaling-model"):
        assert tables.TABLES[name]({"scaling": result}).count("\n") > 2
    assert "gloo" in tables.TABLES["scaling-setting"]({"scaling": result})
    return result


def test_a_quick_run_from_end_to_end(tmp_path):
    """Links bounded by tc where the machine allows it: what MPI sends goes over them as what gloo sends."""
    result = quick(tmp_path / "scaling.json")
    for two in result["worlds"][1:]:
        for link in two["links"]:
            for dense, shrunk in tables.pairs(link):
                assert shrunk["payload"] < dense["payload"] / 3
                if two["how"] == "namespaces":  # a ring of two sends the payload once, and headers
                    assert dense["payload"] < dense["bytes_on_link"] < 1.2 * dense["payload"]
                    assert shrunk["bytes_on_link"] < dense["bytes_on_link"] / 3
        slow = two["links"][1]["sums"][-1]  # 1.2 MB at 100 Mbit/s: 96 ms, less what the bucket lets through at once
        assert slow["seconds"] > 0.05


def test_a_hook_takes_the_place_of_links(tmp_path):
    """For machines that allow no namespaces: steps and sums take as long as the link would, and no bytes are given."""
    result = quick(tmp_path / "scaling.json", "--how", "hook")
    assert result["how"] == "hook"
    assert result["why_no_namespaces"] == "not asked for"
    for two in result["worlds"][1:]:
        free, slow = two["links"]
        assert two["how"] == "hook"
        assert free["event"]["committed"]
        assert slow["event"] is None
        for step in slow["steps"]:
            assert step["bytes_on_link"] is None
            assert step["seconds"] >= 8 * step["payload"] / 1e8
        for one in slow["sums"]:
            assert one["seconds"] >= 8 * one["bytes"] / 1e8
    assert "acted by a communication hook" in tables.setting(result)


def test_whole_runs_begin_alike_and_end_with_fewer_parameters(tmp_path):
    path = tmp_path / "whole.json"
    done, status = run("--whole", "--json", str(path), cwd=tmp_path)
    assert status == 0, done.printed() + done.told()
    result = json.loads(path.read_text())
    runs = {(one["size"], one["method"]): one for one in result["runs"]}
    assert set(runs) == {(2, "dense"), (2, "apoptosis"), (1, "dense"), (1, "apoptosis")}
    for (size, method), one in runs.items():
        assert one["steps"] == runs[1, "dense"]["steps"]
        assert one["parameters_before"] == runs[1, "dense"]["parameters"]
        assert one["test"] > 0.8
        assert bool(one["events"]) == (one["parameters"] < one["parameters_before"]) == (method == "apoptosis")
        assert (one["bytes_on_link"] is None) == (size == 1 or result["how"] == "hook")
    dense, apoptosis = runs[2, "dense"], runs[2, "apoptosis"]
    assert dense["test"] == pytest.approx(runs[1, "dense"]["test"], abs=0.02)  # the same batches, only shared out
    if result["how"] == "namespaces":
        payload = 4 * dense["parameters"] * dense["steps"]  # a ring of two sends it once, and headers
        assert payload < dense["bytes_on_link"] < 1.3 * payload
    page = tables.whole(result)
    assert page.count("| 2 | 1000 Mbit/s") == 2
    assert f"{apoptosis['parameters']:,}" in page
    assert tables.TABLES["scaling-whole"]({}) == tables.EMPTY


def test_backends_that_are_not_there_are_refused(tmp_path):
    done, status = run("--backend", "gloo,smoke", cwd=tmp_path, fresh=True)
    assert status == 2
    assert "'smoke' is unknown; there are gloo, mpi" in done.told()
    if why_no_mpi():
        done, status = run("--backend", "mpi", cwd=tmp_path)
        assert status == 2
        assert "pip install 'torch-apoptosis[mpi]'" in done.told()


def test_a_rank_that_fails_ends_the_others(tmp_path):
    """The first one waits for ever for the second."""
    program = ("-c", "import sys, time; sys.exit(3) if sys.argv[1] == '1' else time.sleep(1000)")
    with pytest.raises(SystemExit, match="2 processes on gloo: one failed"):
        start.run_ranks("gloo", 2, program, links=None, folder=tmp_path, threads=1)


def test_a_share_that_noise_hides_is_called_unknown():
    from benchmarks.cluster.tables import _rate

    assert _rate(1e-9, 0.0) == "unknown"
    assert _rate(1e-9, 1e-11) == "100"


def test_stand_ins_of_larger_networks_compute_and_may_shrink():
    """Both plans: ten logits, and groups that are free to shrink, the residual width among them."""
    stand_ins = importlib.import_module("benchmarks.cluster.stand_ins")
    for name, least in (("vgg", 9), ("residual", 16)):
        net = stand_ins.STAND_INS[name].build(None, 1.0)
        x = torch.randn(2, 3, 32, 32)
        assert net(x).shape == (2, 10)
        apo = Apoptosis(net, torch.optim.Adam(net.parameters()), x, total_steps=100, calibration=1.0)
        assert len(apo.groups()) >= least
        apo.close()
