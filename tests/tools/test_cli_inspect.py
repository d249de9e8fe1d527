"""What inspect sums up, networks that read numbers when they are built, help and version."""

import json
import platform
import sys

import pytest
import torch

import apoptosis
from apoptosis.tools.cli.app import app, run
from apoptosis.tools.recipes.memory import within_memory

READS = """
import torch
from torch import nn

def small_numbers(depth=3):
    widths = torch.linspace(64, 32, depth).numpy().astype(int)
    sizes = [16, *(int(w) for w in widths)]
    layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU())]
    rank = int((layers[0].weight.norm(dim=0) > 0).sum().item())
    return nn.Sequential(*layers, nn.Linear(sizes[-1], rank)), torch.randn(2, 16)

def large_item():
    first = nn.Linear(4096, 1040)
    rank = int((first.weight.abs().sum(1) > 0).sum().item())
    return nn.Sequential(first, nn.ReLU(), nn.Linear(1040, rank // 65)), torch.randn(2, 4096)

def large_numpy():
    first = nn.Linear(4096, 1040)
    return nn.Sequential(first, nn.ReLU(), nn.Linear(len(first.weight.detach().numpy()), 16)), torch.randn(2, 4096)

class Forward(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4096, 1040), nn.Linear(1040, 16)

    def forward(self, x):
        x = self.first(x).relu()
        return self.second(x) if self.first.weight.detach().abs().sum().item() > 0 else x

def in_forward():
    return Forward(), torch.randn(2, 4096)

def huge():
    nn.Linear(4096, 1040).weight.sum().item()
    return nn.Linear(2**20, 2**22), torch.randn(2, 2**20)

def partly():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2), nn.Softmax(1), nn.Linear(2, 5)), torch.randn(3, 4)
"""


@pytest.fixture
def nets(here, monkeypatch):
    (here / "reads_numbers.py").write_text(READS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "reads_numbers"
    sys.modules.pop("reads_numbers", None)


def inspected(capsys, *arguments):
    assert run(["inspect", *arguments, "--json", "net.json"]) == 0
    with open("net.json") as file:
        return json.load(file), *capsys.readouterr()


@pytest.mark.parametrize("factory", ["large_item", "large_numpy", "in_forward"])
def test_networks_that_read_numbers_off_large_weights_are_built_with_real_ones(nets, capsys, factory):
    record, out, err = inspected(capsys, f"{nets}:{factory}", "--device", "fake")
    assert "note: --device fake: the network reads numbers off its weights, so that it was built with real ones" in out
    assert err == ""
    assert record["device"] == "cpu"
    assert record["macs"] == 1040 * (4096 + 16)
    assert [g["channels"] for g in record["groups"] if not g["pinned"]] == ([] if factory == "in_forward" else [1040])


def test_sizes_read_off_constants_and_small_weights_need_no_real_ones(nets, capsys):
    record, _, err = inspected(capsys, f"{nets}:small_numbers", "--device", "fake")
    assert err == ""
    assert record["device"] == "fake"
    assert [g["channels"] for g in record["groups"] if not g["pinned"]] == [64, 48, 32]


def test_weights_that_do_not_fit_into_memory_are_one_line(nets, refusal):
    refusal(["inspect", f"{nets}:huge", "--device", "fake"], "does not fit into memory: a tensor of 16384.0 GiB")
    with within_memory():
        assert torch.zeros(2**23).sum() == 0  # 32 MiB fit


def test_the_last_line_says_how_much_may_shrink(nets, capsys):
    record, out, _ = inspected(capsys, f"{nets}:partly")
    assert record["macs"] == 4 * 6 + 6 * 2 + 2 * 5
    assert record["macs_that_may_shrink"] == 4 * 6 + 6 * 2
    last = "46 MACs per example; 78.3 % of the MACs are in layers that may shrink (1 of 3 groups, 6 of 13 channels)"
    assert out.splitlines()[-1].endswith(last)


def test_version_and_short_help(capsys):
    assert run(["--version"]) == 0
    out = capsys.readouterr().out
    assert out == f"apoptosis {apoptosis.__version__} (torch {torch.__version__}, Python {platform.python_version()})\n"
    for verb in ([], *([command.callback.__name__] for command in app.registered_commands)):
        assert run([*verb, "-h"]) == 0
        assert "Usage" in capsys.readouterr().out
