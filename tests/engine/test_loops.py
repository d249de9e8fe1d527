"""The loops people write: old losses, accumulation, precision, schedulers, averages, several optimizers, other nets."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from apoptosis.errors import ArgumentError
from engine.loops import finish, loop


@pytest.mark.parametrize("where", ["after step", "after zero_grad", "set_to_none=False", "before any backward"])
def test_the_last_loss_alive_and_gradients_present_or_not(runs, where):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)
    losses = []

    def step(number):
        x = runs.inputs(runs.BATCH, number)
        loss = nn.functional.cross_entropy(net(x), runs.labels(x))  # the old loss lives until here
        losses.append(loss)
        optimizer.zero_grad(set_to_none=where != "set_to_none=False")
        loss.backward()
        optimizer.step()
        if where == "after zero_grad":
            optimizer.zero_grad()
        if where == "set_to_none=False":
            optimizer.zero_grad(set_to_none=False)
        event = apo.step()
        for parameter in net.parameters():
            if where == "after zero_grad":
                assert parameter.grad is None
            else:
                assert parameter.grad is not None
                assert parameter.grad.shape == parameter.shape
        return event

    finish(net, apo, loop(runs, net, optimizer, apo, step), optimizer)
    assert len(losses) == runs.STEPS
    assert all(torch.isfinite(loss) for loss in losses)


def test_gradient_accumulation_over_an_event(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)

    def step(number):
        optimizer.zero_grad()
        for part in range(2):
            x = runs.inputs(runs.BATCH // 2, 2 * number + part)
            (nn.functional.cross_entropy(net(x), runs.labels(x)) / 2).backward()
        optimizer.step()
        return apo.step()

    finish(net, apo, loop(runs, net, optimizer, apo, step), optimizer)


def test_learning_rate_schedulers_go_on(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=runs.STEPS + 1)
    apo = runs.start(net, optimizer)
    rates = []
    events = runs.train(
        net, optimizer, apo, after=lambda step: (scheduler.step(), rates.append(scheduler.get_last_lr()))
    )
    finish(net, apo, events, optimizer)
    assert rates[-1][0] < 1e-3 < max(rate[0] for rate in rates)


@pytest.mark.parametrize("enclosing", [False, True])
def test_bfloat16_autocast(runs, enclosing):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)

    def inner(number):
        x = runs.inputs(runs.BATCH, number)
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x)
            loss = nn.functional.cross_entropy(out.float(), runs.labels(x))
        assert out.dtype == torch.bfloat16
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return apo.step()

    if enclosing:
        with torch.autocast("cpu", torch.bfloat16):
            events = loop(runs, net, optimizer, apo, inner)
            x = runs.inputs(64, 1)
            assert net(x).shape == (64, 4)  # not the old weights' casts
    else:
        events = loop(runs, net, optimizer, apo, inner)
    finish(net, apo, events, optimizer)
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_enclosing_autocast_uses_the_new_weights_at_once(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        for number in range(runs.STEPS):
            x = runs.inputs(runs.BATCH, number)
            loss = nn.functional.cross_entropy(net(x).float(), runs.labels(x))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if apo.step():
                found = net(x)
                with torch.autocast("cpu", enabled=False):
                    expected = net(x)
                assert torch.allclose(found.float(), expected, atol=0.05)
                return
    pytest.fail("no event")


def test_gradient_scaler(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    apo = runs.start(net, optimizer)

    def step(number):
        x = runs.inputs(runs.BATCH, number)
        loss = nn.functional.cross_entropy(net(x), runs.labels(x))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return apo.step()

    finish(net, apo, loop(runs, net, optimizer, apo, step), optimizer)


@pytest.mark.parametrize("kind", ["ema", "swa", "plain copy"])
def test_averages_follow(runs, kind):
    net = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)
    if kind == "plain copy":
        average = copy.deepcopy(net)
    else:
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if kind == "ema" else AveragedModel(net)
    apo.follow(average)

    def update(step):
        if kind != "plain copy":
            average.update_parameters(net)

    events = runs.train(net, optimizer, apo, after=update)
    finish(net, apo, events, optimizer)
    inner = average if kind == "plain copy" else average.module
    assert [p.shape for p in inner.parameters()] == [p.shape for p in net.parameters()]
    update_bn([runs.inputs(64, step) for step in range(4)], average)
    average.eval()
    assert torch.isfinite(average(runs.inputs(16, 5))).all()
    if kind == "ema":
        net.eval()
        x = runs.inputs(256, 9)
        assert (net(x).argmax(1) == average(x).argmax(1)).float().mean() > 0.8


def test_a_follower_must_be_a_copy(runs):
    net = runs.mlp()
    apo = runs.start(net, runs.adam(net))
    for wrong in (runs.mlp(width=16), nn.Linear(2, 2), "ema"):
        with pytest.raises(ArgumentError, match="averaged copy"):
            apo.follow(wrong)


OPTIMIZERS = {
    "adam foreach": lambda ps: torch.optim.Adam(ps, lr=3e-3, foreach=True),
    "adam fused": lambda ps: torch.optim.Adam(ps, lr=3e-3, fused=True),
    "amsgrad": lambda ps: torch.optim.Adam(ps, lr=3e-3, amsgrad=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=3e-3),
    "adamw fused": lambda ps: torch.optim.AdamW(ps, lr=3e-3, fused=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.3),
    "sgd momentum foreach": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, foreach=True),
    "sgd fused": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True, fused=True),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.02),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-3, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_train_on(runs, name):
    net = runs.mlp()
    optimizer = OPTIMIZERS[name](list(net.parameters()))
    apo = runs.start(net, optimizer)
    events = runs.train(net, optimizer, apo)
    finish(net, apo, events, None if name == "adafactor" else optimizer)
    x = runs.inputs(512, 1234)
    net.eval()
    assert (net(x).argmax(1) == runs.labels(x)).float().mean() > 0.7


def test_two_optimizers_with_groups_of_their_own(runs):
    net = runs.mlp()
    weights = [p for p in net.parameters() if p.dim() > 1]
    biases = [p for p in net.parameters() if p.dim() == 1]
    first = torch.optim.AdamW([{"params": weights[:1], "lr": 1e-3}, {"params": weights[1:]}], lr=3e-3)
    second = torch.optim.SGD(biases, lr=0.05, momentum=0.9)
    apo = runs.start(net, [first, second])

    def step(number):
        x = runs.inputs(runs.BATCH, number)
        loss = nn.functional.cross_entropy(net(x), runs.labels(x))
        first.zero_grad()
        second.zero_grad()
        loss.backward()
        first.step()
        second.step()
        return apo.step()

    events = loop(runs, net, first, apo, step)
    finish(net, apo, events, first)
    finish(net, apo, events, second)
    assert first.param_groups[0]["lr"] == 1e-3


def test_frozen_parameters_shrink_where_they_may_and_stay_frozen(runs):
    net = runs.mlp()
    for parameter in net[0].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=3e-3)
    apo = runs.start(net, optimizer, frozen="cut")
    events = runs.train(net, optimizer, apo)
    finish(net, apo, events, optimizer)
    assert net[0].out_features < 32
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True, True, True]


def test_evaluation_between_steps_and_in_windows_changes_nothing(runs):
    def run(evaluating):
        net = runs.mlp()
        optimizer = runs.adam(net)
        apo = runs.start(net, optimizer)

        def evaluate(step):
            if evaluating:
                net.eval()
                with torch.no_grad():
                    net(100 * runs.inputs(500, 5))
                net.train()

        assert runs.train(net, optimizer, apo, after=evaluate)
        return runs.everything(net, optimizer)

    assert runs.same(run(True)["tensors"], run(False)["tensors"])


def test_half_precision_parameters(runs):
    net = runs.mlp().bfloat16()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    apo = runs.start(net, optimizer, runs.inputs(4, 0).bfloat16())

    def step(number):
        x = runs.inputs(runs.BATCH, number)
        loss = nn.functional.cross_entropy(net(x.bfloat16()).float(), runs.labels(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return apo.step()

    finish(net, apo, loop(runs, net, optimizer, apo, step))
    assert all(p.dtype == torch.bfloat16 for p in net.parameters())


def test_inputs_in_another_dtype_under_autocast_can_be_measured(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)

    def step(number):
        x = runs.inputs(runs.BATCH, number)
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(net(x.bfloat16()).float(), runs.labels(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return apo.step()

    finish(net, apo, loop(runs, net, optimizer, apo, step), optimizer)


def test_a_last_batch_of_one_example_spoils_no_event(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer, tolerance=0.05)

    def step(number):
        x = runs.inputs(runs.BATCH if number % 2 else 1, number)
        loss = nn.functional.cross_entropy(net(x), runs.labels(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return apo.step()

    finish(net, apo, loop(runs, net, optimizer, apo, step), optimizer)
    assert apo.ledger().rolled_back == 0


def test_parts_called_by_hand_are_watched_too(runs):
    net = nn.ModuleDict({"body": runs.mlp()[:4], "head": nn.Linear(32, 4)})

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = net

        def forward(self, x):
            return self.parts["head"](self.parts["body"](x))

    whole = Whole()
    optimizer = runs.adam(whole)
    apo = runs.start(whole, optimizer, runs.inputs(64, 1))

    def step(number):
        x = runs.inputs(runs.BATCH, number)
        loss = nn.functional.cross_entropy(net["head"](net["body"](x)), runs.labels(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return apo.step()

    finish(whole, apo, loop(runs, whole, optimizer, apo, step), optimizer)


def test_two_on_one_model_get_out_of_each_others_way(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    first = runs.start(net, optimizer)
    second = runs.start(net, optimizer)
    events = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for number in range(runs.STEPS):
            x = runs.inputs(runs.BATCH, number)
            nn.functional.cross_entropy(net(x), runs.labels(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
            events += [event for event in (first.step(), second.step()) if event]
    assert events
    assert all("changed by shrink_ or by another Apoptosis" in str(w.message) for w in told)
    assert told


def test_a_run_that_was_never_seen_says_so(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)
    for _ in range(runs.STEPS - 1):
        apo.step()
    with pytest.warns(RuntimeWarning, match="saw nothing of this run"):
        apo.step()
