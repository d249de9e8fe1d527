"""The rotation of a residual stream changes nothing before the cut, gradients follow by the chain rule, a run ends."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks import residual_rotation, residual_width
from benchmarks.paper.networks import GPT

WIDTH, LENGTH, CHARACTERS = 12, 7, 9


def tiny(dtype=torch.float64):
    torch.manual_seed(0)
    model = GPT(CHARACTERS, LENGTH, width=WIDTH, heads=3, depth=2, hidden=20).to(dtype)
    for norm in residual_rotation.stream_of(model).norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.eps = 0.1  # large enough to be seen where it is not carried along
    batch = tuple(torch.randint(CHARACTERS, (4, LENGTH)) for _ in range(2))
    return model, batch


def gradients(model, batch):
    model.zero_grad()
    residual_rotation.loss_of(model, batch).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_before_the_cut_outputs_are_the_same_to_round_off():
    model, batch = tiny()
    axes = residual_rotation.principal_axes(model, [batch[0]], WIDTH)
    assert axes.shape == (WIDTH, WIDTH - 1)
    assert axes.sum(0).abs().max() < 1e-12  # the mean is none of the axes
    before = {name: value.clone() for name, value in model.state_dict().items()}
    narrow, _ = residual_rotation.rotate(model, axes)
    assert narrow.tokens.weight.shape == (CHARACTERS, WIDTH - 1)
    assert (narrow(batch[0]) - model(batch[0])).abs().max() < 1e-12
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_after_a_cut_outputs_differ_by_what_the_axes_leave_out():
    model, batch = tiny()
    with torch.no_grad():  # nothing writes outside of six directions and the mean
        basis = torch.linalg.qr(torch.randn(WIDTH, 6, dtype=torch.float64))[0]
        for table in (model.tokens, model.positions):
            table.weight.copy_(table.weight @ basis @ basis.T)
        for layer in residual_rotation.stream_of(model).writers:
            layer.weight.copy_(basis @ basis.T @ layer.weight)
            layer.bias.copy_(basis @ basis.T @ layer.bias)
    enough, few = (residual_rotation.rotate(model, residual_rotation.principal_axes(model, [batch[0]], keep))[0]
                   for keep in (6, 4))  # fmt: skip
    assert (enough(batch[0]) - model(batch[0])).abs().max() < 1e-12
    assert (few(batch[0]) - model(batch[0])).abs().max() > 1e-3


def test_gradients_and_first_moments_follow_exactly():
    model, batch = tiny()
    narrow, moves = residual_rotation.rotate(model, residual_rotation.principal_axes(model, [batch[0]], WIDTH))
    old, new = gradients(model, batch), gradients(narrow, batch)
    assert set(new) == set(moves)
    for name, gradient in new.items():
        assert (moves[name].first(old) - gradient).abs().max() < 1e-12, name


def test_second_moments_are_exact_for_uncorrelated_gradients_alone():
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64))[0]
    move = residual_rotation.Move(name="w", right=axes)
    scales = torch.rand(3, 6, dtype=torch.float64) + 0.5
    drawn = scales * torch.randn(40_000, 3, 6, dtype=torch.float64)
    found = move.second({"w": drawn.square().mean(0)})
    assert (found / (drawn @ axes).square().mean(0) - 1).abs().max() < 0.05
    drawn[:, :, 1] = drawn[:, :, 0]
    assert (move.second({"w": drawn.square().mean(0)}) / (drawn @ axes).square().mean(0) - 1).abs().max() > 0.1


@pytest.mark.parametrize("moments", ["restart", "diagonal", "measured"])
def test_the_optimizer_goes_on_with_what_is_known(moments):
    model, batch = tiny(torch.float32)
    optimizer = residual_rotation.new_optimizer(model, 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        residual_rotation.loss_of(model, batch).backward()
        optimizer.step()
    narrow, moves = residual_rotation.rotate(model, residual_rotation.principal_axes(model, [batch[0]], 8))
    after = residual_rotation.rotate_optimizer((model, optimizer), narrow, moves, moments, [batch])
    parameters = dict(narrow.named_parameters())
    state = after.state[parameters["blocks.0.fc1.bias"]]
    assert state["step"] == 3
    assert torch.equal(state["exp_avg"], optimizer.state[model.blocks[0].fc1.bias]["exp_avg"])
    assert (parameters["tokens.weight"] in after.state) == (moments != "restart")
    if moments == "measured":
        unbiased = after.state[parameters["head.weight"]]["exp_avg_sq"] / (1 - 0.999**3)
        assert torch.allclose(unbiased, gradients(narrow, batch)["head.weight"] ** 2)
    residual_rotation.loss_of(narrow, batch).backward()
    after.step()
    assert all(parameter.isfinite().all() for parameter in parameters.values())


def texts(folder):
    words = ["one", "two", "three", "stream", "width"]
    torch.manual_seed(0)

    def line():
        return " ".join(words[i] for i in torch.randint(len(words), (12,)).tolist())

    (folder / "tinyshakespeare").mkdir()
    (folder / "sst2").mkdir()
    (folder / "tinyshakespeare" / "input.txt").write_text(
        "\n".join(line() for _ in range(60)).upper() + "abcdefghijklm"
    )
    for name in ("train", "dev"):
        (folder / "sst2" / f"{name}.tsv").write_text("\n".join(f"{line()}\t{i % 2}" for i in range(60)))


def test_a_quick_run_tells_every_method_and_is_not_run_again(tmp_path, capsys):
    texts(tmp_path)
    arguments = ["--quick", "--seeds", "1", "--data-dir", str(tmp_path), "--cache", str(tmp_path / "cache")]
    out = tmp_path / "a.json"
    assert residual_width.main([*arguments, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    methods = found["runs"][0]["methods"]
    assert list(methods) == [method.name for method in residual_width.METHODS]
    assert methods["50 %, restart"]["macs"] < methods["75 %, restart"]["macs"] < methods["dense"]["macs"]
    assert methods["dense"]["loss"] < methods["dense"]["loss_before"] - 0.3
    assert methods["rotated, restart"]["loss_cut"] == pytest.approx(methods["rotated, restart"]["loss_uncut"], abs=1e-5)
    assert methods["target as 75 %"]["macs"] < methods["dense"]["macs"]
    assert methods["75 %, then target as 50 %"]["macs"] < methods["75 %, restart"]["macs"]
    assert methods["dense, time of 50 %"]["steps"] <= 60
    assert "seed 0, dense" in capsys.readouterr().out
    assert residual_width.main(arguments) == 0
    assert "seed 0, dense" not in capsys.readouterr().out


def test_no_results_say_what_makes_them():
    assert "python -m benchmarks.residual_width" in residual_width.table({})
