"""Residual branches that lose all their channels, on networks of many kinds.

The value that must come out: the same network in which the branch's last module returns the constant at every place.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from apoptosis import load, save
from apoptosis.criteria import get_criterion
from apoptosis.decide.acceptance import AcceptanceResult
from apoptosis.engine.applying import Outcome, apply_reductions
from apoptosis.errors import CheckpointError
from apoptosis.model.evaluate import as_probe
from apoptosis.modules.emptied import OUTLINE
from apoptosis.planner import Request, branches_of, groups_to_observe, make_plan, propose_empty
from apoptosis.planner.sampling import sample
from apoptosis.records import EmptyProposal, Structure
from apoptosis.surgery import as_averaged_model
from apoptosis.surgery.rehearsal import rehearse
from apoptosis.surgery.target import Target
from branches.networks import IDS, NETWORKS, Block, Tokens, TorchBlock, logits

KINDS = list(NETWORKS)


def built(kind: str, steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer, Target]:
    make, call, _ = NETWORKS[kind]
    torch.manual_seed(0)
    net = make()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    train(net, optimizer, call, steps)
    return net, optimizer, Target(model=net, optimizers=(optimizer,), call=call)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, call: Any, steps: int) -> list[float]:
    net.train()
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        out = logits(net(*call[0], **call[1]))
        loss = nn.functional.mse_loss(out, torch.ones_like(out))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def proposals(target: Target) -> tuple[Structure, tuple[EmptyProposal, ...]]:
    structure = rehearse(target, target.capture(), {})
    groups = groups_to_observe(structure)
    _, seen = sample(target.model, groups, [target.call], tolerance=0.1, modes=1, seed=0)
    return structure, propose_empty(target.model, structure, seen)


def emptied(target: Target, structure: Structure, *found: EmptyProposal, refuse: str = "") -> Outcome:
    reductions = [reduction for proposal in found for reduction in proposal.reductions]
    return apply_reductions(
        target,
        structure,
        reductions,
        {},
        as_probe(target.call),
        lambda change: AcceptanceResult(change=change, refused=refuse),
    )


def run(net: nn.Module, call: Any) -> torch.Tensor:
    with torch.no_grad():
        return logits(net(*call[0], **call[1]))


def with_constant(net: nn.Module, proposal: EmptyProposal, bias: torch.Tensor, call: Any) -> torch.Tensor:
    """Run a network in evaluation mode with a branch's last module returning a constant."""
    branch = proposal.branch
    module = net.get_submodule(branch.norm or branch.layer)

    def constant(module: nn.Module, args: Any, out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) else out
        axis = 1 if first.dim() == 4 and not isinstance(module, nn.Linear) else first.dim() - 1
        value = bias.reshape([-1 if i == axis else 1 for i in range(first.dim())]).expand_as(first).clone()
        return (value, *out[1:]) if isinstance(out, tuple) else value

    handle = module.register_forward_hook(constant)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    found = run(net.eval(), call)
    torch.backends.mha.set_fastpath_enabled(fast)
    handle.remove()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_branches_of_a_network_are_found_and_none_is_refused(kind: str) -> None:
    _, _, target = built(kind, 1)
    structure = rehearse(target, target.capture(), {})
    assert {branch.name for branch in branches_of(structure)} == set(NETWORKS[kind][2])
    assert structure.refused == {}


@pytest.mark.parametrize("kind", KINDS)
def test_an_emptied_branch_is_its_constant_and_nothing_else_changes(kind: str) -> None:
    net, optimizer, target = built(kind)
    structure, found = proposals(target)
    for proposal in (found[0], found[-1]):
        one = copy.deepcopy(net)
        own = torch.optim.AdamW(one.parameters(), lr=1e-3)
        own.load_state_dict(optimizer.state_dict())
        mine = Target(model=one, optimizers=(own,), call=target.call)
        state = {name: own.state[p]["exp_avg"].clone() for name, p in one.named_parameters()}
        outcome = emptied(mine, structure, proposal)
        branch = proposal.branch
        assert outcome.committed, outcome.refused
        left = dict(one.named_parameters())
        assert not set(left) & set(branch.removed)
        bias = left[branch.bias].detach()
        torch.testing.assert_close(
            run(one.eval(), target.call), with_constant(copy.deepcopy(net), proposal, bias, target.call)
        )
        assert structure.macs - outcome.structure.macs == branch.macs
        assert sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in left.values()) == branch.parameters
        held = [p for group in own.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in left.values()}
        for name, p in left.items():
            if name in state:
                assert torch.equal(own.state[p]["exp_avg"], state[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_and_what_went_is_never_called(kind: str) -> None:
    net, optimizer, target = built(kind)
    structure, found = proposals(target)
    removed = {stand_in.module for p in found for stand_in in p.branch.stand_ins if stand_in.kind == "branch"}
    outcome = emptied(target, structure, *found)
    assert outcome.committed, outcome.refused
    inside = [name for name, _ in net.named_modules() if any(name.startswith(f"{outer}.") for outer in removed)]
    kept = {path for p in found for s in p.branch.stand_ins if s.kind == "branch" for path in (s.holder, *s.after)}
    assert all(any(name.endswith(path) for path in kept) for name in inside)
    assert branches_of(outcome.structure) == ()
    losses = train(net, optimizer, target.call, 12)
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_change_leaves_everything_bitwise_as_it_was(kind: str) -> None:
    net, optimizer, target = built(kind)
    structure, found = proposals(target)
    modules = [(name, id(module), type(module)) for name, module in net.named_modules()]
    tensors = {name: (id(x), x.clone()) for name, x in net.state_dict(keep_vars=True).items()}
    attributes = {name: set(vars(module)) for name, module in net.named_modules()}
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    state = {id(p): {key: value.clone() for key, value in own.items()} for p, own in optimizer.state.items()}
    outcome = emptied(target, structure, *found, refuse="not wanted")
    assert not outcome.committed
    assert [(name, id(module), type(module)) for name, module in net.named_modules()] == modules
    assert {name: set(vars(module)) for name, module in net.named_modules()} == attributes
    for name, x in net.state_dict(keep_vars=True).items():
        assert (id(x), torch.equal(x, tensors[name][1])) == (tensors[name][0], True), name
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == groups
    for p, own in optimizer.state.items():
        assert all(torch.equal(value, state[id(p)][key]) for key, value in own.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_that_is_constant_already_is_emptied_without_any_change(kind: str) -> None:
    net, _, target = built(kind)
    structure, found = proposals(target)
    branch = found[0].branch
    layer = net.get_submodule(branch.layer)
    with torch.no_grad():
        (layer.out_proj if isinstance(layer, nn.MultiheadAttention) else layer).weight.zero_()
    before = run(net.eval(), target.call)
    structure, found = proposals(target)
    proposal = next(p for p in found if p.branch.name == branch.name)
    assert (proposal.error, proposal.variance) == (0.0, 0.0)
    outcome = emptied(target, structure, proposal)
    assert outcome.committed
    torch.testing.assert_close(run(net.eval(), target.call), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_emptied_networks_load_into_fresh_ones(kind: str, tmp_path: Any) -> None:
    net, optimizer, target = built(kind)
    structure, found = proposals(target)
    assert emptied(target, structure, *found[::2]).committed
    train(net, optimizer, target.call, 1)
    save(tmp_path / "net", net, optimizer)
    torch.manual_seed(1)
    fresh = NETWORKS[kind][0]()
    own = torch.optim.AdamW(fresh.parameters(), lr=1e-3)
    load(tmp_path / "net", fresh, own)
    assert torch.equal(run(fresh.eval(), target.call), run(net.eval(), target.call))
    assert list(fresh.state_dict()) == list(net.state_dict())
    assert train(fresh, own, target.call, 2) == train(net, optimizer, target.call, 2)
    again = NETWORKS[kind][0]()
    before = {name: x.clone() for name, x in again.state_dict().items()}
    with pytest.raises(CheckpointError):
        load(tmp_path / "net", again, torch.optim.SGD(again.parameters(), lr=0.1))
    assert all(torch.equal(x, before[name]) for name, x in again.state_dict().items())
    assert list(again.state_dict()) == list(before)
    load(tmp_path / "net", net, optimizer)  # one that has the stand-ins already
    save(tmp_path / "full", again)
    alone = copy.deepcopy(net)  # of which nothing is known but what it is
    vars(next(m for m in alone.modules() if OUTLINE in vars(m))).pop(OUTLINE)
    with pytest.raises(CheckpointError, match="before a branch went"):
        load(tmp_path / "full", alone)


def test_a_plan_empties_a_constant_branch_only_when_it_is_asked() -> None:
    net, _, target = built("own")
    with torch.no_grad():
        net.b[0].fc2.weight.zero_()
    structure = rehearse(target, target.capture(), {})
    _, seen = sample(net, structure.open_groups, [target.call], tolerance=0.1, modes=1, seed=0)
    request = Request(criterion=get_criterion("interpolative"), tolerance=1e-4, align=1, max_drop=0.5, seed=0)
    plan = make_plan(net, structure, seen, request)
    assert all(after > 0 for _, after in plan.widths.values())
    for asked in (True, frozenset({"b.0.fc2"}), frozenset({"b.0.fc1"})):
        plan = make_plan(net, structure, seen, replace(request, empty=asked))
        assert plan.widths["b.0.fc1"] == (32, 0)
        assert all(after > 0 for name, (_, after) in plan.widths.items() if name != "b.0.fc1")
        assert plan.errors["b.0.fc1"] == {"b.0.fc2:b.0.fc2.weight:1": 0.0}
    assert plan.macs_after <= structure.macs - 28672
    outcome = apply_reductions(
        target, structure, plan.reductions, {}, as_probe(target.call), lambda c: AcceptanceResult(change=c, refused="")
    )
    assert outcome.committed
    assert net.b[0].fc1.forward(torch.zeros(2, 16)).shape == (2, 0)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def test_a_network_without_residual_branches_has_none_and_says_why() -> None:
    target = Target(model=Plain(), optimizers=(), call=((torch.randn(5, 6),), {}))
    structure = target.capture()
    assert branches_of(structure) == ()
    group = next(group for group in structure.groups if group.name == "a")
    assert group.unbranched == "the network's output would be constant: it depends on the input through 'b' alone"


class Transposing(nn.Module):
    """A branch whose result lies otherwise than what it is given, at sizes at which only another size shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x))).transpose(0, 1)


class Crossed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch, self.head = nn.Linear(3, 6), Transposing(), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.head(x + self.branch(x).transpose(0, 1))


def test_a_shape_that_one_size_does_not_tell_is_refused_by_another() -> None:
    target = Target(model=Crossed(), optimizers=(), call=((torch.randn(4, 4, 3),), {}))
    structure = rehearse(target, target.capture(), {})
    assert "has not as many positions as its argument" in structure.refused["branch"]
    assert branches_of(structure) == ()


class Kept(nn.Module):
    """A branch that leaves a tensor behind, which somebody may read."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x.mean()
        return self.down(torch.relu(self.up(x)))


def test_a_module_that_leaves_a_tensor_behind_is_not_replaced() -> None:
    block = Block()
    block.attn = Kept()
    block.attn.up, block.attn.down = nn.Linear(16, 8), nn.Linear(8, 16)
    target = Target(model=Tokens(block), optimizers=(), call=((IDS,), {}))
    structure = rehearse(target, target.capture(), {})
    assert [branch.name for branch in branches_of(structure)] == ["b.0.fc2"]
    assert "parameter 'b.0.n0.bias' would get no gradient any more" in structure.refused["b.0.attn.down"]


def test_export_and_compilation_of_an_emptied_network() -> None:
    net, _, target = built("torch")
    structure, found = proposals(target)
    assert emptied(target, structure, *found[:2]).committed
    wanted = run(net.eval(), target.call)
    exported = torch.export.export(net, target.call[0]).module()
    torch.testing.assert_close(run(exported, target.call), wanted)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, target.call), wanted)


def test_averaged_copies_follow() -> None:
    net, optimizer, target = built("own")
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    shadow = {name: p.detach().clone() for name, p in net.named_parameters()}
    listed = [p.detach().clone() for p in net.parameters()]
    train(net, optimizer, target.call, 2)
    average.update_parameters(net)
    copies = tuple(as_averaged_model(found, net) for found in (average, shadow, listed))
    target = Target(model=net, optimizers=(optimizer,), call=target.call, averaged_models=copies)
    structure, found = proposals(target)
    assert not emptied(target, structure, *found, refuse="not wanted").committed
    assert len(shadow) == len(listed) == len(list(net.parameters()))
    assert emptied(target, structure, *found[:2]).committed
    assert list(shadow) == [name for name, _ in net.named_parameters()]
    assert [x.shape for x in listed] == [p.shape for p in net.parameters()]
    train(net, optimizer, target.call, 1)
    average.update_parameters(net)
    assert run(average, target.call).isfinite().all()


def test_sizes_other_than_the_example_follow() -> None:
    net, _, target = built("torch")
    structure, found = proposals(target)
    assert emptied(target, structure, *found).committed
    assert run(net.eval(), ((IDS[:2, :3],), {})).shape == (2, 3, 5)
    assert isinstance(net.b[0], TorchBlock)
