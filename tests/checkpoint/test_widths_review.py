"""Models that become wide again: optimizers' places and state, hooks, ties, modes, dtypes, buffers, copies, damage."""

import copy
import io
import json
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from apoptosis import Apoptosis, load, save, set_widths_, widths_of
from apoptosis.checkpoint.widths import record_of
from apoptosis.errors import ArgumentError, CheckpointError
from apoptosis.surgery.target import Target
from branches.networks import IDS, NETWORKS, Block, Tokens, TorchBlock
from branches.test_branches import built, emptied, proposals, run, train

CALL: Any = ((IDS,), {})


def target_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> Target:
    return Target(model=net, optimizers=(optimizer,), call=CALL)


def empty_all(net: nn.Module, optimizer: torch.optim.Optimizer, call: Any = CALL) -> None:
    target = Target(model=net, optimizers=(optimizer,), call=call)
    structure, found = proposals(target)
    assert emptied(target, structure, *found).committed


def shapes_of(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in (*net.named_parameters(), *net.named_buffers())}


def order_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {id(p): name for name, p in net.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


@pytest.mark.parametrize("kind", ["torch", "encoder", "llama"])
def test_parameters_come_back_to_their_places_and_hooks_can_be_set(kind: str, tmp_path: Any) -> None:
    net, optimizer, target = built(kind, 2)
    widths, state = record_of(net, {}, shapes_of(net)), copy.deepcopy(optimizer.state_dict())
    values, order = copy.deepcopy(net.state_dict()), order_of(net, optimizer)
    structure, found = proposals(target)
    assert emptied(target, structure, *found[1:]).committed
    narrow = order_of(net, optimizer)
    set_widths_(net, widths, optimizer)
    assert order_of(net, optimizer) == order
    net.load_state_dict(values)
    optimizer.load_state_dict(state)
    for module in net.modules():
        module.register_forward_hook(lambda *_: None).remove()
    twin, own, _ = built(kind, 2)
    assert train(net, optimizer, target.call, 2) == train(twin, own, target.call, 2)
    again = record_of(net, {}, shapes_of(net))
    structure, found = proposals(target)
    for proposal in reversed(found[1:]):  # one by one, the last one first
        assert emptied(target, structure, proposal).committed
        structure, _ = proposals(target)
    assert order_of(net, optimizer) == narrow
    set_widths_(twin, record_of(net, {}, shapes_of(twin)), own)
    assert order_of(twin, own) == narrow
    assert again["shapes"] == widths["shapes"]


def test_a_group_of_which_nothing_is_left_gets_its_own_back(tmp_path: Any) -> None:
    net, _, target = built("convnext", 0)
    inner = [p for name, p in net.named_parameters() if ".p1" in name]
    rest = [p for name, p in net.named_parameters() if ".p1" not in name]
    optimizer = torch.optim.AdamW([{"params": inner, "lr": 0.1}, {"params": rest}], lr=1e-3)
    train(net, optimizer, target.call, 1)
    save(tmp_path / "wide", net, optimizer)
    widths, order = record_of(net, {}, shapes_of(net)), order_of(net, optimizer)
    empty_all(net, optimizer, target.call)
    assert not optimizer.param_groups[0]["params"]
    set_widths_(net, widths, optimizer)
    assert order_of(net, optimizer) == order
    train(net, optimizer, target.call, 1)
    empty_all(net, optimizer, target.call)
    load(tmp_path / "wide", net, optimizer)
    assert order_of(net, optimizer) == order


def test_an_optimizer_that_was_not_there_when_branches_went_is_asked_for_anew() -> None:
    net = Tokens(Block(), Block())
    widths = record_of(net, {}, shapes_of(net))
    empty_all(net, torch.optim.SGD(net.parameters(), lr=0.1))
    groups = [{"params": list(net.head.parameters()), "lr": 0.1}, {"params": list(net.b.parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    before = order_of(net, optimizer)
    with pytest.raises(ArgumentError, match="which of the 2 groups"):
        set_widths_(net, widths, optimizer)
    assert order_of(net, optimizer) == before


class Around(torch.optim.Optimizer):
    """As Lookahead and SAM: an optimizer around another one, with groups of its own."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__([dict(group) for group in base.param_groups], {})
        self.base_optimizer = base

    def step(self, closure: Any = None) -> Any:
        return self.base_optimizer.step(closure)


def test_state_of_optimizers_inside_of_optimizers_goes_with_the_old_shapes() -> None:
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    small = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = Around(torch.optim.Adam(net.parameters()))
    for state in (net.state_dict(), small.state_dict(), net.state_dict()):
        net(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        set_widths_(net, widths_of(state, net), optimizer)
        net(torch.ones(2, 6)).sum().backward()
        optimizer.step()
    assert net[0].out_features == 32


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n, self.l, self.o = nn.LayerNorm(16), nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(self.l(self.n(x))[0])


def test_a_recurrent_layer_that_comes_back_computes_with_its_own_weights(tmp_path: Any) -> None:
    torch.manual_seed(0)
    net = Tokens(Recurrent(), Recurrent())
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    train(net, optimizer, CALL, 1)
    save(tmp_path / "wide", net, optimizer)
    empty_all(net, optimizer)
    assert not any(isinstance(p, Tensor) for p in net.b[0].l._flat_weights)  # or they would stay in memory
    load(tmp_path / "wide", net, optimizer)
    layer = net.b[0].l
    assert [id(p) for p in layer._flat_weights] == [id(p) for p in layer.parameters()]
    assert [id(r()) for r in layer._flat_weight_refs] == [id(p) for p in layer.parameters()]
    before = layer.weight_hh_l0.detach().clone()
    train(net, optimizer, CALL, 1)
    assert not torch.equal(layer.weight_hh_l0, before)


def test_what_was_one_parameter_is_one_again() -> None:
    net = Tokens(Block(), Block())
    net.b[0].attn.q.weight = net.b[1].attn.q.weight  # one branch goes, the other stays
    optimizer = torch.optim.AdamW(net.parameters())
    target, widths, values = (
        target_of(net, optimizer),
        record_of(net, {}, shapes_of(net)),
        copy.deepcopy(net.state_dict()),
    )
    structure, found = proposals(target)
    one = [proposal for proposal in found if proposal.branch.name == "b.1.attn"]
    assert emptied(target, structure, *one).committed
    order = order_of(net, optimizer)[0]
    set_widths_(net, widths, optimizer)
    net.load_state_dict(values)
    assert net.b[0].attn.q.weight is net.b[1].attn.q.weight
    assert set(order) < set(order_of(net, optimizer)[0])
    assert len(order_of(net, optimizer)[0]) == len(list(net.parameters()))


@pytest.mark.parametrize("training", [True, False])
def test_what_comes_back_has_the_mode_and_the_dtype_of_the_model(training: bool) -> None:
    net = Tokens(TorchBlock(), Block())
    optimizer = torch.optim.AdamW(net.parameters())
    widths = record_of(net, {}, shapes_of(net))
    net.train(not training)
    empty_all(net, optimizer)
    net.train(training).bfloat16()
    set_widths_(net, widths)
    assert {module.training for module in net.modules()} == {training}
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}


def test_a_branch_that_lost_channels_before_it_went_comes_back_whole() -> None:
    net = Tokens(TorchBlock(), TorchBlock())
    optimizer = torch.optim.AdamW(net.parameters())
    widths, before, values = record_of(net, {}, shapes_of(net)), repr(net), copy.deepcopy(net.state_dict())
    small = copy.deepcopy(net)
    small.b[0].mlp[0], small.b[0].mlp[2] = nn.Linear(16, 20), nn.Linear(20, 16)
    set_widths_(net, widths_of(small.state_dict(), net), optimizer)
    assert net.b[0].mlp[0].out_features == 20
    empty_all(net, optimizer)
    set_widths_(net, widths, optimizer)
    assert repr(net) == before
    net.load_state_dict(values)
    train(net, optimizer, CALL, 1)


def test_copies_and_pickles_of_a_model_with_emptied_branches_leave_out_what_went() -> None:
    net = Tokens(Block(), Block())
    nn.utils.parametrizations.weight_norm(net.b[0].attn.q)  # torch pickles no module with a parametrization
    optimizer = torch.optim.AdamW(net.parameters())
    widths = record_of(net, {}, shapes_of(net))
    net.b[0].attn.q.register_forward_hook(lambda *_: None)
    empty_all(net, optimizer)
    net.eval()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(net)):
        assert torch.equal(run(twin, CALL), run(net, CALL))
        with pytest.raises(CheckpointError, match="freshly built model"):
            set_widths_(twin, widths)
        assert torch.equal(run(twin, CALL), run(net, CALL))
    set_widths_(net, widths)
    assert nn.utils.parametrize.is_parametrized(net.b[0].attn.q)
    run(net, CALL)


class Scaled(nn.Module):
    """With a buffer that no state_dict holds and every channel has another value of."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 32), nn.Linear(32, 3)
        self.register_buffer("c", torch.arange(32.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)) * self.c)


def shrunk(seed: int) -> tuple[nn.Module, Apoptosis, dict[str, Any], AveragedModel]:
    torch.manual_seed(seed)
    net, x = Scaled(), torch.randn(128, 6)
    optimizer, average = torch.optim.AdamW(net.parameters(), lr=1e-2), AveragedModel(net)
    apo = Apoptosis(net, optimizer, x, total_steps=20, target={"macs": 0.5}, align=1, calibration=0.0)
    apo.follow(average)
    widths = apo.widths
    for _ in range(20):
        loss = nn.functional.mse_loss(net(x), x[:, :3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        apo.step()
        average.update_parameters(net)
    return net, apo, widths, average


def test_buffers_that_no_state_dict_holds_follow_at_the_same_width_too() -> None:
    (net, apo, wide, _), (other, _, _, average) = shrunk(0), shrunk(1)
    assert net.c.shape == other.c.shape
    assert not torch.equal(net.c, other.c)
    late = json.loads(json.dumps(apo.widths, allow_nan=False))
    set_widths_(other, late)
    other.load_state_dict(net.state_dict())
    x = torch.randn(4, 6)
    assert torch.equal(other(x), net(x))
    set_widths_(other, wide)
    assert torch.equal(other.c, torch.arange(32.0))
    with pytest.raises(CheckpointError, match="buffer c, which no state_dict holds"):
        widths_of(net.state_dict(), Scaled())
    set_widths_(average, wide)  # an average that has followed becomes wide as well
    assert average.module.a.out_features == 32
    twin = copy.deepcopy(net)
    set_widths_(twin, late)  # says how wide it was built, and this one never was so wide here
    with pytest.raises(CheckpointError, match="freshly built model"):
        set_widths_(twin, wide)
    assert torch.equal(twin(x), net(x))


def test_damaged_records_are_refused_and_change_nothing() -> None:
    _, apo, _, _ = shrunk(0)
    emptied_net = NETWORKS["own"][0]()
    full = shapes_of(emptied_net)
    empty_all(emptied_net, torch.optim.SGD(emptied_net.parameters(), lr=0.1))
    junk = [None, -1, 2**70, "save", [], {}, {"$": "x"}, {"$": "tuple", "items": [1]}, float("nan"), [[1], [2, 3]]]
    draw = random.Random(0)
    for record, model in ((apo.widths, Scaled()), (record_of(emptied_net, {}, full), NETWORKS["own"][0]())):
        values, text, cls = copy.deepcopy(model.state_dict()), repr(model), CheckpointError
        every = [path for path in paths(record) if path]
        for path in draw.sample(every, min(len(every), 120)):
            damaged = copy.deepcopy(record)
            place: Any = damaged
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = draw.choice(junk)
            one = copy.deepcopy(model)
            try:
                set_widths_(one, damaged)
            except cls:
                assert repr(one) == text
                assert all(torch.equal(tensor, values[name]) for name, tensor in one.state_dict().items()), path
    for dtype in ("save", "float99", "quint8"):
        damaged = copy.deepcopy(apo.widths)
        damaged["tensors"]["buffers.c"]["dtype"] = dtype
        with pytest.raises(CheckpointError, match=r"'buffers\.c' is no tensor"):
            set_widths_(Scaled(), damaged)
    with pytest.raises(CheckpointError, match="no plain JSON"):
        set_widths_(Scaled(), {**apo.widths, "groups": {"a": torch.ones(1)}})


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    return [path, *(found for key, item in items for found in paths(item, (*path, key)))]


def test_records_hold_numbers_that_json_has_no_word_for() -> None:
    class Turned(Scaled):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("c", torch.polar(torch.ones(32), torch.arange(32.0)), persistent=False)
            self.register_buffer("d", torch.full((32,), -torch.inf), persistent=False)

    full, small = shapes_of(Turned()), Turned()
    small.a, small.b, small.c, small.d = nn.Linear(6, 4), nn.Linear(4, 3), small.c[3:7].clone(), small.d[:4].clone()
    record = json.loads(json.dumps(record_of(small, {}, full), allow_nan=False))
    net = Turned()
    set_widths_(net, record)
    assert torch.equal(net.c, small.c)
    assert torch.equal(net.d, small.d)


def test_an_error_after_branches_came_back_is_undone_bitwise() -> None:
    net, optimizer, target = built("own", 2)
    widths = record_of(net, {}, shapes_of(net))
    empty_all(net, optimizer, target.call)
    train(net, optimizer, target.call, 1)
    values, order, text = copy.deepcopy(net.state_dict()), order_of(net, optimizer), repr(net)
    state = {name: optimizer.state[p]["exp_avg"].clone() for name, p in net.named_parameters()}
    out = run(net.eval(), target.call)
    damaged = copy.deepcopy(widths)
    damaged["attributes"]["head"] = {"out_features": 4, "in_features": 16}
    with pytest.raises(CheckpointError, match="cannot have out_features = 4"):
        set_widths_(net, damaged, optimizer)
    assert torch.equal(run(net, target.call), out)
    assert (repr(net), order_of(net, optimizer)) == (text, order)
    assert all(torch.equal(tensor, values[name]) for name, tensor in net.state_dict().items())
    assert all(torch.equal(optimizer.state[p]["exp_avg"], state[name]) for name, p in net.named_parameters())
    set_widths_(net, widths, optimizer)
