"""`ship`: what it writes runs without this library and computes the same; the network stays as it is."""

import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.nn import functional as F

from apoptosis import ship, shrink_
from apoptosis.errors import ArgumentError, DataError

onnx_packages = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra onnx",
)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3))


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))

ALONE = """
import sys

class Blocked:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
"""


def run_alone(folder, code, blocked=("apoptosis",)):
    """Run code in the folder, in a Python of its own that cannot import some packages."""
    text = ALONE.format(blocked=blocked) + code
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", text], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocks(folder):
    """The Python of a README, by the file that it loads."""
    found = (folder / "README.md").read_text().split("```python\n")[1:]
    codes = [block.partition("```")[0] for block in found]
    return {name: code for name in ("network.pt2", "network.onnx", "weights") for code in codes if f'"{name}' in code}


@onnx_packages
def test_every_file_is_written_checked_and_runs_without_the_library(runs, tmp_path):
    net, optimizer = mlp(), None
    event = shrink_(net, X[:2], [torch.randn(64, 4)], tolerance=0.5)
    assert event.groups
    net.train()
    net(X).sum().backward()
    handle = net[0].register_forward_hook(lambda module, args, out: None)
    before = runs.everything(net, optimizer)
    shipped = ship(net, tmp_path / "out", X)
    assert runs.same(before, runs.everything(net, optimizer))
    handle.remove()
    assert shipped.missing == {}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "network.onnx", "network.pt2", "shipment.json", "weights.safetensors", "widths.json",
    ]  # fmt: skip
    for name in ("network.pt2", "network.onnx"):
        assert shipped[name].sizes == ("rows",)
        assert shipped[name].largest < 1e-5
        assert shipped[name].bytes == (tmp_path / "out" / name).stat().st_size
    record = json.loads((tmp_path / "out" / "shipment.json").read_text())
    assert [file["bytes"] for file in record["files"]] == [file.bytes for file in shipped.files]
    text = (tmp_path / "out" / "README.md").read_text()
    assert all(f"`{path.name}`" in text for path in (tmp_path / "out").iterdir() if path.name != "README.md")
    # what the README says works where this library cannot be imported, and gives the network's outputs
    codes = blocks(tmp_path / "out")
    out = run_alone(
        tmp_path / "out", codes["network.pt2"] + "print(outputs.shape, network(torch.ones(9, 4))[0].tolist())"
    )
    net.eval()
    expected = net(torch.ones(9, 4))[0]
    assert out.startswith("torch.Size([5, 3])")
    assert torch.allclose(torch.tensor(json.loads(out.partition(") ")[2])), expected)
    more = "ones = {session.get_inputs()[0].name: numpy.ones((9, 4), 'float32')}\n"
    more += "print(session.run(None, ones)[0][0].tolist())"
    out = run_alone(tmp_path / "out", codes["network.onnx"] + more, ("apoptosis", "torch"))
    assert torch.allclose(torch.tensor(json.loads(out)), expected, atol=1e-6)
    again = mlp()
    again[0], again[2], again[3] = (
        nn.Linear(4, net[0].out_features),
        nn.BatchNorm1d(net[0].out_features),
        nn.Linear(net[3].in_features, 3),
    )
    names = {"network": again, "__builtins__": __builtins__}
    code = codes["weights"].replace('"weights.safetensors"', repr(str(tmp_path / "out" / "weights.safetensors")))
    exec(code, names)
    assert torch.equal(again.eval()(X), net(X))


@dataclass
class Out:
    logits: Tensor
    loss: Tensor | None = None
    caches: tuple = ()


class Several(nn.Module):
    """Arguments in containers, numbers among them, outputs in a class of the user's."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, mask=None, more=None, scale=2.0):
        x = self.embed(ids) * scale
        x = x if mask is None else x * mask[..., None]
        return Out(self.head(x), caches=(x, more["bias"][0], 3))


def several_inputs():
    ids = torch.randint(0, 9, (3, 6), generator=torch.Generator().manual_seed(0))
    return {
        "ids": ids,
        "mask": torch.ones(3, 6, dtype=torch.int64),
        "more": {"bias": [torch.randn(3, 2)]},
        "scale": 1.5,
    }


@onnx_packages
@pytest.mark.parametrize("form", [dict, tuple])
def test_inputs_and_outputs_in_containers(form, tmp_path):
    net, given = Several(), several_inputs()
    shipped = ship(net, tmp_path / "out", given if form is dict else tuple(given.values()))
    assert shipped.missing == {}
    assert [shipped[name].sizes for name in ("network.pt2", "network.onnx")] == [("rows", "length")] * 2
    code = blocks(tmp_path / "out")["network.pt2"] + "print(sorted(outputs), len(outputs['caches']))"
    assert run_alone(tmp_path / "out", code) == "['caches', 'logits'] 3\n"  # a dict in place of the user's class
    assert "print" not in run_alone(tmp_path / "out", blocks(tmp_path / "out")["network.onnx"], ("apoptosis", "torch"))
    again = Several()
    load_model(again, tmp_path / "out" / "weights.safetensors")  # what is tied is stored once
    assert torch.equal(again.head.weight, net.embed.weight)
    assert shipped["weights.safetensors"].bytes < 2 * 4 * net.embed.weight.numel() + 100


def module(function, **parts):
    """A network of parts whose forward pass is a function."""
    net = nn.Module()
    for name, part in parts.items():
        setattr(net, name, part)
    kind = type("Net", (nn.Module,), {"forward": function})
    net.__class__ = kind
    return net


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def test_rows_that_the_code_writes_out_are_said_and_nothing_else_is_claimed(tmp_path):
    net = module(lambda self, x: self.a(x) * float(len(x)), a=linear())
    shipped = ship(net, tmp_path / "out", X, onnx=False)
    assert shipped["network.pt2"].sizes == ()
    assert "only for inputs of the example's sizes" in shipped["network.pt2"].checked
    net = module(lambda self, x: self.a(x.view(5, 4)), a=linear())
    assert ship(net, tmp_path / "out", X, onnx=False)["network.pt2"].sizes == ()
    single = ship(nn.Sequential(linear(), nn.ReLU()), tmp_path / "out", X[:1], onnx=False)  # sizes of 1 are written out
    assert single["network.pt2"].sizes == ("rows",)


def test_values_that_tracing_writes_out_are_found(tmp_path):
    def forward(self, x, mask):
        plain = True if torch.compiler.is_compiling() else bool(mask.all())
        return self.a(x) if plain else self.a(x * mask)

    net = module(forward, a=linear())
    with pytest.warns(UserWarning, match="network.pt2: not written: its outputs differ from the network's by"):
        shipped = ship(net, tmp_path / "out", (X, torch.ones(5, 4, dtype=torch.int64)), onnx=False)
    assert list(shipped.missing) == ["network.pt2"]
    assert not (tmp_path / "out" / "network.pt2").exists()
    assert "**not written**" in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_exported_is_said_and_the_rest_is_written(tmp_path):
    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.a(-x)

    with pytest.warns(UserWarning, match=r"branches on a number that it reads off a tensor; .*\(test_ship.py:\d+\)"):
        shipped = ship(module(forward, a=linear()), tmp_path / "out", X, onnx=False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "shipment.json", "weights.safetensors", "widths.json",
    }  # fmt: skip
    assert "network.pt2: not written: " in str(shipped)


def test_random_numbers_and_states_are_said(tmp_path):
    net = module(lambda self, x: F.dropout(self.a(x), 0.5), a=linear())
    found = ship(net, tmp_path / "out", X, onnx=False)["network.pt2"]
    assert found.largest is None
    assert "draws random numbers" in found.checked

    def forward(self, x):
        self.h = self.a(x) if self.h is None else self.a(x) + self.h
        return self.h

    net = module(forward, a=linear(), h=None)
    assert (
        "keeps something from one pass to the next" in ship(net, tmp_path / "out", X, onnx=False)["network.pt2"].checked
    )
    assert net.h is None


def test_networks_that_cannot_be_copied_wrapped_ones_and_those_with_hooks(runs, tmp_path):
    net = mlp()
    net.lock = threading.Lock()
    before = runs.everything(net)
    assert ship(net, tmp_path / "out", X, onnx=False).missing == {}
    assert runs.same(before, runs.everything(net))
    wrapped = torch.optim.swa_utils.AveragedModel(mlp())
    assert ship(wrapped, tmp_path / "out", X, onnx=False).missing == {}
    compiled = torch.compile(mlp(), backend="eager")
    assert ship(compiled, tmp_path / "out", X, onnx=False).missing == {}
    assert not any(
        "module" in name or "orig" in name for name in torch.export.load(tmp_path / "out" / "network.pt2").state_dict
    )
    net = mlp().eval()
    net[1].register_forward_hook(lambda module, args, out: out * 2)
    net(X).sum().backward()
    ship(net, tmp_path / "out", X, onnx=False)
    assert torch.allclose(torch.export.load(tmp_path / "out" / "network.pt2").module()(X), net(X))


def test_folders(tmp_path):
    net = mlp()
    ship(net, tmp_path / "a" / "out", X, onnx=False)  # folders above are made
    first = (tmp_path / "a" / "out" / "weights.safetensors").read_bytes()
    with torch.no_grad():
        net[0].weight.add_(1.0)
    ship(net, tmp_path / "a" / "out", X, onnx=False)  # an earlier shipment is replaced
    assert (tmp_path / "a" / "out" / "weights.safetensors").read_bytes() != first
    (tmp_path / "a" / "out" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"holds 'tokenizer.json', which would be lost"):
        ship(net, tmp_path / "a" / "out", X, onnx=False)
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("mine")
    with pytest.raises(DataError, match="files of another origin"):
        ship(net, other, X, onnx=False)
    with pytest.raises(DataError, match="is no folder"):
        ship(net, other / "README.md", X, onnx=False)
    assert (other / "README.md").read_text() == "mine"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


def test_refusals_leave_nothing_behind(tmp_path, monkeypatch):
    net = mlp()
    with pytest.raises(ArgumentError, match="the network fails on it in evaluation mode: RuntimeError: mat1 and mat2"):
        ship(net, tmp_path / "out", X[:, :3])
    with pytest.raises(ArgumentError, match=r"not a torch\.nn\.Module"):
        ship(torch.export.export(net.eval(), (X,)), tmp_path / "out", X)
    with pytest.raises(ArgumentError, match="lies on the meta device"):
        ship(nn.Linear(4, 3, device="meta"), tmp_path / "out", X)
    with pytest.raises(ArgumentError, match="returns no tensor"):
        ship(module(lambda self, x: 3, a=linear()), tmp_path / "out", X)
    with pytest.raises(ArgumentError, match="must be the path of a folder"):
        ship(net, 3, X)
    monkeypatch.setattr(
        "apoptosis.shipping.programs.lacks", lambda *names: [name for name in names if "script" in name]
    )
    with pytest.raises(ArgumentError, match=r"needs onnxscript: pip install 'torch-apoptosis\[onnx\]'"):
        ship(net, tmp_path / "out", X, onnx=True)
    assert list(tmp_path.iterdir()) == []
    shipped = ship(net, tmp_path / "out", X)  # without a word: the extra was not asked for
    assert shipped.missing == {"network.onnx": "onnxscript not installed: pip install 'torch-apoptosis[onnx]'"}

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("apoptosis.shipping.programs.write_program", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ship(net, tmp_path / "new", X)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_dynamic_shapes_of_the_users_own(tmp_path):
    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1))
    x = torch.randn(2, 2, 9)
    ship(net, tmp_path / "out", x, onnx=False, dynamic_shapes=({2: torch.export.Dim("time", min=4)},))
    network = torch.export.load(tmp_path / "out" / "network.pt2").module()
    assert network(torch.randn(2, 2, 20)).shape == (2, 3, 1)


def test_types_that_onnxruntime_cannot_run_are_written_and_said(tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    net = mlp().bfloat16()
    shipped = ship(net, tmp_path / "out", X.bfloat16())
    assert shipped["network.pt2"].largest == 0.0
    assert shipped["network.onnx"].checked.startswith("not checked: onnxruntime cannot run it on the CPU")
