"""The zoo benchmark: shares are counted right, one network of each library is measured, a crash costs one row."""

from __future__ import annotations

import importlib.util
import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.zoo import __main__ as command
from benchmarks.zoo import measure as zoo
from benchmarks.zoo import page, runs, shrunk_config, timm_networks, transformers_networks
from benchmarks.zoo.workers import rows
from distributed.launched import ran

ROOT = Path(__file__).resolve().parents[2]


def missing(*names):
    return [name for name in names if importlib.util.find_spec(name) is None]


class Half(nn.Module):
    """Two layers side by side; the second is normalised over its channels, and stays."""

    def __init__(self):
        super().__init__()
        self.free, self.stays, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(12, 3)

    def forward(self, x):
        return self.last(torch.cat([self.free(x), nn.functional.layer_norm(self.stays(x), (6,))], -1))


def candidates(building, net=Half):
    with building():
        model = net()
    yield zoo.Built(model, (torch.randn(2, 4),))


def test_the_share_counts_the_axes_that_may_go():
    row = zoo.measure(candidates)
    assert row["captured"]
    assert row["macs"] == 2 * (4 * 6 + 4 * 6 + 12 * 3)
    assert row["share"] == (4 * 6 + 12 * 3 / 2) / (4 * 6 + 4 * 6 + 12 * 3)  # half of the last layer's columns may go
    assert (row["groups"], row["groups_free"], row["channels_free"]) == (3, 1, 6)
    assert {pin["groups"] for pin in row["pins"].values()} == {1}


def test_a_network_of_free_layers_counts_in_full():
    row = zoo.measure(partial(candidates, net=lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))))
    assert (row["share"], row["groups"], row["groups_free"]) == (1.0, 2, 1)
    assert row["pins"]["output"]["channels"] == 3


def test_the_figures_are_the_same_on_fake_tensors(monkeypatch):
    real = zoo.measure(candidates)
    monkeypatch.setattr(zoo, "FEW", 0)
    fake = zoo.measure(candidates)
    assert (real.pop("fake"), fake.pop("fake")) == (False, True)
    assert {k: v for k, v in real.items() if "seconds" not in k} == {
        k: v for k, v in fake.items() if "seconds" not in k
    }


def test_what_does_not_run_is_no_error_of_a_capture():
    class Broken(nn.Linear):
        def forward(self, x):
            raise RuntimeError("no such thing")

    row = zoo.measure(partial(candidates, net=lambda: Broken(4, 2)))
    assert (row["built"], row["captured"]) == (False, False)
    assert "no such thing" in row["error"]


def test_a_model_type_of_transformers():
    if missing("transformers"):
        pytest.skip("needs transformers")
    row = zoo.measure(partial(transformers_networks.candidates, "bert"))
    assert row["captured"]
    assert row["share"] > 0.8
    assert row["parameters"] < 1_000_000


def test_a_network_of_timm():
    if missing("timm", "torchvision"):
        pytest.skip(f"needs {' and '.join(missing('timm', 'torchvision'))}")
    timm_networks.load_torchvision()
    row = zoo.measure(partial(timm_networks.candidates, "resnet18"))
    assert row["captured"]
    assert row["share"] > 0.97


def test_without_timm_the_command_says_what_is_missing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['torchvision'] = None\n"
    code += "sys.argv = ['zoo', '--families', 'timm']; from benchmarks.zoo.__main__ import main; main()"
    done = ran(code, cwd=tmp_path)
    assert done.wait() != 0
    assert done.told().strip().splitlines()[-1].startswith("the networks of timm need timm and torchvision: pip insta")


def work(family, name):
    if name == "crash":
        os._exit(3)
    if name == "hang":
        while True:
            time.sleep(0.0)
    return {"built": True, "captured": True, "error": ""}


def test_a_crash_and_a_hang_cost_one_row_each():
    names = ("one", "crash", "hang", "two")
    found = {name: row for _, name, row in rows(work, [("x", name) for name in names], 2, 1.0)}
    assert set(found) == set(names)
    assert (found["one"]["captured"], found["two"]["captured"]) == (True, True)
    assert "ended with 3" in found["crash"]["error"]
    assert "no result after 1 s" in found["hang"]["error"]


def test_a_run_goes_on_where_it_was_cut_off(tmp_path):
    path, run = tmp_path / "zoo.unfinished", runs.record(2, 15.0)
    log = runs.Log(path, run, resume=False)
    log.add("timm", "a", {"built": True})
    path.write_text(path.read_text() + '["timm", "b", {"bui')  # cut off while it wrote
    again = runs.Log(path, runs.record(3, 15.0), resume=True)
    assert again.rows == [("timm", "a", {"built": True})]
    assert again.run["processes"] is None  # two, then three
    assert again.seconds >= log.seconds - 0.5
    with pytest.raises(SystemExit, match=r"has another versions\. Start again without --resume"):
        runs.Log(path, {**run, "versions": {}}, resume=True)
    assert runs.Log(path, run, resume=False).rows == []


def test_rows_say_of_which_run_they_are():
    first, second = {"code": "1"}, {"code": "2"}
    known = runs.merged({}, first, [("timm", "a", {}), ("timm", "b", {})])
    both = runs.merged(known, second, [("timm", "b", {}), ("timm", "c", {})])
    assert [(n, r["run"]) for n, r in both["families"]["timm"].items()] == [("a", 0), ("b", 1), ("c", 1)]
    assert both["runs"] == [first, second]
    new = runs.merged(both, {"code": "3"}, [("timm", name, {}) for name in "abc"])
    assert new["runs"] == [{"code": "3"}]  # of the others no row is left


def test_large_weights_are_not_drawn_and_building_ends():
    with zoo.unfilled():
        large = torch.full((300, 300), 9.0)
        assert nn.init.trunc_normal_(large, std=0.02).max() == 9.0
        assert nn.init.trunc_normal_(torch.full((30, 30), 9.0), std=0.02).max() <= 2.0
    assert nn.init.trunc_normal_(large, std=0.02).max() <= 2.0


def test_configurations_made_small_keep_a_layer_of_every_kind():
    old = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 6, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 32000, "eos_token_id": 31999, "head_dim": 128,
           "layer_types": ["linear", "linear", "linear", "full", "linear", "full"]}  # fmt: skip
    new = shrunk_config.shrunk(old, shrunk_config.FULL)
    assert new["layer_types"] == ["linear", "linear", "full"]
    assert (new["num_hidden_layers"], new["hidden_size"], new["intermediate_size"]) == (3, 64, 176)
    assert (new["num_attention_heads"], new["num_key_value_heads"], new["head_dim"]) == (4, 4, 32)
    assert new["eos_token_id"] < new["vocab_size"] == 128


def test_the_figures_are_of_what_is_asked_for():
    if not page.RESULTS.exists():
        pytest.skip("no figures yet")
    families = page.read()["families"]
    assert set(timm_networks.CHOSEN.values()) | set(timm_networks.MORE) <= set(families["timm"])
    failed = {name: row["error"] for rows in families.values() for name, row in rows.items()
              if row["built"] and not row["captured"]}  # fmt: skip
    assert failed == {}
    assert set(command.FAMILIES) == set(families)
