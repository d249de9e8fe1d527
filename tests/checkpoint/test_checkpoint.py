from __future__ import annotations

import os
import stat
from collections import Counter

import pytest
import torch
from torch import nn

from apoptosis.checkpoint import load, save
from apoptosis.records import TensorEdit
from apoptosis.surgery import Transaction, build_edits, named_tensors
from apoptosis.surgery.attributes import attributes_of

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
    model, opt = nets.shrunk(make)
    schedule = torch.optim.lr_scheduler.MultiStepLR(opt, [2, 4])
    apo = nets.Apo({"widths": (3, 4), "moments": {"fc": [torch.ones(3, 3).double(), 7]}, "limit": float("inf")})
    path, rng = tmp_path / "run.safetensors", torch.get_rng_state()
    save(path, model, opt, apo, epoch=4, schedule=schedule.state_dict(), rng=rng, note=None)

    wide = nets.mlp(seed=5)
    wide_opt = make(wide.parameters())
    nets.step(wide, wide_opt)  # a full-width step: gradients and state of the wrong widths have to go
    identities = [id(p) for p in wide.parameters()]
    back = nets.Apo()
    extra = load(path, wide, wide_opt, back)
    assert [id(p) for p in wide.parameters()] == identities
    assert all(p.grad is None for p in wide.parameters())
    assert nets.same(back.state, apo.state)
    assert extra["epoch"] == 4
    assert extra["note"] is None
    assert extra["rng"].equal(rng)
    assert extra["schedule"]["milestones"] == Counter([2, 4])
    assert [attributes_of(m) for m in wide.modules()] == [attributes_of(m) for m in model.modules()]
    wide_schedule = torch.optim.lr_scheduler.MultiStepLR(wide_opt, [2, 4])
    wide_schedule.load_state_dict(extra["schedule"])
    assert nets.same(
        [v for s in opt.state.values() for v in s.values()], [v for s in wide_opt.state.values() for v in s.values()]
    )
    for i in range(5):
        nets.step(model, opt, 20 + i)
        nets.step(wide, wide_opt, 20 + i)
        schedule.step()
        wide_schedule.step()
        assert all(a.equal(b) for a, b in zip(model.parameters(), wide.parameters(), strict=True))


def test_loading_into_a_model_of_the_stored_widths(nets, tmp_path):
    model, opt = nets.shrunk()
    save(tmp_path / "a", model, opt)
    before = nets.contents(model, [opt])
    nets.step(model, opt, 30)
    load(tmp_path / "a", model, opt)
    after = nets.contents(model, [opt])
    for one, two in zip(before, after, strict=True):
        assert nets.same(one[:3], two[:3]) if isinstance(one, tuple) else nets.same(one, two)


def test_a_loaded_model_shrinks_on_and_evaluates_without_an_optimizer(nets, tmp_path):
    model, opt = nets.shrunk()
    save(tmp_path / "a", model, opt, nets.Apo({"x": 1}))
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


def test_the_file_is_plain_safetensors_and_the_same_each_time(nets, tmp_path):
    model, opt = nets.shrunk()
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
    model, opt = nets.shrunk()
    before = nets.contents(model, [opt])
    save(tmp_path / "a", model, opt)
    assert nets.same(nets.contents(model, [opt]), before)
