"""The command: results on stdout, one line on stderr and status 2 for bad input."""

import gzip
import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from apoptosis import save
from apoptosis.tools.cli.app import run
from distributed.launched import Launched

TINY = ["--train-rows", "1500", "--widths", "32,32", "--batch", "32"]


def train_tiny(path, *more):
    assert run(["train", *TINY, "--epochs", "1", "--out", str(path), "--quiet", *more]) == 0


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--data", "digit"], "--data: unknown; there are digits"),
        (["--network", "mpl"], "--network: unknown; there are mlp"),
        (["--widths", "64,0"], "--widths"),
        (["--widths", "64;64"], "'64;64' is not whole numbers"),
        (["--widths", "-3"], "--widths"),
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "many"], "--epochs"),
        (["--criterion", "best"], "best"),
        (["--budget", "0.002", "--train-rows", "500"], "N ="),
        (["--device", "gpu"], "--device"),
        (["--network", "cnn", "--widths", "8"], "cnn"),
        (["--data", "mnist", "--test-rows", "5"], "test_rows is for higgs"),
        (["--nonsense"], "--nonsense"),
        (["--resume", "nowhere"], "nowhere"),
    ],
)
def test_train_refuses_bad_options_before_anything_runs(here, refusal, arguments, what):
    refusal(["train", *arguments], what)
    assert not list(here.iterdir()) or not list((here / "runs").iterdir())


@pytest.mark.parametrize("command", ["train", "compare"])
def test_bad_data_files(here, refusal, command):
    folder = here / "data" / "higgs"
    folder.mkdir(parents=True)
    good = gzip.compress(("1.0," + ",".join(["0.5"] * 28) + "\n").encode() * 50)
    (folder / "HIGGS.csv.gz").write_bytes(good[:-20])
    arguments = [command, "--data", "higgs", "--data-dir", str(here / "data"), "--epochs", "1"]
    refusal(arguments, "HIGGS.csv.gz' is cut off")
    (folder / "HIGGS.csv.gz").write_bytes(good)
    refusal(arguments, "holds 50 rows")


def test_nan_loss_is_one_line(here, refusal):
    arguments = ["train", *TINY, "--epochs", "2", "--lr", "1e30", "--quiet", "--no-apoptosis"]
    refusal(arguments, "the training loss is")
    refusal(["compare", *arguments[1:-1]], "the training loss is")


def test_a_folder_that_cannot_be_written(here, capsys, refusal):
    (here / "file").write_text("")
    refusal(["train", *TINY, "--out", "file/run"], "file/run")
    refusal(["compare", *TINY, "--out", "ok", "--json", "no/such/folder.json"], "--json: there is no folder")
    assert not (here / "ok").exists()


def test_train_writes_resumes_and_is_never_written_over(here, capsys, refusal):
    train_tiny("one")
    out = capsys.readouterr().out
    assert "test accuracy" in out
    assert "run folder: one" in out
    assert {p.name for p in (here / "one").iterdir()} == {
        "config.json",
        "events.jsonl",
        "last.safetensors",
        "summary.json",
    }
    refusal(["train", *TINY, "--out", "one"], "'one' holds a run already")
    refusal(["train", "--resume", "one", "--epochs", "5"], "--epochs: the run in 'one' has 1, not 5")
    assert run(["train", "--resume", "one", "--epochs", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split(" parameters")[0] in out


def test_checkpoint_of_another_network(here, capsys, refusal):
    train_tiny("one")
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    save(here / "one" / "last.safetensors", other, torch.optim.Adam(other.parameters()))
    capsys.readouterr()
    refusal(["train", "--resume", "one"], "last.safetensors")
    refusal(["plan", "one"], "last.safetensors")
    (here / "one" / "last.safetensors").write_bytes(b"not a checkpoint")
    refusal(["train", "--resume", "one"], "last.safetensors")
    refusal(["plan", "one"], "last.safetensors")


def test_compare_prints_and_writes(here, capsys):
    arguments = ["compare", *TINY, "--epochs", "1", "--seeds", "0,1", "--out", "pair", "--json", "pair.json"]
    assert run(arguments) == 0
    out = capsys.readouterr().out
    result = json.loads((here / "pair.json").read_text())
    assert result == json.loads((here / "pair" / "summary.json").read_text())
    assert [r["seed"] for r in result["runs"]] == result["seeds"] == [0, 1]
    assert result["config"]["widths"] == [32, 32]
    assert {"python", "torch", "numpy"} <= result["versions"].keys()
    assert {"cpu", "cores", "threads"} <= result["machine"].keys()
    for entry in result["runs"]:
        assert f"{100 * entry['dense']['test_metric']:.2f} %" in out
        assert f"{entry['speedup_run']:.2f}x" in out
        assert {"step_seconds", "seconds_training", "seconds_run", "test_metric", "macs"} <= entry["dense"].keys()
        assert "accuracy_cost" in entry["ledger"]
    assert out.count("epoch 1/1") == 4  # plain lines, no bars
    assert "\x1b" not in out
    assert run(["report", "pair"]) == 0
    page = Path(capsys.readouterr().out.removeprefix("report: ").strip())
    assert page.suffix == ".html"
    assert page.exists()


@pytest.mark.parametrize("seeds", ["0,0", "-1", "a", ""])
def test_compare_refuses_bad_seeds(here, refusal, seeds):
    refusal(["compare", "--seeds", seeds], "--seeds")


def test_report_of_something_else(here, refusal):
    refusal(["report", "."], "not a run folder")


def test_plan_says_what_would_go_and_writes_nothing(here, capsys, refusal):
    train_tiny("one", "--exclude", "*")
    before = {path: path.read_bytes() for path in (here / "one").iterdir()}
    (here / "free").mkdir()
    config = json.loads((here / "one" / "config.json").read_text())
    (here / "free" / "config.json").write_text(json.dumps({**config, "exclude": []}))
    (here / "free" / "last.safetensors").write_bytes((here / "one" / "last.safetensors").read_bytes())
    capsys.readouterr()
    assert run(["plan", "free", "--tolerance", "0.5", "--json", "plan.json"]) == 0
    out = capsys.readouterr().out
    plan = json.loads((here / "plan.json").read_text())
    assert any(after < before for before, after in plan["groups"].values())
    for name, (wide, narrow) in plan["groups"].items():
        assert f"{name}: {wide} -> {narrow} channels" in out
    assert {path: path.read_bytes() for path in (here / "one").iterdir()} == before
    assert run(["plan", "free/last.safetensors", "--tolerance", "0.5"]) == 0
    again = capsys.readouterr().out
    assert again.splitlines()[1:-2] == out.splitlines()[1:-2]  # the event, two lines, says the seconds it took
    refusal(["plan", "nowhere"], "'nowhere'")
    refusal(["plan", "plan.json"], "config.json")


NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.first, self.second = nn.Linear(6, width), nn.Linear(width, 3)
        self.mixed = nn.Linear(3, 5)

    def forward(self, x):
        return torch.sort(self.mixed(self.second(torch.relu(self.first(x)))))[0]

def wrong():
    return 3

def fails():
    raise RuntimeError("two\\nlines")
"""


def test_inspect(here, capsys, monkeypatch, refusal):
    (here / "my_nets.py").write_text(NETS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ["inspect", "my_nets:Net", "--input-shape", "6", "--kwargs", '{"width": 20}', "--json", "net.json"]
    assert run(arguments) == 0
    out = capsys.readouterr().out
    record = json.loads((here / "net.json").read_text())
    free = {group["name"]: group for group in record["groups"] if not group["pinned"]}
    assert free["first"]["channels"] == 20
    assert [site["module"] for site in free["first"]["sites"]] == ["second"]
    assert record["macs"] == 6 * 20 + 20 * 3 + 3 * 5
    assert any("sort" in pin["reason"] for pin in record["pins"])
    assert "first" in out
    assert "sort" in out
    for factory, what in (("wrong", "gives a int"), ("fails", "RuntimeError"), ("absent", "absent")):
        refusal(["inspect", f"my_nets:{factory}", "--input-shape", "6"], what)
    refusal(["inspect", "my_nets", "--input-shape", "6"], "package.module:factory")
    refusal(["inspect", "no_such_module:x", "--input-shape", "6"], "no_such_module")
    refusal(["inspect", "my_nets:Net", "--input-shape", "7"], "Net")
    refusal(["inspect", "my_nets:Net", "--input-shape", "a"], "--input-shape")
    refusal(["inspect", "my_nets:Net", "--input-shape", "0"], "--input-shape")
    refusal(["inspect", "my_nets:Net", "--input-shape", "6", "--kwargs", "{"], "--kwargs")
    refusal(["inspect", "my_nets:Net"], "--input-shape")
    refusal(["inspect", "my_nets:Net", "--input-shape", "6", "--device", "abacus"], "--device")


INSPECTED = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 16), nn.Linear(16, 6), nn.LayerNorm(6)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(4, 6), nn.ModuleList([Block() for _ in range(3)]), nn.Linear(6, 2)
        self.spare = nn.Linear(3, 3)

    def forward(self, x, scale=None):
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return {"logits": self.head(h) * scale}

def deep():
    return Deep(), {"x": torch.randn(5, 4), "scale": torch.ones(5, 1)}

def wrapped():
    return torch.compile(Deep(), backend="eager"), (torch.randn(5, 4), torch.ones(5, 1))

def fixed():
    return nn.Linear(4, 2), torch.randn(2, 4)

def reads_data():
    class Reads(nn.Linear):
        def forward(self, x):
            return super().forward(x) * x.sum().item()
    return Reads(4, 2), torch.randn(2, 4)

def sharded():
    return nn.DataParallel(nn.Linear(4, 2)), torch.randn(2, 4)
"""


@pytest.mark.parametrize("device", ["cpu", "meta", "fake"])
@pytest.mark.parametrize("factory", ["deep", "wrapped"])
def test_inspect_takes_a_factory_of_model_and_example(here, capsys, monkeypatch, factory, device):
    (here / "inspected.py").write_text(INSPECTED)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert run(["inspect", f"inspected:{factory}", "--device", device, "--json", "net.json"]) == 0
    out = capsys.readouterr().out
    record = json.loads((here / "net.json").read_text())
    assert record["device"] == device
    assert [g["name"] for g in record["groups"] if not g["pinned"]] == [f"blocks.{i}.up" for i in range(3)]
    assert record["macs"] == 4 * 6 + 3 * 2 * 6 * 16 + 6 * 2  # per example, of which there are five
    pins = {pin["group"]: pin for pin in record["pins"]}
    assert pins["stem"]["operator"] == "aten.native_layer_norm"
    assert pins["stem"]["code"] == "norm"
    assert pins["head"]["reason"] == "they are the network's output 'logits'"
    assert "BatchNorm" in pins["stem"]["remedy"]
    assert re.search(r"blocks\.\*\.up \(x 3\) +16 +12", out)
    for head in ("why", "operator", "line", "what would unpin it"):
        assert head in out
    assert "note: module 'spare' is not run" in out
    del sys.modules["inspected"]


def test_inspect_says_plainly_that_nothing_may_shrink(here, capsys, monkeypatch, refusal):
    (here / "inspected2.py").write_text(INSPECTED)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert run(["inspect", "inspected2:fixed"]) == 0
    assert "nothing can be removed from this network" in capsys.readouterr().out
    refusal(["inspect", "inspected2:reads_data", "--device", "meta"], "_local_scalar_dense")
    refusal(["inspect", "inspected2:sharded"], "DataParallel")


def test_help_and_no_arguments(capsys, refusal):
    for arguments in ([], ["--help"], ["train", "--help"]):
        assert run(arguments) == 0
        assert "Usage" in capsys.readouterr().out
    refusal(["trian"], "trian")


def test_sigint_keeps_a_checkpoint_from_which_the_run_goes_on(here, refusal):
    arguments = [*TINY, "--train-rows", "8000", "--epochs", "400", "--out", "long"]
    code = "import warnings; warnings.simplefilter('error'); from apoptosis.tools.cli import main; main()"
    child = Launched("none", 1, "-c", code, "train", *arguments, cwd=here)
    deadline = time.monotonic() + 200
    while not (here / "long" / "last.safetensors").exists() and time.monotonic() < deadline:
        assert child.process.poll() is None, child.told()
        time.sleep(0.05)
    child.interrupt()
    assert child.wait() == 130, child.told()
    assert child.told().count("\n") == 1
    assert child.told().startswith("apoptosis: error: interrupted")
    refusal(["train", "--resume", "long", "--seed", "1"], "--seed: the run in 'long' has 0, not 1")
