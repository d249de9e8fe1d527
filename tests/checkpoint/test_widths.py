"""Widths as a value: from a run, from shapes alone, onto wider and onto narrower networks, and what is refused."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from apoptosis import Apoptosis, load, save, set_widths_, widths_of
from apoptosis.checkpoint.widths import check_record, record_of
from apoptosis.errors import ArgumentError, CheckpointError
from branches.networks import NETWORKS
from branches.test_branches import built, emptied, proposals, run, train

KINDS = list(NETWORKS)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 3))


def begun(steps: int = 40) -> tuple[nn.Module, torch.optim.Optimizer, Apoptosis]:
    torch.manual_seed(0)
    net = mlp()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    options: dict[str, Any] = {"target": {"macs": 0.5}, "align": 1, "calibration": 0.0}
    return net, optimizer, Apoptosis(net, optimizer, data(), total_steps=steps, **options)


def data() -> torch.Tensor:
    return torch.randn(256, 6, generator=torch.Generator().manual_seed(0))


def train_on(net: nn.Module, optimizer: torch.optim.Optimizer, apo: Apoptosis, steps: int) -> list[float]:
    x, losses = data(), []
    for _ in range(steps):
        loss = nn.functional.mse_loss(net(x), x[:, :3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        apo.step()
        losses.append(float(loss.detach()))
    return losses


def shrunk_run(steps: int = 40) -> tuple[nn.Module, torch.optim.Optimizer, Apoptosis, list[dict[str, Any]]]:
    """A run that shrinks twice or more; returned with (state_dict, widths) from before the first step and after it."""
    net, optimizer, apo = begun(steps)
    kept = [{"model": copy.deepcopy(net.state_dict()), "widths": apo.widths}]
    train_on(net, optimizer, apo, steps)
    kept.append({"model": copy.deepcopy(net.state_dict()), "widths": apo.widths})
    return net, optimizer, apo, kept


def test_numbers_of_a_record_are_exact() -> None:
    third = torch.full((2,), 1 / 3, dtype=torch.float64)
    values = {"a": {"dtype": "float64", "values": third.tolist()}, "b": {"dtype": "int64", "values": [2**60 + 1]}}
    _, tensors = check_record({**record_of(mlp(), {}, {}), "tensors": values})
    assert torch.equal(tensors["a"], third)
    assert tensors["b"].tolist() == [2**60 + 1]


def test_a_run_says_its_widths_and_another_copy_takes_them() -> None:
    net, _, apo, (first, last) = shrunk_run()
    assert first["widths"]["groups"] == {"0": 32, "2": 24}
    assert last["widths"]["groups"] == {g.name: g.num_channels for g in apo.groups()}
    assert net[0].out_features < 32
    fresh = mlp()
    optimizer = torch.optim.AdamW(fresh.parameters())
    held = list(fresh.parameters())
    set_widths_(fresh, json.loads(json.dumps(last["widths"])), optimizer)
    fresh.load_state_dict(last["model"])
    assert torch.equal(fresh(torch.ones(2, 6)), net(torch.ones(2, 6)))
    assert [id(p) for p in held] == [id(p) for p in fresh.parameters()]
    fresh(torch.ones(2, 6)).sum().backward()
    optimizer.step()


def test_a_shrunk_model_becomes_wide_again_with_its_optimizer_and_trains_on() -> None:
    net, optimizer, _, (first, last) = shrunk_run()
    assert optimizer.state[net[0].weight]["exp_avg"].shape == net[0].weight.shape
    set_widths_(net, first["widths"], optimizer)
    net.load_state_dict(first["model"])
    assert net[0].weight.shape == (32, 6)
    assert net[0].weight not in optimizer.state
    assert net[4].bias in optimizer.state  # its shape is the same
    wide = mlp()
    wide.load_state_dict(first["model"])
    assert torch.equal(wide(torch.ones(2, 6)), net(torch.ones(2, 6)))
    net(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    set_widths_(net, last["widths"])
    net.load_state_dict(last["model"])


def test_widths_come_off_the_shapes_of_a_state_dict() -> None:
    net, _, _, (_, last) = shrunk_run()
    for prefix in ("", "module.", "_orig_mod.module."):
        state = {prefix + name: tensor for name, tensor in last["model"].items()}
        told = widths_of(state, mlp())
        assert told["shapes"] == last["widths"]["shapes"]
        assert told["attributes"] == last["widths"]["attributes"]
    assert widths_of(mlp().state_dict(), net)["shapes"]["0.weight"] == [32, 6]  # of a shrunk model, which stays so
    assert net[0].out_features < 32


def test_load_takes_an_earlier_and_wider_checkpoint_of_the_same_run(tmp_path: Any) -> None:
    net, optimizer, apo = begun()
    train_on(net, optimizer, apo, 1)
    save(tmp_path / "early", net, optimizer, apo)
    first = train_on(net, optimizer, apo, 39), apo.widths
    assert apo.ledger().events
    save(tmp_path / "late", net, optimizer, apo)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    load(tmp_path / "early", net, optimizer, apo)
    assert net[0].weight.shape == (32, 6)
    assert not apo.ledger().events
    second = train_on(net, optimizer, apo, 39), apo.widths
    assert first == second
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    load(tmp_path / "early", net, optimizer, apo)
    load(tmp_path / "late", net, optimizer, apo)
    assert apo.widths == first[1]


@pytest.mark.parametrize("kind", KINDS)
def test_emptied_branches_come_and_go(kind: str, tmp_path: Any) -> None:
    net, optimizer, target = built(kind)
    full = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    names = list(net.state_dict())
    save(tmp_path / "full", net, optimizer)
    expected = run(net.eval(), target.call)
    structure, found = proposals(target)
    assert emptied(target, structure, *found[::2]).committed
    train(net, optimizer, target.call, 1)
    save(tmp_path / "small", net, optimizer)
    small = run(net.eval(), target.call)
    load(tmp_path / "full", net, optimizer)
    assert torch.equal(run(net.eval(), target.call), expected)
    assert list(net.state_dict()) == names
    assert {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()} == full
    twin, own, _ = built(kind)
    assert train(net, optimizer, target.call, 2) == train(twin, own, target.call, 2)
    load(tmp_path / "small", net, optimizer)
    assert torch.equal(run(net.eval(), target.call), small)
    with pytest.raises(CheckpointError, match=r"shapes do not tell|apo\.widths|another network"):
        widths_of(net.state_dict(), NETWORKS[kind][0]())


def test_a_failed_call_leaves_model_and_optimizer_as_they_were() -> None:
    net, optimizer, _, (first, last) = shrunk_run()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = {id(p): s["exp_avg"].clone() for p, s in optimizer.state.items()}
    other = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 9))
    mixed = {**first["widths"], "attributes": {**first["widths"]["attributes"], "0": {"out_features": 7}}}
    cases: list[tuple[nn.Module, Any, type[Exception], str]] = [
        (net, {"groups": {"0": 4}}, CheckpointError, "these are no widths"),
        (net, {**last["widths"], "version": 9}, CheckpointError, "format version 9"),
        (net, {**last["widths"], "shapes": {"0.weight": [1, -2]}}, CheckpointError, "not the shape"),
        (net, {k: v for k, v in last["widths"].items() if k != "emptied"}, CheckpointError, "emptied is missing"),
        (net, mixed, CheckpointError, "cannot have out_features = 7"),
        (other, last["widths"], CheckpointError, "of another network"),
        (nn.ReLU, last["widths"], ArgumentError, "not a torch.nn.Module"),
    ]
    for model, widths, kind, text in cases:
        with pytest.raises(kind, match=text):
            set_widths_(model, widths, optimizer if model is net else None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(torch.equal(s["exp_avg"], state[id(p)]) for p, s in optimizer.state.items())
    with pytest.raises(CheckpointError, match="of another network"):
        widths_of({k: v for k, v in before.items() if not k.startswith("4")} | {"5.w": torch.ones(1)}, mlp())
    with pytest.raises(CheckpointError, match="at full width"):
        widths_of({**before, "0.weight": torch.ones(64, 6)}, mlp())
    narrow = mlp()  # nothing is known of a wider one
    set_widths_(narrow, last["widths"])
    alone = copy.deepcopy(narrow)
    with pytest.raises(CheckpointError, match=r"freshly built|before any removal"):
        set_widths_(alone, first["widths"])


class Heads(nn.Module):
    """Attention whose number of heads shapes do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.out = 4, nn.Linear(16, 48), nn.Linear(16, 16)


def test_shapes_that_do_not_tell_are_refused_by_name() -> None:
    small = Heads()
    small.qkv, small.out = nn.Linear(16, 36), nn.Linear(12, 16)
    with pytest.raises(CheckpointError, match=r"Heads\) has lost channels.*num_heads \(4\).*apo\.widths"):
        widths_of(small.state_dict(), Heads())
    norm = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    less = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    with pytest.raises(CheckpointError, match=r"'1' \(LayerNorm\) has lost channels"):
        widths_of(less.state_dict(), norm)
    conv = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    slim = nn.Sequential(nn.Conv2d(4, 5, 1), nn.Conv2d(5, 5, 3, groups=5), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1))
    set_widths_(conv, widths_of(slim.state_dict(), conv))
    assert repr(conv) == repr(slim)


def test_parameters_that_come_back_join_the_group_they_belong_to() -> None:
    net, _, target = built("own")
    decay = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=1e-3)
    names = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    fresh = NETWORKS["own"][0]()
    wide = Apoptosis(fresh, torch.optim.SGD(fresh.parameters(), lr=0.1), target.call[0][0], total_steps=10).widths
    structure, found = proposals(target)
    assert emptied(target, structure, *found[::2]).committed
    for group in optimizer.param_groups:  # as the event leaves an optimizer that it is given
        group["params"] = [p for p in group["params"] if any(p is q for q in net.parameters())]
    set_widths_(net, wide, optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(ids) for ids in names]
    assert {p.ndim > 1 for p in optimizer.param_groups[0]["params"]} == {True}
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in net.parameters()}
