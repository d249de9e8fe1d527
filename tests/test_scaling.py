"""The cost model against numbers made by it, and a quick run of the measurement from end to end."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks are modules of the repository, not of the package

model = importlib.import_module("benchmarks.cluster.model")
tables = importlib.import_module("benchmarks.cluster.tables")
scaling = importlib.import_module("benchmarks.scaling")

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
    told = 2 * model.compute_seconds(COMPUTE, s["macs"], 64, 1_000_000) + model.sum_seconds(LINK, 4, 4e6)
    world = {"size": 4, "threads": 1, "cores": 2, "links": [{"link": "slow", "steps": [{**s, "seconds": told / 1.1}]}]}
    assert model.errors([world], COMPUTE, {"slow": LINK})["slow"]["worst"] == pytest.approx(0.1)


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
    for parameters, macs in scaling.ratios().values():
        assert 0 < parameters < 1
        assert 0 < macs < 1
    run = scaling.committed_run()
    assert [e["step"] for e in run["events"]] == sorted(e["step"] for e in run["events"])
    assert run["events"][-1]["step"] < run["steps"]
    assert run["events"][-1]["share"] == pytest.approx(371218 / 2913290)


def worlds(event_seconds=0.5):
    """Made-up figures of 1 and 4 processes on 2 cores."""
    found = []
    for size in (1, 2, 4):
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
        found.append({"size": size, "threads": 1, "cores": 2, "links": links[: 2 if size > 1 else 1]})
    return found


@pytest.mark.parametrize(("event_seconds", "met"), [(0.5, "yes"), (50.0, "no")])
def test_targets_are_met_or_not_by_the_figures(event_seconds, met):
    made = worlds(event_seconds)
    scaling.with_runs(made, scaling.committed_run())
    fitted = scaling.fit(made)
    assert all(abs(e["worst"]) < 1e-6 for e in fitted["errors"].values())
    told = scaling.targets(made, fitted)
    assert [t["met"] for t in told if "10 dense steps" in t["target"]] == [met, met]
    assert next(t for t in told if "least 5.0x faster, where" in t["target"])["met"] == "yes"
    projection = model.project(fitted["compute"], fitted["links"], scaling.ratios())
    machine = {"cpu": "x", "cores": 2, "load_before": 0.1}
    result = {
        "batch": 128,
        "machine": machine,
        "how": "namespaces",
        "versions": {"torch": "2"},
        "backend": "gloo",
        "seed": 0,
        "worlds": made,
        "model": fitted,
        "targets": told,
        "projection": projection,
    }
    for name, make in tables.TABLES.items():
        assert name == "scaling-setting" or make({"scaling": result}).count("\n") > 2
    efficiency = tables.scaling(result)
    assert "| 2 | " in efficiency
    assert "| 4 | " not in efficiency  # four processes share two cores: no speed-up is told
    assert all(line.endswith("– |") for line in tables.steps(result).splitlines() if line.startswith("| 4 "))


@pytest.mark.parametrize(("load", "told"), [(0.1, "Nothing else ran"), (9.0, "shared with other programs")])
def test_the_page_says_whether_other_programs_ran(load, told):
    result = {"machine": {"cpu": "x", "cores": 2, "load_before": load}, "how": "hook", "versions": {"torch": "2"},
              "backend": "gloo", "seed": 0}  # fmt: skip
    assert told in tables.setting(result)


def test_a_quick_run_from_end_to_end(tmp_path):
    path = tmp_path / "scaling.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", "--quick", "--json", str(path)], cwd=ROOT, check=True, timeout=300
    )
    result = json.loads(path.read_text())
    alone, two = result["worlds"]
    assert (alone["size"], two["size"]) == (1, 2)
    assert [link["link"] for link in two["links"]] == ["unbounded", "100 Mbit/s"]
    for link in two["links"]:
        for dense, shrunk in tables.pairs(link):
            assert shrunk["payload"] < dense["payload"] / 3
            if result["how"] == "namespaces":  # a ring of two sends the payload once, and headers
                assert dense["payload"] < dense["bytes_on_link"] < 1.2 * dense["payload"]
                assert shrunk["bytes_on_link"] < dense["bytes_on_link"] / 3
    slow = two["links"][1]["sums"][-1]  # 1.2 MB at 100 Mbit/s: 96 ms, less what the bucket lets through at once
    assert slow["seconds"] > 0.05
    for name in ("scaling-steps", "scaling-events", "scaling-model"):
        assert tables.TABLES[name]({"scaling": result}).count("\n") > 2
    assert "gloo" in tables.TABLES["scaling-setting"]({"scaling": result})


def test_a_share_that_noise_hides_is_called_unknown():
    from benchmarks.cluster.tables import _rate

    assert _rate(1e-9, 0.0) == "unknown"
    assert _rate(1e-9, 1e-11) == "100"
