"""`apoptosis ship`: a run's network written without this library, and what is refused."""

import json

import torch
from safetensors.torch import load_file

from apoptosis.tools.cli.app import run


def test_a_run_is_shipped(here, capsys):
    lines = ["x,y,kind", *(f"{i % 7},{(i * 3) % 5},{'yes' if i % 7 > 3 else 'no'}" for i in range(300))]
    (here / "t.csv").write_text("\n".join(lines) + "\n")
    options = [
        "--label",
        "kind",
        "--widths",
        "32,32",
        "--epochs",
        "3",
        "--batch",
        "16",
        "--target",
        "1.5x",
        "--align",
        "1",
    ]
    assert run(["train", "--data", "csv:t.csv", *options, "--out", "one", "--quiet"]) == 0
    capsys.readouterr()
    assert run(["ship", "one", "small", "--no-onnx"]) == 0
    told = capsys.readouterr().out
    assert "network.pt2" in told
    assert "largest difference" in told
    assert sorted(path.name for path in (here / "small").iterdir()) == [
        "README.md", "network.pt2", "shipment.json", "weights.safetensors", "widths.json",
    ]  # fmt: skip
    network = torch.export.load(here / "small" / "network.pt2").module()
    weights = load_file(here / "small" / "weights.safetensors")
    widths = json.loads((here / "small" / "widths.json").read_text())["shapes"]
    assert {name: list(tensor.shape) for name, tensor in weights.items()} == widths
    assert min(tensor.shape[0] for name, tensor in weights.items() if tensor.ndim == 2) < 32
    assert network(torch.zeros(5, *next(t.shape[1:] for t in weights.values() if t.ndim == 2))).shape == (5, 2)


def test_wrong_input_is_one_line(here, refusal):
    refusal(["ship", "nowhere", "out"], "'nowhere' does not exist")
    (here / "empty").mkdir()
    refusal(["ship", "empty", "out"], "config.json")
    assert not (here / "out").exists()
