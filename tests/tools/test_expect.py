"""plan of a network that was not trained yet: shares, seconds by the table, pins worth removing."""

import json
import sys

import pytest
import torch

from apoptosis.tools.cli.app import run

NETS = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))

class Stream(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(8, width), nn.Sequential(*[Block(width) for _ in range(2)]), None
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))

def plain(): return nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3))
def fixed(): return nn.Linear(8, 3)
def with_example(): return plain(), torch.randn(5, 8)
def data(): return torch.randn(200, 8), torch.randint(0, 3, (200,))
def three_inputs(): return torch.randn(200, 9), torch.randint(0, 3, (200,))
"""


@pytest.fixture
def nets(here, monkeypatch):
    (here / "new_nets.py").write_text(NETS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("new_nets", None)
    yield here
    sys.modules.pop("new_nets", None)


def planned(capsys, *arguments):
    assert run(["plan", *arguments, "--json", "plan.json"]) == 0
    with open("plan.json") as file:
        return json.load(file), capsys.readouterr().out


def test_shares_of_a_plain_network(nets, capsys):
    record, out = planned(capsys, "new_nets:plain", "--input-shape", "8", "--target", "2x", "--align", "1")
    assert record["macs"] == record["shrinkable"] == 8 * 256 + 256 * 256 + 256 * 3
    assert record["groups"] == [2, 3]
    half = record["widths"][1]
    assert half["macs"] == 8 * 128 + 128 * 128 + 128 * 3
    assert half["parameters"] == 9 * 128 + 129 * 128 + 129 * 3
    seconds = [record["step"], *(width["seconds"] for width in record["widths"])]
    assert seconds == sorted(seconds, reverse=True)
    assert record["measured"] > 0
    assert record["held"] == []
    assert "what to expect of 'new_nets:plain'; nothing is trained or written" in out
    assert "target 0.5 of the multiply-adds of a forward pass: about 70 % of the channels of every group stay" in out
    assert "by a table measured now" in out
    assert sorted(path.name for path in nets.iterdir() if path.is_file()) == ["new_nets.py", "plan.json"]


def test_pins_worth_removing_say_what_they_hold(nets, capsys):
    record, out = planned(capsys, "--model", "new_nets:Stream", "--data", "new_nets:data", "--align", "1")
    (held,) = record["held"]
    assert held["groups"] == ["stem"]
    inner = 2 * 2 * 64 * 256  # both layers of both blocks, which are at half already
    ends = 8 * 64 + 64 * 3
    assert held["macs"] == pytest.approx((inner / 4 + ends / 2) / (inner + ends))
    assert "BatchNorm" in held["remedy"]
    assert "pins worth removing" in out
    assert "'stem' (64 channels): operator aten.native_layer_norm" in out


def test_other_ways_to_name_a_network(nets, capsys):
    record, _ = planned(capsys, "new_nets:with_example")
    assert record["rows"] == 5
    arguments = ["--network", "mlp", "--data", "new_nets:data", "--widths", "16,16", "--batch", "32"]
    record, out = planned(capsys, *arguments)
    assert record["rows"] == 32
    assert record["config"]["widths"] == [16, 16]
    record, out = planned(capsys, "new_nets:fixed", "--input-shape", "8")
    assert "nothing can be removed from this network" in out
    record, out = planned(capsys, "new_nets:plain", "--input-shape", "8", "--target", "macs=0.0001")
    assert "target= asks for 0.0001 of the multiply-adds of a forward pass, and" in record["goal"]
    assert record["goal"] in out.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "say what to plan: a run folder, package.module:factory, or --network and --data"),
        (["new_nets:plain"], "gives no example input: name --data, or --input-shape"),
        (["new_nets:plain", "--input-shape", "9"], "'new_nets:plain' fails on --input-shape: RuntimeError"),
        (["new_nets:plain", "--data", "new_nets:three_inputs"], "the network fails on a batch of"),
        (["new_nets:plain", "--data", "new_nets:data", "--input-shape", "8"], "--data say the shape"),
        (["new_nets:plain", "--model", "new_nets:fixed"], "are two networks"),
        (["new_nets:absent", "--input-shape", "8"], "has no attribute 'absent'"),
        (["nowhere", "--input-shape", "8"], "--input-shape is for a network that was not trained yet"),
        (["nowhere", "--widths", "8"], "--widths is for a network that was not trained yet"),
        (["new_nets:plain", "--input-shape", "8", "--target", "half"], "target='half'"),
    ],
)
def test_what_cannot_be_planned(nets, refusal, arguments, what):
    refusal(["plan", *arguments], what)


def test_planning_leaves_random_numbers_to_the_seed(nets, capsys):
    one, _ = planned(capsys, "new_nets:plain", "--input-shape", "8")
    torch.rand(7)
    two, _ = planned(capsys, "new_nets:plain", "--input-shape", "8")
    keys = ("macs", "shrinkable", "parameters", "groups", "channels", "rows", "held")
    assert {key: one[key] for key in keys} == {key: two[key] for key in keys}
