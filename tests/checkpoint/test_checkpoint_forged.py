"""Checkpoints whose checksums are right and whose manifests are not: refused in one line, or harmless."""

from __future__ import annotations

import copy
import json
import random
import resource
import struct
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from apoptosis import Apoptosis
from apoptosis.checkpoint import load, save
from apoptosis.checkpoint.file import FORMAT
from apoptosis.errors import CheckpointError
from apoptosis.storage.plain_json import MAX_DEPTH

INFINITE, NOT_A_NUMBER = {"$": "float", "value": "inf"}, {"$": "float", "value": "nan"}
HUGE = 10**30


def parts(path):
    """Return header, manifest and tensors' bytes of a file."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    return header, json.loads(header["__metadata__"][FORMAT].partition(" ")[2]), raw[8 + size :]


def forge(path, header, manifest, body):
    """Write a file whose checksums are right."""
    text = json.dumps(manifest)
    header = {**header, "__metadata__": {FORMAT: f"{zlib.crc32(text.encode()):08x} {text}"}}
    new = json.dumps(header).encode()
    new += b" " * (-len(new) % 8)
    path.write_bytes(struct.pack("<Q", len(new)) + new + body)


def refused(path, nets, model, opt, apo=None):
    before = nets.contents(model, [opt])
    with pytest.raises(CheckpointError) as caught:
        load(path, model, opt, apo)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert nets.same(nets.contents(model, [opt]), before)
    return str(caught.value)


@pytest.fixture
def saved(nets, tmp_path):
    model, opt = nets.shrunk()
    path = tmp_path / "net.safetensors"
    save(path, model, opt, nets.Apo({"x": torch.ones(2)}), epoch=1, list=[1.5, ("a", None)])
    return path


def group(manifest):
    return manifest["optimizers"][0]["groups"][0]["settings"]


def state(manifest):
    return manifest["optimizers"][0]["state"]["0.weight"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: group(m).update(lr=INFINITE), "cannot have lr = inf"),
        (lambda m: group(m).update(lr=NOT_A_NUMBER), "cannot have lr = nan"),
        (lambda m: group(m).update(lr=-0.1), "cannot have lr = -0.1"),
        (lambda m: group(m).update(lr=10**400), "cannot have lr = 1000"),
        (lambda m: group(m).update(lr="0.1"), "cannot have lr = 0.1"),
        (lambda m: group(m).update(lr=None), "cannot have lr = None"),
        (lambda m: group(m).pop("lr"), "lacks the hyperparameter 'lr'"),
        (lambda m: group(m).update(betas=[0.9]), "cannot have betas"),
        (lambda m: group(m).update(betas={"$": "tuple", "items": [0.9, 1.5]}), "cannot have betas"),
        (lambda m: group(m).update(params=[1]), "cannot have params"),
        (lambda m: group(m).update(amsgrad="yes"), "cannot have amsgrad"),
        (lambda m: m["extra"].update(t=state(m).pop("exp_avg_sq")), "lacks 'exp_avg_sq'"),
        (lambda m: m["extra"].update(t=state(m)["step"]) or state(m).update(step=-1), "cannot have step = -1"),
        (lambda m: state(m).pop("step"), "names nothing that the tensor"),
        (lambda m: state(m)["exp_avg"].update(name="optimizer.0.state.0.bias.exp_avg"), "names nothing"),
        (
            lambda m: (
                m["extra"].update(t=dict(state(m)["exp_avg"]))
                or state(m)["exp_avg"].update(name="optimizer.0.state.0.bias.exp_avg")
            ),
            "its 'exp_avg' of '0.weight' has shape \\(4,\\), and the parameter \\(4, 5\\)",
        ),
        (lambda m: m["optimizers"][0].update(groups={}), "optimizers.0.groups is {}, not of type list"),
        (lambda m: m["optimizers"].append(m["optimizers"][0]), "holds 2 optimizers, 1 were given"),
        (lambda m: m["model"]["attributes"]["0"].update(out_features=0), "'0' cannot have out_features = 0"),
        (lambda m: m["model"]["attributes"]["0"].update(out_features=5), "'0' cannot have out_features = 5"),
        (lambda m: m["model"]["attributes"]["0"].update(out_features=-4), "'0' cannot have out_features = -4"),
        (lambda m: m["model"]["attributes"]["0"].update(out_features=HUGE), "'0' cannot have out_features = 1000"),
        (lambda m: m["model"]["attributes"].pop("0"), "'0' cannot have out_features = 8"),
        (lambda m: m["model"].update(attributes=[]), "model.attributes is \\[\\], not of type dict"),
        (lambda m: m["model"].pop("optional"), "model.optional is missing"),
        (lambda m: m["model"]["names"].append("0.weight"), "names a tensor twice"),
        (lambda m: m["model"]["names"].remove("0.weight"), "names nothing that the tensor"),
        (lambda m: m["model"].update(full={"0.weight": [-8, 5]}), "is \\[-8, 5\\], not the shape of a tensor"),
        (lambda m: m["model"].update(full={"0.weight": [2, 5]}), "'0.weight' has shape \\(4, 5\\), and was built with"),
        (lambda m: m["tensors"]["model.0.weight"].__setitem__(1, [-4, 5]), "not the shape of a tensor"),
        (lambda m: m["tensors"]["model.0.weight"].__setitem__(1, [4, HUGE]), "not the shape of a tensor"),
        (lambda m: m["tensors"]["model.0.weight"].__setitem__(2, "x"), "misstates the tensor"),
        (lambda m: m["tensors"].pop("model.0.weight"), "its tensors are not those that were saved"),
        (lambda m: m.update(tensors=None), "lists no tensors"),
        (lambda m: m.update(apoptosis=7), "apoptosis is 7, not of type dict"),
        (lambda m: m["apoptosis"].pop("state"), "apoptosis.state is missing"),
        (lambda m: m.update(extra=None), "extra is None, not of type dict"),
        (lambda m: m["extra"].update(epoch={"$": "float", "value": "1e5"}), "extra.epoch is"),
        (lambda m: m["extra"].update(epoch={"$": ["tensor"]}), "extra.epoch is"),
        (lambda m: m["extra"].update(epoch={"$": "dict", "items": [[[1], 2]]}), "damaged"),
        (lambda m: m.update(version=10**400), "has format version 1000"),
    ],
)
def test_a_forged_manifest_is_refused_by_its_place(saved, nets, change, told):
    header, manifest, body = parts(saved)
    change(manifest)
    forge(saved, header, manifest, body)
    model = nets.mlp(seed=3)
    opt = torch.optim.AdamW(model.parameters())
    nets.step(model, opt)
    before = nets.contents(model, [opt])
    with pytest.raises(CheckpointError, match=told) as caught:
        load(saved, model, opt, nets.Apo())
    assert "\n" not in str(caught.value)
    assert nets.same(nets.contents(model, [opt]), before)


def nested(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


def test_what_is_nested_too_deeply_is_refused_when_read_and_when_saved(saved, nets):
    header, manifest, body = parts(saved)
    model = nets.mlp(seed=3)
    opt = torch.optim.AdamW(model.parameters())
    for levels in (MAX_DEPTH, 900):
        forge(saved, header, {**manifest, "extra": {"epoch": nested(levels)}}, body)
        assert "nested deeper than" in refused(saved, nets, model, opt)
    text = "[" * 200_000 + "]" * 200_000
    save_file({"a": torch.ones(1)}, saved, metadata={FORMAT: f"{zlib.crc32(text.encode()):08x} {text}"})
    assert "nested deeper than" in refused(saved, nets, model, opt)
    before = saved.read_bytes()
    itself: list[object] = []
    itself.append(itself)
    for value in (nested(MAX_DEPTH), itself):
        with pytest.raises(CheckpointError, match="nested"):
            save(saved, model, thing=value)
    assert saved.read_bytes() == before
    save(saved, model, thing=nested(MAX_DEPTH - 2))
    assert load(saved, model) == {"thing": nested(MAX_DEPTH - 2)}


def places(value, path=()):
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


DELETE = object()
VALUES = (None, -1, 0, HUGE, 2**63, INFINITE, NOT_A_NUMBER, -0.5, "x", [], {}, True, nested(150), {"$": "odd"}, DELETE)


def altered(manifest, path, value):
    found = copy.deepcopy(manifest)
    at = found
    for key in path[:-1]:
        at = at[key]
    if value is DELETE:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return found


def test_any_place_of_a_manifest_may_hold_anything(nets, runs, tmp_path):
    """Refused with nothing changed, or taken and trained on: never an error of another kind."""
    net = runs.mlp(12)
    with torch.no_grad():
        net[0].weight[1::2], net[0].bias[1::2] = net[0].weight[::2], net[0].bias[::2]
    opt = runs.adam(net)
    options = {"tolerance": 0.3, "total_steps": 60, "align": 1, "calibration": 1.0}
    apo = Apoptosis(net, opt, torch.zeros(2, 6), **options)
    runs.train(net, opt, apo, steps=45)
    path = tmp_path / "net"
    save(path, net, opt, apo)
    header, manifest, body = parts(path)
    by_top = {top: [p for p in places(manifest) if p[0] == top] for top in ("model", "optimizers", "apoptosis")}
    rng = random.Random(0)

    def fresh():
        wide = runs.mlp(12, seed=1)
        return wide, runs.adam(wide)

    wide, opt = fresh()
    mine = Apoptosis(wide, opt, torch.zeros(2, 6), **options)
    num_refused = 0
    for _ in range(120):
        place = rng.choice(by_top[rng.choice(list(by_top))])
        forge(path, header, altered(manifest, place, rng.choice(VALUES)), body)
        before = nets.contents(wide, [opt])
        try:
            load(path, wide, opt, mine)
        except CheckpointError as error:
            told = str(error)
        else:
            told = ""
        if told:
            num_refused += 1
            assert "\n" not in told, place
            assert nets.same(nets.contents(wide, [opt]), before), place
        else:
            runs.train(wide, opt, mine, steps=2)
            wide, opt = fresh()
            mine = Apoptosis(wide, opt, torch.zeros(2, 6), **options)
    assert num_refused > 70


def test_damage_anywhere_is_refused_or_changes_nothing(saved, nets, tmp_path):
    """Bits flipped, bytes zeroed, taken out and put in: several hundred places."""
    whole, rng, bad = saved.read_bytes(), np.random.default_rng(1), tmp_path / "bad"
    expected = nets.mlp(seed=3)
    load(saved, expected)
    model = nets.mlp(seed=3)
    opt = torch.optim.AdamW(model.parameters())
    before, taken = nets.contents(model, [opt]), 0
    for i in range(400):
        place = int(rng.integers(0, len(whole)))
        damaged = bytearray(whole)
        if i % 4 == 0:
            damaged[place] ^= 1 << int(rng.integers(0, 8))
        elif i % 4 == 1:
            damaged[place : place + 8] = bytes(len(damaged[place : place + 8]))
        elif i % 4 == 2:
            del damaged[place : place + int(rng.integers(1, 9))]
        else:
            damaged[place:place] = rng.bytes(3)
        bad.write_bytes(damaged)
        try:
            load(bad, model, opt, nets.Apo())
        except CheckpointError as error:
            told = str(error)
        else:
            told = ""
        if told:
            assert "\n" not in told
            assert nets.same(nets.contents(model, [opt]), before)
        else:
            taken += 1  # padding of the header, or zeros that were zeros
            assert all(map(torch.equal, model.parameters(), expected.parameters()))
            model = nets.mlp(seed=3)
            opt = torch.optim.AdamW(model.parameters())
            before = nets.contents(model, [opt])
    assert taken < 40


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.0.weight", "another network: '0.weight' has shape (160000000, 5) there"),
        ("optimizer.0.state.0.weight.exp_avg", "its 'exp_avg' of '0.weight' has shape (160000000, 5)"),
        ("ghost", "names nothing that the tensor 'ghost'"),
    ],
)
def test_three_sparse_gigabytes_are_refused_by_their_header(saved, nets, name, told):
    header, manifest, body = parts(saved)
    rows, size = 160_000_000, 160_000_000 * 5 * 4
    entry = {"dtype": "F32", "shape": [rows, 5], "data_offsets": [len(body), len(body) + size]}
    if name in header:  # what lay there gets another name
        header["rest"], manifest["tensors"]["rest"] = header[name], manifest["tensors"][name]
        manifest["extra"]["rest"] = {"$": "tensor", "name": "rest"}
    header[name], manifest["tensors"][name] = entry, ["torch.float32", [rows, 5], 0]
    forge(saved, header, manifest, body)
    with saved.open("r+b") as file:
        file.truncate(saved.stat().st_size + size)
    model = nets.mlp(seed=3)
    opt = torch.optim.AdamW(model.parameters())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert told in refused(saved, nets, model, opt)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_tensor_of_another_kind_of_number_is_refused(nets, tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(3))
    other = nn.Sequential(nn.BatchNorm1d(3))
    other[0].num_batches_tracked = torch.tensor(1.5)
    save(tmp_path / "b", other)
    with pytest.raises(CheckpointError, match=r"'0\.num_batches_tracked' is torch\.float32 there, torch\.int64 here"):
        load(tmp_path / "b", model)
