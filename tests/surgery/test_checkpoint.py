from __future__ import annotations

import copy
import json
import os
import stat
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from apoptosis.errors import CheckpointError
from apoptosis.records import TensorEdit
from apoptosis.surgery import Transaction, build_edits, load, named_tensors, save
from apoptosis.surgery.attributes import attributes_of
from apoptosis.surgery.container import FORMAT


def step(model, opt, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(7, 5, generator=generator), torch.randint(0, 3, (7,), generator=generator)
    loss = nn.functional.cross_entropy(model(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()


def shrunk(nets, make=torch.optim.AdamW, steps=3):
    """A trained network after a surgery, with its optimizer."""
    model = nets.mlp()
    opt = make(model.parameters())
    for i in range(steps):
        step(model, opt, i)
    structure = nets.mlp_structure(model)
    edits = build_edits(structure, [nets.random_reduction(g, range(1, g.num_channels, 2)) for g in structure.groups])
    with Transaction(model, [opt]) as transaction:
        transaction.apply(edits)
    step(model, opt, 8)
    return model, opt


def contents(model, optimizers=()):
    found = [(n, id(t), t.detach().clone(), t.grad is None) for n, t in named_tensors(model).items()]
    found += [(n, attributes_of(m)) for n, m in model.named_modules()]
    for opt in optimizers:
        found += [copy.deepcopy({k: v for k, v in g.items() if k != "params"}) for g in opt.param_groups]
        found += [(id(p), copy.deepcopy(state)) for p, state in opt.state.items()]
    return found


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype is b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


class Apo:
    """Stands for apoptosis: anything with nested state."""

    def __init__(self, state=None, refuse=False):
        self.state, self.refuse = state, refuse

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        if self.refuse:
            raise CheckpointError("apoptosis state is of another network")
        self.state = state


OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.AdamW(p, fused=True, amsgrad=True),
    lambda p: torch.optim.Adagrad(p, lr=0.1),
    lambda p: torch.optim.Adafactor(p),
    lambda p: torch.optim.NAdam(p, lr=torch.tensor(0.01)),
    lambda p: torch.optim.ASGD(p, t0=1.0),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_training_goes_on_bitwise_after_a_round_trip(make, nets, tmp_path):
    model, opt = shrunk(nets, make)
    schedule = torch.optim.lr_scheduler.MultiStepLR(opt, [2, 4])
    apo = Apo({"widths": (3, 4), "moments": {"fc": [torch.ones(3, 3).double(), 7]}, "limit": float("inf")})
    path, rng = tmp_path / "run.safetensors", torch.get_rng_state()
    save(path, model, opt, apo, epoch=4, schedule=schedule.state_dict(), rng=rng, note=None)

    wide = nets.mlp(seed=5)
    wide_opt = make(wide.parameters())
    step(wide, wide_opt)  # a full-width step: gradients and state of the wrong widths have to go
    identities = [id(p) for p in wide.parameters()]
    back = Apo()
    extra = load(path, wide, wide_opt, back)
    assert [id(p) for p in wide.parameters()] == identities
    assert all(p.grad is None for p in wide.parameters())
    assert same(back.state, apo.state)
    assert extra["epoch"] == 4
    assert extra["note"] is None
    assert extra["rng"].equal(rng)
    assert extra["schedule"]["milestones"] == Counter([2, 4])
    assert [attributes_of(m) for m in wide.modules()] == [attributes_of(m) for m in model.modules()]
    wide_schedule = torch.optim.lr_scheduler.MultiStepLR(wide_opt, [2, 4])
    wide_schedule.load_state_dict(extra["schedule"])
    assert same(
        [v for s in opt.state.values() for v in s.values()], [v for s in wide_opt.state.values() for v in s.values()]
    )
    for i in range(5):
        step(model, opt, 20 + i)
        step(wide, wide_opt, 20 + i)
        schedule.step()
        wide_schedule.step()
        assert all(a.equal(b) for a, b in zip(model.parameters(), wide.parameters(), strict=True))


def test_loading_into_a_model_of_the_stored_widths(nets, tmp_path):
    model, opt = shrunk(nets)
    save(tmp_path / "a", model, opt)
    before = contents(model, [opt])
    step(model, opt, 30)
    load(tmp_path / "a", model, opt)
    after = contents(model, [opt])
    for one, two in zip(before, after, strict=True):
        assert same(one[:3], two[:3]) if isinstance(one, tuple) else same(one, two)


def test_a_loaded_model_shrinks_on_and_evaluates_without_an_optimizer(nets, tmp_path):
    model, opt = shrunk(nets)
    save(tmp_path / "a", model, opt, Apo({"x": 1}))
    wide = nets.mlp(seed=1)
    assert load(tmp_path / "a", wide) == {}
    x = torch.randn(3, 5)
    assert wide(x).equal(model(x))
    structure = nets.mlp_structure(wide)
    with Transaction(wide) as transaction:
        transaction.apply(build_edits(structure, [nets.reduction(g, (0,)) for g in structure.groups]))
    assert wide(x).shape == (3, 3)


class Everything(nn.Module):
    """Normalisation, groups, ties, buffers of several kinds, frozen parameters, extra state."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.slopes = nn.PReLU(8)
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)
        self.b.weight = self.a.weight
        self.a.bias.requires_grad_(False)
        self.low = nn.Parameter(torch.randn(8).bfloat16())
        self.register_buffer("mask", torch.arange(8) % 2 == 0)
        self.register_buffer("fixed", torch.randn(8).double(), persistent=False)
        self.register_buffer("nothing", None)
        self.counter = 0

    def get_extra_state(self):
        return {"counter": self.counter}

    def set_extra_state(self, state):
        self.counter = state["counter"]

    def forward(self, x):
        x = self.slopes(self.depthwise(self.norm(self.conv(x)))).mean((2, 3)) * self.low * self.mask * self.fixed
        return self.a(x.float()) + self.b(x.float())


def test_every_kind_of_tensor_and_attribute(tmp_path):
    model = Everything().to(memory_format=torch.channels_last)
    model(torch.randn(2, 3, 6, 6))
    model.counter = 3
    keep = torch.tensor([0, 3, 4])
    first = ("conv.weight", "conv.bias", "depthwise.weight", "slopes.weight", "low", "mask", "fixed")
    norm = tuple(f"norm.{n}" for n in ("weight", "bias", "running_mean", "running_var"))
    edits = [TensorEdit(tensor=n, keep={0: keep}) for n in first + norm]
    with Transaction(model) as transaction:
        transaction.apply([*edits, TensorEdit(tensor="a.weight", keep={1: keep})])
    save(tmp_path / "a", model)
    fresh = Everything().to(memory_format=torch.channels_last)
    load(tmp_path / "a", fresh)
    for (name, one), (_, two) in zip(named_tensors(model).items(), named_tensors(fresh).items(), strict=True):
        assert one.dtype is two.dtype, name
        assert one.equal(two), name
        assert one.requires_grad == two.requires_grad
    assert fresh.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert fresh.b.weight is fresh.a.weight
    assert fresh.depthwise.groups == fresh.depthwise.in_channels == fresh.norm.num_features == 3
    assert fresh.b.in_features == 3
    assert fresh.counter == 3
    x = torch.randn(2, 3, 6, 6)
    assert fresh.eval()(x).equal(model.eval()(x))


def test_several_optimizers_groups_and_parameters_of_other_models(nets, tmp_path):
    def make(model, other):
        one = torch.optim.SGD(
            [{"params": [model[0].weight, other], "lr": 0.2}, {"params": [model[0].bias]}], momentum=0.5
        )
        return [one, torch.optim.Adam([*model[2].parameters(), *model[4].parameters()])]

    model, other = nets.mlp(), nn.Parameter(torch.ones(2))
    opts = make(model, other)
    other.grad = torch.ones(2)
    model(torch.randn(4, 5)).sum().backward()
    for opt in opts:
        opt.step()
    save(tmp_path / "a", model, opts)
    wide, other_too = nets.mlp(seed=2), nn.Parameter(torch.ones(2))
    wide_opts = make(wide, other_too)
    load(tmp_path / "a", wide, wide_opts)
    assert wide_opts[0].state[other_too]["momentum_buffer"].equal(torch.ones(2))
    assert wide_opts[0].param_groups[0]["lr"] == 0.2
    assert wide_opts[0].param_groups[0]["params"][0] is wide[0].weight


@pytest.fixture
def saved(nets, tmp_path):
    model, opt = shrunk(nets)
    path = tmp_path / "net.safetensors"
    save(path, model, opt, Apo({"x": torch.ones(2)}), epoch=1)
    return path


def refused(path, nets, match, model=None, make=torch.optim.AdamW, apo=None):
    """Loading fails with one line of an error, and nothing has changed."""
    model = nets.mlp(seed=3) if model is None else model
    opt = make(model.parameters())
    if all(p.requires_grad for p in model.parameters()) and isinstance(model[0], nn.Linear):
        step(model, opt)
    before = contents(model, [opt])
    with pytest.raises(CheckpointError, match=match) as caught:
        load(path, model, opt, apo or Apo())
    assert "\n" not in str(caught.value)
    assert same(contents(model, [opt]), before)


def test_a_file_cut_off_anywhere(saved, nets, tmp_path):
    whole = saved.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        cut = tmp_path / "cut"
        cut.write_bytes(whole[:length])
        refused(cut, nets, "cut off|cannot read")
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
    refused(tmp_path / "pickle", nets, "not a safetensors file")
    (tmp_path / "text").write_text("hello, this is no checkpoint at all")
    refused(tmp_path / "text", nets, "not a safetensors file")
    refused(tmp_path / "nowhere", nets, "cannot read checkpoint")
    refused(tmp_path, nets, "cannot read checkpoint")


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
    model, _ = shrunk(nets)
    apo = Apo({})
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
        load(tmp_path / "bare", model, None, Apo())


def test_a_refusal_by_apoptosis_itself_undoes_everything(saved, nets):
    refused(saved, nets, "apoptosis state is of another network", apo=Apo(refuse=True))


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
        with pytest.raises(CheckpointError, match="cannot write checkpoint") as caught:
            save(path, nets.mlp())
        assert "\n" not in str(caught.value)
    assert saved.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "net.safetensors"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission(saved, nets):
    before = saved.read_bytes()
    saved.parent.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="cannot write checkpoint"):
            save(saved, nets.mlp())
    finally:
        saved.parent.chmod(0o700)
    assert saved.read_bytes() == before


FULL_DISK = """
import resource, signal, sys, torch
from apoptosis.errors import CheckpointError
from apoptosis.surgery import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save(sys.argv[1], torch.nn.Linear(64, 64))
except CheckpointError as error:
    sys.exit(0 if "cannot write checkpoint" in str(error) and "\\n" not in str(error) else 1)
sys.exit(2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes to run into")
def test_a_write_that_fails_half_way_leaves_the_old_file_and_no_litter(saved):
    before = saved.read_bytes()
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(saved)], capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["net.safetensors"]


def test_the_file_is_plain_safetensors_and_the_same_each_time(nets, tmp_path):
    model, opt = shrunk(nets)
    for name in ("a", "b"):
        save(tmp_path / name, model, opt, epoch=1)
    raw = (tmp_path / "a").read_bytes()
    assert raw == (tmp_path / "b").read_bytes()
    assert b"pickle" not in raw
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask
    (tmp_path / "link").symlink_to(tmp_path / "a")
    save(tmp_path / "link", model, epoch=2)
    assert (tmp_path / "link").is_symlink()
    assert load(tmp_path / "a", nets.mlp()) == {"epoch": 2}


def test_saving_changes_nothing(nets, tmp_path):
    model, opt = shrunk(nets)
    before = contents(model, [opt])
    save(tmp_path / "a", model, opt)
    assert same(contents(model, [opt]), before)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_model_is_told_to_run_first(tmp_path):
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(CheckpointError, match="run the model once"):
        save(tmp_path / "a", model)
