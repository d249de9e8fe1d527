from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from apoptosis.errors import ArgumentError, ShapeError, UnsupportedOptimizerError
from apoptosis.records import TensorEdit
from apoptosis.surgery import (
    Transaction,
    apply_edit,
    build_edits,
    check_averaged_models,
    merge_like,
    named_tensors,
)
from apoptosis.surgery.attributes import attributes_of

TWINS = {"0": {1: 0, 5: 3}, "2": {4: 2}}


def batch(rows=7, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, generator=generator, dtype=dtype), torch.randint(0, 3, (rows,), generator=generator)


def step(model, opt, seed=0):
    x, y = batch(seed=seed, dtype=next(model.parameters()).dtype)
    loss = nn.functional.cross_entropy(model(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss


def edits_of(model, nets, exact=True, merge=False):
    structure = nets.mlp_structure(model)
    if exact:
        nets.make_duplicates_(model, TWINS)
        return build_edits(structure, nets.exact_reductions(structure, TWINS, merge))
    return build_edits(structure, [nets.random_reduction(g, range(1, g.num_channels, 2)) for g in structure.groups])


def snapshot(model, optimizers=(), averaged_models=()):
    """Everything that a rollback has to bring back, by value and by identity."""
    values = []
    for module in (model, *averaged_models):
        for name, tensor in named_tensors(module).items():
            grad = tensor.grad
            values.append((name, id(tensor), tensor.detach().clone(), tensor.stride(), tensor.requires_grad))
            values.append((name, id(grad), None if grad is None else grad.clone()))
        values += [(name, attributes_of(m)) for name, m in module.named_modules()]
    for opt in optimizers:
        for p, state in opt.state.items():
            values += [(id(p), k, id(v), copy.deepcopy(v)) for k, v in state.items()]
    return values


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, foreach=True),
        lambda p: torch.optim.Adam(p, foreach=False),
        lambda p: torch.optim.AdamW(p, fused=True, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    ],
)
@pytest.mark.parametrize("retain", [False, True])
def test_the_commonest_loop_with_the_last_loss_alive(make, retain, nets):
    """`loss` holds the graph of before the surgery all through the next forward pass."""
    model = nets.mlp()
    opt = make(model.parameters())
    identities = [id(p) for p in model.parameters()]
    kept = []
    for i in range(6):
        x, y = batch(seed=i)
        loss = nn.functional.cross_entropy(model(x), y)
        kept.append(loss)
        opt.zero_grad()
        loss.backward(retain_graph=retain)
        opt.step()
        if i == 2:
            edits = edits_of(model, nets)
            before = model(x)
            with Transaction(model, [opt]) as transaction:
                transaction.apply(edits)
            torch.testing.assert_close(model(x), before)
    assert [id(p) for p in model.parameters()] == identities
    assert [tuple(p.shape) for p in model.parameters()] == [(6, 5), (6,), (5, 6), (5,), (3, 5), (3,)]
    assert all(p.grad.shape == p.shape and p.grad.abs().sum() > 0 for p in model.parameters())
    assert (model[0].out_features, model[2].in_features, model[2].out_features, model[4].in_features) == (6, 6, 5, 5)
    if retain:  # a second pass through a graph from before is refused, not computed with other weights
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept[2].backward()


def test_gradients_are_sliced_or_merged_and_accumulation_goes_on(nets):
    model = nets.mlp(dtype=torch.float64)
    nets.make_duplicates_(model, TWINS)
    x, y = batch(dtype=torch.float64)
    nn.functional.cross_entropy(model(x), y).backward()
    edits = edits_of(model, nets, merge=True)
    want = {e.tensor: merge_like(e, named_tensors(model)[e.tensor].grad) for e in edits}
    with Transaction(model) as transaction:
        transaction.apply(edits)
    twin = nets.mlp((5, 6, 5, 3), torch.float64)
    twin.load_state_dict(model.state_dict())
    nn.functional.cross_entropy(twin(x), y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want.get(name, p.grad))
        torch.testing.assert_close(p.grad, twin.get_parameter(name).grad)  # the chain rule, for an exact merge
    nn.functional.cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * twin.get_parameter(name).grad)


def test_parameter_hooks_fire_with_the_new_shapes(nets):
    model = nets.mlp()
    seen = []
    model[0].weight.register_hook(lambda g: seen.append(("grad", tuple(g.shape))))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(("post", tuple(p.grad.shape))))
    model[2].register_forward_hook(lambda m, a, out: seen.append(("out", tuple(out.shape))))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, opt)
    edits = edits_of(model, nets)
    with Transaction(model, [opt]) as transaction:
        transaction.apply(edits)
    step(model, opt)
    assert seen[:3] == [("out", (7, 6)), ("grad", (8, 5)), ("post", (8, 5))]
    assert seen[3:] == [("out", (7, 5)), ("grad", (6, 5)), ("post", (6, 5))]


@pytest.mark.parametrize("ema", [True, False])
def test_followers_get_the_same_folds_on_their_own_values(ema, nets):
    model = nets.mlp()
    opt = torch.optim.Adam(model.parameters(), lr=0.05)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if ema else AveragedModel(model)
    plain = copy.deepcopy(model)
    for i in range(4):
        step(model, opt, i)
        average.update_parameters(model)
    check_averaged_models([average, plain], model)
    edits = edits_of(model, nets, exact=False)
    old = {n: t.detach().clone() for n, t in named_tensors(average.module).items()}
    want = {e.tensor: apply_edit(e, old[e.tensor], old) for e in edits}
    with Transaction(model, [opt], [average, plain]) as transaction:
        transaction.apply(edits)
    for name, value in want.items():
        assert named_tensors(average.module)[name].equal(value)
    assert average.module[0].out_features == plain[0].out_features == model[0].out_features == 4
    step(model, opt, 9)
    average.update_parameters(model)
    assert average(batch()[0]).shape == plain(batch()[0]).shape == (7, 3)


def test_a_follower_must_be_a_copy(nets):
    model = nets.mlp()
    for wrong, message in [
        (nets.mlp((5, 8, 5, 3)), r"'2.weight' has shape \(5, 8\) instead of \(6, 8\)"),
        (nets.mlp((5, 8, 3)), "'4.weight'|'2.weight'"),
        (AveragedModel(nets.mlp((5, 7, 6, 3))), "'0.weight'"),
        ("ema", "AveragedModel or a copy"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            check_averaged_models([wrong], model)
        with pytest.raises(ArgumentError, match=message):
            Transaction(model, (), [wrong])


def test_a_follower_may_share_frozen_tensors(nets):
    model = nets.mlp()
    follower = copy.deepcopy(model)
    follower[0] = model[0]
    edits = edits_of(model, nets, exact=False)
    before = snapshot(model, (), [follower])
    transaction = Transaction(model, (), [follower])
    transaction.apply(edits)
    assert follower(batch()[0]).shape == (7, 3)
    transaction.rollback()
    assert nets.same(snapshot(model, (), [follower]), before)


def test_rollback_is_bitwise(nets):
    model = nets.mlp()
    model[4].weight.requires_grad_(False)
    model.register_buffer("scale", torch.randn(3), persistent=False)
    opt = torch.optim.AdamW(model.parameters())
    follower = AveragedModel(model)
    for i in range(3):
        step(model, opt, i)
    edits = (*edits_of(model, nets, exact=False), TensorEdit(tensor="scale", keep={0: torch.tensor([0, 2])}))
    before = snapshot(model, [opt], [follower])
    transaction = Transaction(model, [opt], [follower])
    transaction.apply(edits)
    assert model[4].weight.shape == (3, 3)
    assert not model[4].weight.requires_grad
    assert model.scale.shape == (2,)
    assert not nets.same(snapshot(model, [opt], [follower]), before)
    transaction.rollback()
    assert nets.same(snapshot(model, [opt], [follower]), before)
    reference = copy.deepcopy(model)
    reference_opt = torch.optim.AdamW(reference.parameters())
    reference_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    for i in range(3):
        step(model, opt, i)
        step(reference, reference_opt, i)
    assert all(a.equal(b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


class Failing(nn.Linear):
    """A reader whose width cannot be set a second time: a fault in the middle of the exchange."""

    def __setattr__(self, name, value):
        if name == "in_features" and "weight" in self.__dict__.get("_parameters", {}):
            raise RuntimeError("no")
        super().__setattr__(name, value)


def test_a_fault_in_the_middle_leaves_everything_as_it_was(nets):
    model = nets.mlp()
    layer = Failing(6, 3)
    model[4] = layer
    opt = torch.optim.Adam(model.parameters())
    step(model, opt)
    edits = edits_of(model, nets, exact=False)
    before = snapshot(model, [opt])
    with pytest.raises(RuntimeError, match="no"), Transaction(model, [opt]) as transaction:
        transaction.apply(edits)
    assert nets.same(snapshot(model, [opt]), before)
    step(model, opt)


@pytest.mark.parametrize(
    ("edits", "kind"),
    [
        ([TensorEdit(tensor="nowhere", keep={0: torch.tensor([0])})], ArgumentError),
        ([TensorEdit(tensor="2.weight", keep={0: torch.tensor([9])})], ShapeError),
        ([TensorEdit(tensor="2.weight", keep={}), TensorEdit(tensor="2.weight", keep={})], ArgumentError),
    ],
)
def test_bad_edits_change_nothing(edits, kind, nets):
    model = nets.mlp()
    good = TensorEdit(tensor="0.weight", keep={0: torch.tensor([0])})
    before = snapshot(model)
    with pytest.raises(kind), Transaction(model) as transaction:
        transaction.apply([good, *edits])
    assert nets.same(snapshot(model), before)


def test_state_without_a_rule_is_found_before_anything_changes(nets):
    model = nets.mlp()
    opt = torch.optim.Adam(model.parameters())
    step(model, opt)
    edits = edits_of(model, nets)
    transaction = Transaction(model, [opt])
    opt.state[model[4].weight]["odd"] = torch.zeros(2, 2)
    before = snapshot(model, [opt])
    with pytest.raises(UnsupportedOptimizerError, match=r"Adam holds state 'odd' of parameter '4.weight'"):
        transaction.apply(edits)
    assert nets.same(snapshot(model, [opt]), before)


def test_an_exception_in_the_block_rolls_back_and_a_transaction_is_used_once(nets):
    model = nets.mlp()
    edits = edits_of(model, nets, exact=False)
    before = snapshot(model)
    transaction = Transaction(model)

    def interrupted():
        with transaction:
            transaction.apply(edits)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert nets.same(snapshot(model), before)
    with pytest.raises(ArgumentError, match="open another"):
        transaction.apply(edits)
    with Transaction(model) as transaction:
        transaction.apply(edits)
        transaction.rollback()
    assert nets.same(snapshot(model), before)
    with Transaction(model) as transaction:
        transaction.apply(edits)
        with pytest.raises(ArgumentError, match="open another"):
            transaction.apply(edits)
    transaction.rollback()  # after the commit: nothing left to undo
    assert model[0].out_features == 4


def test_tied_parameters_change_once_and_every_owner_is_told(nets):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)
            self.b.weight = self.a.weight

    model = Tied()
    with Transaction(model) as transaction:
        transaction.apply([TensorEdit(tensor="b.weight", keep={0: torch.tensor([0, 1, 5])})])
    assert model.b.weight is model.a.weight
    assert model.a.out_features == model.b.out_features == 3
    both = [TensorEdit(tensor=n, keep={0: torch.tensor([0])}) for n in ("a.weight", "b.weight")]
    with pytest.raises(ShapeError, match="tied"), Transaction(model) as transaction:
        transaction.apply(both)


def test_an_enclosing_autocast_does_not_go_on_with_old_weights(nets):
    model = nets.mlp()
    x, _ = batch()
    nets.make_duplicates_(model, TWINS)
    edits = edits_of(model, nets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x)
        transaction = Transaction(model)
        transaction.apply(edits)
        assert model[0](x).shape == (7, 6)  # the cached cast of the old weight would give 8
        torch.testing.assert_close(model(x), before, rtol=0.05, atol=0.05)
        transaction.rollback()
        assert model(x).equal(before)


@pytest.mark.parametrize("use_scaler", [True, False])
def test_scaled_and_mixed_precision_training_goes_on(use_scaler, nets):
    model = nets.mlp()
    opt = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=use_scaler)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.01, total_steps=8)
    for i in range(6):
        x, y = batch(seed=i)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        opt.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        schedule.step()
        if i == 2:
            edits = edits_of(model, nets)
            with Transaction(model, [opt]) as transaction:
                transaction.apply(edits)
            before = model[0].weight.detach().clone()
    assert model[0].weight.shape == (6, 5)
    assert not model[0].weight.equal(before)
    assert all(torch.isfinite(p).all() for p in model.parameters())
