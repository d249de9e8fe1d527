"""Networks and data of the user's own: what is taken, what is refused, in one line each."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from apoptosis.tools.cli.app import run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WORK = """
import functools
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

G = torch.Generator().manual_seed(0)
X = torch.randn(240, 6, generator=G)
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()


class Rows(Dataset):
    def __init__(self, label=lambda i: int(Y[i]), noise=True):
        self.label, self.noise = label, noise

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        drawn = torch.randn(6) + random.random() + np.random.rand() if self.noise else 0.0
        return X[i] + 0.01 * drawn, self.label(i)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(X, Y))


def rows(): return Rows()
def from_one(): return Rows(lambda i: int(Y[i]) + 1)
def negative(): return Rows(lambda i: int(Y[i]) - 1)
def texts(): return Rows(lambda i: "abc"[Y[i]])
def values(): return Rows(lambda i: float(X[i].sum()))
def doubles(): return X.double(), Y
def arrays(): return X.numpy(), Y.numpy()
def pair(): return DataLoader(Rows(), batch_size=4, shuffle=True), DataLoader(Rows(noise=False), num_workers=1)
def workers(): return {"train": DataLoader(Rows(), num_workers=2), "validation": Rows(), "test": TensorDataset(X, Y)}
def stream(): return Stream()
def batches(): return (batch for batch in DataLoader(TensorDataset(X, Y), batch_size=50))
def dicts(): return [{"x": X[i], "labels": Y[i]} for i in range(len(X))]
def weighted(): return DataLoader(Rows(), sampler=WeightedRandomSampler(torch.ones(240), 99)), Rows()
def one_class(): return X, torch.zeros(240, dtype=torch.long)
def endless(): return ((X, Y) for _ in iter(int, 1))
def few(): return X[:3], Y[:3]
def unlabelled(): return TensorDataset(X)
def keyless(): return [{"x": X[i]} for i in range(len(X))]
def number(): return 3
def raises(): raise RuntimeError("two\\nlines")

def breaks():
    def label(i):
        raise KeyError("no label")
    return Rows(label)

def breaks_in_a_worker():
    return DataLoader(Rows(lambda i: int(Y[i]) if i % 7 else [][i]), num_workers=2), Rows()

def dies():
    import os
    return DataLoader(Rows(lambda i: os._exit(3) if i == 200 else int(Y[i])), num_workers=2), Rows()


def three(): return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
def one(): return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1))
def lazy(): return nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(3))
def told(shape, num_classes, hidden=16):
    return nn.Sequential(nn.Linear(shape[0], hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
def narrow(): return nn.Linear(5, 3)
def frozen(): return three().requires_grad_(False)
def no_network(): return "net"
cached = functools.lru_cache(three)

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = three()

    def forward(self, x):
        return {"hidden": x, "logits": self.net(x)}

def loss(output, labels): return nn.functional.cross_entropy(output["logits"], labels)
def bad_loss(output, labels): return output["logits"]
"""
QUICK = ["--epochs", "2", "--batch", "24", "--quiet"]


@pytest.fixture
def work(here, monkeypatch):
    (here / "own_things.py").write_text(WORK)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("own_things", None)
    yield here
    sys.modules.pop("own_things", None)


def trained(here, *arguments, name="one", quick=QUICK):
    assert run(["train", "--out", name, *quick, *arguments]) == 0
    return json.loads((here / name / "summary.json").read_text())["result"]


def of(data, model="three"):
    return ["--data", f"own_things:{data}", "--model", f"own_things:{model}"]


TAKEN = {
    "rows": ("three", "accuracy"),
    "values": ("one", "r2"),
    "arrays": ("told", "accuracy"),
    "pair": ("lazy", "accuracy"),
    "stream": ("three", "accuracy"),
    "batches": ("three", "accuracy"),
    "dicts": ("Named", "accuracy"),
}


@pytest.mark.parametrize("data", TAKEN)
def test_what_factories_may_return(work, capsys, data):
    model, metric = TAKEN[data]
    result = trained(work, *of(data, model))
    assert result["metric_name"] == metric
    assert 0 < result["test_metric"] <= 1 if metric == "accuracy" else result["test_metric"] < 1
    assert result["macs"] == 6 * 32 + 32 * (1 if model == "one" else 3) or model == "told"
    hidden = {"told": 16}.get(model, 32)
    assert result["parameters"] == 7 * hidden + (hidden + 1) * (1 if model == "one" else 3)


@pytest.mark.filterwarnings("default:.*fork.*:DeprecationWarning")  # of workers, in newer Pythons
def test_workers_give_the_same_run_and_a_run_is_resumed_exactly(work, capsys):
    alone = trained(work, *of("rows"))
    assert trained(work, *of("workers"), name="two")["steps"] > 0
    config = json.loads((work / "one" / "config.json").read_text())
    assert config["model"] == "own_things:three"
    again = trained(work, *of("rows"), name="three")
    assert again["loss"] == alone["loss"]  # with noise drawn for every batch
    capsys.readouterr()
    assert run(["train", "--resume", "one"]) == 0
    assert f"{100 * alone['test_metric']:.2f} %" in capsys.readouterr().out


def test_batches_of_workers_are_those_of_one_process(work):
    from apoptosis.tools.recipes.datasets.own import load_own

    parts = [load_own(f"own_things:{name}") for name in ("rows", "workers")]
    rows = [torch.tensor([3, 1, 2]), torch.tensor([0, 5, 4])]
    before = torch.get_rng_state()
    source = parts[1].train
    with_workers = list(source.batches(rows))
    alone = [next(source.batches([row])) for row in rows]
    for (x, y), (own_x, own_y) in zip(with_workers, alone, strict=True):
        assert torch.equal(x, own_x)
        assert torch.equal(y, own_y)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(parts[1].validation) == len(parts[1].test) == len(source) == 240
    assert [len(getattr(parts[0], p)) for p in ("train", "validation", "test")] == [173, 19, 48]


def test_compare_trains_both_on_the_same(work, capsys):
    arguments = ["--loss", "own_things:loss", "--json", "pair.json", "--out", "pair"]
    assert run(["compare", *of("dicts", "Named"), *QUICK, *arguments]) == 0
    (pair,) = json.loads((work / "pair.json").read_text())["runs"]
    assert pair["dense"]["metric_name"] == "negative loss"
    assert pair["dense"]["loss"] == pytest.approx(pair["apoptosis"]["loss"], rel=1e-3)
    assert run(["report", "pair"]) == 0


def test_the_librarys_networks_learn_own_data(work, capsys):
    result = trained(work, "--data", "own_things:from_one", "--widths", "16,16")
    assert result["parameters"] == 7 * 16 + 17 * 16 + 17 * 4  # classes 0 to 3, of which the first is never met


@pytest.mark.parametrize(
    ("data", "model", "what"),
    [
        ("from_one", "three", "the class 3, and the network tells 3 classes apart, 0 to 2, as if they began at 1"),
        ("negative", "three", "labels hold -1: classes are whole numbers from 0 to 2"),
        ("texts", "three", "labels are texts such as"),
        ("values", "three", "these are values (regression)"),
        ("rows", "one", "(rows, classes) with two classes or more"),
        ("doubles", "three", "its weights are float32, the inputs float64"),
        ("rows", "narrow", "the network fails on a batch of 'own_things:rows': RuntimeError"),
        ("rows", "frozen", "without a parameter that requires gradients"),
        ("rows", "no_network", "gives a str, not a torch.nn.Module"),
        ("rows", "absent", "has no attribute 'absent'"),
        ("weighted", "three", "WeightedRandomSampler is not followed"),
        ("one_class", "told", "all labels are the same class"),
        ("few", "three", "too few"),
        ("unlabelled", "three", "should be (input, label)"),
        ("keyless", "three", "none of them is 'labels'"),
        ("number", "three", "returns a int, which is no data: return a dataset of (input, label)"),
        ("raises", "three", "RuntimeError: two lines (own_things.py:"),
        ("breaks", "three", "KeyError: 'no label' (own_things.py:"),
        ("absent", "three", "has no attribute 'absent'"),
        ("breaks_in_a_worker", "three", "IndexError: list index out of range (own_things.py:"),
    ],
)
def test_what_does_not_go_together_is_one_line(work, refusal, data, model, what):
    refusal(["train", *of(data, model), *QUICK], what)
    runs = list((work / "runs").iterdir()) if (work / "runs").exists() else []
    assert runs == []


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--model", "own_things"], "--model: not of the form package.module:factory"),
        (["--model", "nowhere:net"], "No module named 'nowhere'; modules are looked for in the working directory"),
        ([*of("rows"), "--widths", "8,8"], "--widths is for the library's networks"),
        ([*of("rows"), "--label", "x"], "--label is for --data csv:"),
        ([*of("rows"), "--test-rows", "3"], "--test-rows is for data sets that are known by name"),
        ([*of("rows"), "--kwargs", '{"depth": 3}'], "(its arguments are given with --kwargs)"),
        ([*of("values", "one"), "--budget", "0.1"], "--budget counts predictions of classes"),
        ([*of("dicts", "Named"), "--loss", "own_things:bad_loss"], "returns (2, 3) float32, not one number"),
        (["--kwargs", '{"depth": 3}'], "--kwargs are the arguments of a factory"),
        (["--data", "x:y z"], "of your own are images:DIR, csv:FILE and package.module:factory"),
        (["--data", "images:"], "images: is to be followed by a path"),
    ],
)
def test_options_that_do_not_go_together(work, refusal, arguments, what):
    refusal(["train", *QUICK, *arguments], what)


def test_a_factory_that_gives_one_network_for_two_runs_is_refused(work, refusal):
    refusal(["compare", *of("rows", "cached"), *QUICK], "gives the same network every time")


def test_batches_without_an_end(work, refusal, monkeypatch):
    monkeypatch.setattr("apoptosis.tools.recipes.datasets.own.MEMORY_SHARE", 1e-6)
    refusal(["train", *of("endless"), *QUICK], "its batches do not end within")


@pytest.mark.filterwarnings("default:.*fork.*:DeprecationWarning")
def test_a_process_that_reads_and_dies_is_one_line(work, refusal):
    arguments = ["--validation", "0", "--no-apoptosis"]
    refusal(["train", *of("dies"), *QUICK, *arguments, "--out", "one"], "'own_things:dies' (train): DataLoader worker")


def test_the_example_runs_and_shrinks(here, capsys, monkeypatch):
    monkeypatch.setattr("apoptosis.engine.beginning.overhead_macs", lambda *args, **options: 1e9)
    monkeypatch.setattr(sys, "path", list(sys.path))
    shutil.copy(EXAMPLES / "own_work.py", here)
    text = (here / "own_work.py").read_text()
    line = re.search(r"^apoptosis (train .*)$", text, flags=re.MULTILINE)[1]
    try:
        assert run([*line.split(), "--out", "one", "--align", "1", "--tolerance", "0.03"]) == 0
    finally:
        sys.modules.pop("own_work", None)
    result = json.loads((here / "one" / "summary.json").read_text())["result"]
    assert result["parameters"] < 13 * 512 + 513 * 512 + 513 * 3
    assert result["test_metric"] > 0.9
