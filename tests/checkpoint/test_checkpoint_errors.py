from __future__ import annotations

import json
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from apoptosis.checkpoint import load, save
from apoptosis.checkpoint.file import FORMAT
from apoptosis.errors import CheckpointError
from distributed.launched import ran


@pytest.fixture
def saved(nets, tmp_path):
    model, opt = nets.shrunk()
    path = tmp_path / "net.safetensors"
    save(path, model, opt, nets.Apo({"x": torch.ones(2)}), epoch=1)
    return path


def refused(path, nets, match, model=None, make=torch.optim.AdamW, apo=None):
    """Loading fails with one line of an error, and nothing has changed."""
    model = nets.mlp(seed=3) if model is None else model
    opt = make(model.parameters())
    if all(p.requires_grad for p in model.parameters()) and isinstance(model[0], nn.Linear):
        nets.step(model, opt)
    before = nets.contents(model, [opt])
    with pytest.raises(CheckpointError, match=match) as caught:
        load(path, model, opt, apo or nets.Apo())
    assert "\n" not in str(caught.value)
    assert nets.same(nets.contents(model, [opt]), before)


def test_a_file_cut_off_anywhere(saved, nets, tmp_path):
    whole = saved.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        cut = tmp_path / "cut"
        cut.write_bytes(whole[:length])
        refused(cut, nets, "cut off|cannot be loaded")
    (tmp_path / "long").write_bytes(whole + b"x")
    refused(tmp_path / "long", nets, "damaged")


def test_a_flipped_byte_anywhere_is_found(saved, nets, tmp_path):
    whole = bytearray(saved.read_bytes())
    bad = tmp_path / "bad"
    places = np.random.default_rng(0).integers(0, len(whole), 150)
    for place in [*range(12), *places, len(whole) - 1]:
        damaged = whole.copy()
        damaged[place] ^= 1 + int(place) % 7
        bad.write_bytes(damaged)
        model = nets.mlp(seed=3)
        if whole[place] == ord(" "):  # it may be padding of the header, which means nothing
            continue
        with pytest.raises(CheckpointError) as caught:
            load(bad, model)
        assert "\n" not in str(caught.value)


def with_manifest(path: Path, change):
    """Rewrite the manifest, checksum and all: what a file of another version or network would hold."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    manifest = json.loads(header["__metadata__"][FORMAT].partition(" ")[2])
    change(manifest)
    text = json.dumps(manifest)
    header["__metadata__"][FORMAT] = f"{zlib.crc32(text.encode()):08x} {text}"
    new = json.dumps(header).encode()
    new += b" " * (-len(new) % 8)
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + size :])


def test_a_newer_format(saved, nets):
    with_manifest(saved, lambda m: m.update(version=2, library="9.9"))
    refused(saved, nets, r"format version 2 \(written by torch-apoptosis 9\.9\).*Update")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("model"),
        lambda m: m.pop("optimizers"),
        lambda m: m["model"].update(names=m["model"]["names"] + ["ghost"]),
        lambda m: m["optimizers"][0].pop("class"),
        lambda m: m["optimizers"][0]["state"].update(ghost={}),
        lambda m: m.update(model=3),
        lambda m: m["model"]["attributes"]["0"].update(forward=3),
        lambda m: m["model"]["attributes"]["0"].update(in_features="5"),
        lambda m: m["extra"].update(epoch={"$": "tensor", "name": "ghost"}),
        lambda m: m.update(version="two"),
    ],
)
def test_a_manifest_that_makes_no_sense(saved, nets, change):
    with_manifest(saved, change)
    refused(saved, nets, "damaged|another network")


def test_foreign_files(nets, tmp_path):
    save_file({"0.weight": torch.ones(8, 5)}, tmp_path / "foreign")
    refused(tmp_path / "foreign", nets, "not a checkpoint of torch-apoptosis")
    torch.save(nets.mlp().state_dict(), tmp_path / "pickle")
    refused(tmp_path / "pickle", nets, "no safetensors file")
    (tmp_path / "text").write_text("hello, this is no checkpoint at all")
    refused(tmp_path / "text", nets, "no safetensors file")
    refused(tmp_path / "nowhere", nets, "cannot be loaded")
    refused(tmp_path, nets, "cannot be loaded")


def test_other_networks(saved, nets):
    refused(saved, nets, "this model has '6.weight'", nets.mlp((5, 8, 6, 3, 3)))
    refused(saved, nets, "it has '4.weight'", nets.mlp((5, 8, 6)))
    refused(saved, nets, r"'0.weight' has shape \(4, 5\) there and \(3, 5\)", nets.mlp((5, 3, 6, 3)))
    convolution = nn.Sequential(nn.Conv2d(5, 8, 1), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    refused(saved, nets, "'0.weight' has shape", convolution)


def test_another_kernel_is_another_network(nets, tmp_path):
    save(tmp_path / "a", nn.Sequential(nn.Conv2d(4, 8, 3)))
    refused(tmp_path / "a", nets, r"\(8, 4, 3, 3\) there and \(8, 4, 5, 5\)", nn.Sequential(nn.Conv2d(4, 8, 5)))


def test_the_widths_at_construction_are_compared_where_known(nets, tmp_path):
    model, _ = nets.shrunk()
    apo = nets.Apo({})
    apo.full_shapes = nets.shapes(nets.mlp())
    save(tmp_path / "a", model, None, apo)
    load(tmp_path / "a", nets.mlp())
    with pytest.raises(CheckpointError, match=r"'0.weight' was built with shape \(8, 5\), here \(9, 5\)"):
        load(tmp_path / "a", nets.mlp((5, 9, 6, 3)))


def test_other_optimizers(saved, nets, tmp_path):
    refused(saved, nets, "state of AdamW, the optimizer given is SGD", make=lambda p: torch.optim.SGD(p, lr=0.1))
    refused(saved, nets, "other parameter groups", make=lambda p: torch.optim.AdamW([{"params": [q]} for q in p]))
    refused(saved, nets, "other names or order", make=lambda p: torch.optim.AdamW(list(p)[::-1]))
    model = nets.mlp()
    with pytest.raises(CheckpointError, match="holds 1 optimizers, 2 were given"):
        load(saved, model, [torch.optim.AdamW(model.parameters()), torch.optim.AdamW(model.parameters())])
    save(tmp_path / "bare", model)
    refused(tmp_path / "bare", nets, "no optimizer state")
    with pytest.raises(CheckpointError, match="no apoptosis state"):
        load(tmp_path / "bare", model, None, nets.Apo())


def test_a_refusal_by_apoptosis_itself_undoes_everything(saved, nets):
    refused(saved, nets, "apoptosis state is of another network", apo=nets.Apo(refuse=True))


@pytest.mark.parametrize("value", [b"bytes", {1}, object()])
def test_extras_that_cannot_be_saved_leave_the_old_file(saved, nets, value):
    before = saved.read_bytes()
    with pytest.raises(CheckpointError, match=r"cannot save 'extra\.thing'"):
        save(saved, nets.mlp(), thing=value)
    assert saved.read_bytes() == before


def test_places_that_cannot_be_written(saved, nets, tmp_path):
    before = saved.read_bytes()
    (tmp_path / "folder").mkdir()
    for path in (saved / "below", tmp_path / "nowhere" / "a", tmp_path / "folder"):
        with pytest.raises(CheckpointError, match="cannot be written") as caught:
            save(path, nets.mlp())
        assert "\n" not in str(caught.value)
    assert saved.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "net.safetensors"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission(saved, nets):
    before = saved.read_bytes()
    saved.parent.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            save(saved, nets.mlp())
    finally:
        saved.parent.chmod(0o700)
    assert saved.read_bytes() == before


FULL_DISK = """
import resource, signal, sys, torch
from apoptosis.errors import CheckpointError
from apoptosis.checkpoint import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save(sys.argv[1], torch.nn.Linear(64, 64))
except CheckpointError as error:
    sys.exit(0 if "cannot be written" in str(error) and "\\n" not in str(error) else 1)
sys.exit(2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes to run into")
def test_a_write_that_fails_half_way_leaves_the_old_file_and_no_litter(saved, tmp_path_factory):
    before = saved.read_bytes()
    done = ran(FULL_DISK, str(saved), cwd=tmp_path_factory.mktemp("program"))
    assert done.wait() == 0, done.told()
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["net.safetensors"]


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_model_is_told_to_run_first(tmp_path):
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(CheckpointError, match="run the model once"):
        save(tmp_path / "a", model)
