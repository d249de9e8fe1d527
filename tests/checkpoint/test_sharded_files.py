"""Folders of sharded checkpoints: damaged anywhere, forged, of an earlier version; all in one process."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import warnings
import zlib

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from apoptosis import load_sharded, save_sharded
from apoptosis.checkpoint.save_load import packed
from apoptosis.checkpoint.sharded import _alone
from apoptosis.errors import CheckpointError

FILES = (".metadata", "__0_0.distcp", "apoptosis.json")


@pytest.fixture
def saved(nets, tmp_path):
    model, opt = nets.shrunk()
    save_sharded(tmp_path / "net", model, opt, nets.Apo({"x": torch.ones(2)}), epoch=1)
    return tmp_path / "net"


def fresh(nets):
    model = nets.mlp(seed=3)
    opt = torch.optim.AdamW(model.parameters())
    nets.step(model, opt)
    return model, opt, nets.contents(model, [opt])


def refused(folder, nets, match):
    model, opt, before = fresh(nets)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_sharded(folder, model, opt, nets.Apo())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert nets.same(nets.contents(model, [opt]), before)


def sign(folder, change=lambda manifest: None):
    """Write the manifest anew, with right checksums of whatever lies there."""
    manifest = json.loads((folder / "apoptosis.json").read_bytes().partition(b" ")[2])
    for name in manifest["files"]:
        raw = (folder / name).read_bytes()
        manifest["files"][name] = [len(raw), zlib.crc32(raw)]
    change(manifest)
    text = json.dumps(manifest).encode()
    (folder / "apoptosis.json").write_bytes(f"{zlib.crc32(text):08x} ".encode() + text)


def of_version_1(folder, nets, change=lambda manifest: None):
    """Write a folder as it was written before there were checksums."""
    model, opt = nets.shrunk()
    tensors, manifest = packed(model, opt, nets.Apo({"x": torch.ones(2)}), {"epoch": 1})
    manifest = {"version": 1, **manifest}
    change(manifest)
    text = torch.frombuffer(bytearray(json.dumps(manifest).encode()), dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({**tensors, "manifest": text}, checkpoint_id=folder, **_alone(True))
    return model


def damaged(raw, rng, kind):
    place, found = int(rng.integers(0, len(raw))), bytearray(raw)
    if kind == 0:
        found[place] ^= 1 << int(rng.integers(0, 8))
    elif kind == 1:
        del found[place:]
    elif kind == 2:
        del found[place : place + int(rng.integers(1, 9))]
    else:
        found[place:place] = rng.bytes(3)
    return bytes(found)


def test_damage_anywhere_in_any_file_is_refused(saved, nets):
    model, opt, before = fresh(nets)
    rng = np.random.default_rng(0)
    for i in range(360):
        path = saved / FILES[i % 3]
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, rng, i % 4))
        with pytest.raises(CheckpointError) as caught:
            load_sharded(saved, model, opt, nets.Apo())
        assert "\n" not in str(caught.value)
        path.write_bytes(whole)
    assert nets.same(nets.contents(model, [opt]), before)
    assert load_sharded(saved, model, opt, nets.Apo()) == {"epoch": 1}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_gone_or_no_file(saved, nets, name):
    raw = (saved / name).read_bytes()
    (saved / name).unlink()
    refused(saved, nets, "no checkpoint|no manifest of widths|cannot be loaded")
    os.mkfifo(saved / name)
    refused(saved, nets, "named pipe")
    (saved / name).unlink()
    (saved / name).write_bytes(raw)
    (saved / "notes.txt").write_text("of another's")
    assert load_sharded(saved, nets.mlp()) == {"epoch": 1}


class Runs:
    """A pickle that runs something when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("version", [1, 2])
def test_a_pickle_that_runs_something_is_refused_unread(nets, tmp_path, version, saved):
    folder = saved
    if version == 1:
        folder = tmp_path / "old"
        of_version_1(folder, nets)
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "made")))
    if version == 2:
        refused(folder, nets, "'.metadata' is not the one that was saved")
        sign(folder)
    refused(folder, nets, r"asks for posix\.mkdir, which is no part of one")
    assert not (tmp_path / "made").exists()
    for value in (b"", b"\x80", pickle.dumps({"a": 1}), pickle.dumps([1] * 9), b"cos\nsystem\n(S'true'\ntR."):
        (folder / ".metadata").write_bytes(value)
        if version == 2:
            sign(folder)
        refused(folder, nets, "its list of tensors")


def rewritten(folder, change):
    """Change torch's list of tensors, by torch's own classes."""
    found = dcp.FileSystemReader(folder).read_metadata()
    change(found)
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    sign(folder)


def weight(found):
    return found.state_dict_metadata["model.0.weight"]


def place(found, **values):
    for index, info in found.storage_data.items():
        if index.fqn == "model.0.weight":
            for key, value in values.items():
                object.__setattr__(info, key, value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda f: setattr(weight(f), "size", torch.Size((160_000_000, 5))),
            "parts of 'model.0.weight' do not make up",
        ),
        (lambda f: setattr(weight(f), "size", (-4, 5)), "is no shape"),
        (lambda f: setattr(weight(f), "size", (4, 10**30)), "is no shape"),
        (lambda f: setattr(weight(f), "chunks", []), "do not make up its shape"),
        (lambda f: setattr(weight(f), "chunks", weight(f).chunks * 2), "do not make up its shape"),
        (lambda f: setattr(weight(f).properties, "dtype", torch.complex128), "complex128 there, torch.float32 here"),
        (lambda f: place(f, offset=-1), "lies outside of the file"),
        (lambda f: place(f, length=10**9), "lies outside of the file"),
        (lambda f: place(f, length=3), "claims more numbers than its file holds"),
        (lambda f: place(f, relative_path="../../secret"), "lies outside of the file"),
        (
            lambda f: f.state_dict_metadata.pop("model.0.weight"),
            "names the tensor 'model.0.weight', which is not there",
        ),
        (lambda f: f.state_dict_metadata.update(ghost=weight(f)), "is missing or outside"),
        (lambda f: f.storage_data.clear(), "is missing or outside"),
        (lambda f: setattr(f, "storage_data", None), "cannot be read"),
    ],
)
def test_a_forged_list_of_tensors_is_refused(saved, nets, change, told):
    rewritten(saved, change)
    refused(saved, nets, told)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m.pop("files"), "lists no files"),
        (lambda m: m["files"].update({"../x": [1, 2]}), "misstates the file '../x'"),
        (lambda m: m["files"].update({"__0_0.distcp": "x"}), "misstates the file '__0_0.distcp'"),
        (lambda m: m.update(version=9, library="9.9"), "format version 9 .written by torch-apoptosis 9.9.*Update"),
        (lambda m: m.update(model=7), "model is 7, not of type dict"),
        (lambda m: m["optimizers"][0]["groups"][0]["settings"].update(lr={"$": "float", "value": "inf"}), "lr = inf"),
        (lambda m: m["model"]["attributes"]["0"].update(out_features=0), "cannot have out_features = 0"),
    ],
)
def test_a_forged_manifest_is_refused(saved, nets, change, told):
    sign(saved, change)
    refused(saved, nets, told)


def test_a_folder_of_version_1_loads_with_a_note_and_is_converted_by_saving_it(nets, tmp_path):
    folder = tmp_path / "net"
    shrunk = of_version_1(folder, nets)
    model, opt, _ = fresh(nets)
    with pytest.warns(UserWarning, match="written without checksums.*save it again"):
        assert load_sharded(folder, model, opt, nets.Apo()) == {"epoch": 1}
    assert all(map(torch.equal, model.parameters(), shrunk.parameters()))
    save_sharded(folder, model, opt, nets.Apo({"x": torch.ones(2)}), epoch=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_sharded(folder, nets.mlp()) == {"epoch": 2}


@pytest.mark.filterwarnings("ignore:.*written without checksums")
def test_damage_to_the_list_of_version_1_is_refused_or_changes_no_shape(nets, tmp_path):
    """Without checksums numbers may change; what may not is that anything else than a CheckpointError comes of it."""
    folder = tmp_path / "net"
    of_version_1(folder, nets)
    rng, rand, num_refused = np.random.default_rng(2), random.Random(2), 0
    for _ in range(150):
        path = folder / rand.choice(FILES[:2])
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, rng, rand.randrange(4)))
        model, opt, before = fresh(nets)
        told = ""
        try:
            load_sharded(folder, model, opt, nets.Apo())
        except CheckpointError as error:
            told = str(error)
        if told:
            num_refused += 1
            assert "\n" not in told
            assert nets.same(nets.contents(model, [opt]), before)
        path.write_bytes(whole)
    assert num_refused > 60


def test_permissions_links_and_leftovers(nets, tmp_path):
    model = nets.mlp()
    save_sharded(tmp_path / "real", model, epoch=1)
    (tmp_path / "real").chmod(0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real.writing").mkdir()
    (tmp_path / "real.writing" / "__7_0.distcp").write_text("of a killed writer")
    shutil.copytree(tmp_path / "real", tmp_path / "real.old")
    save_sharded(tmp_path / "link", model, epoch=2)
    assert (tmp_path / "link").is_symlink()
    assert load_sharded(tmp_path / "real", model) == {"epoch": 2}
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o700
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]
    assert sorted(p.name for p in (tmp_path / "real").iterdir()) == sorted(FILES)
    (tmp_path / "file").write_text("thesis")
    with pytest.raises(CheckpointError, match="is no checkpoint; it is left alone"):
        save_sharded(tmp_path / "file", model)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_sharded(tmp_path / "file" / "below", model)
    assert (tmp_path / "file").read_text() == "thesis"


def test_a_model_without_optimizer_reads_its_part_alone(saved, nets):
    model = nn.Sequential(*nets.mlp(seed=5))
    assert load_sharded(saved, model) == {"epoch": 1}
    assert model[0].out_features == 4
