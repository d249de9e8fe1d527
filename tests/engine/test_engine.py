"""Apoptosis in the user's loop: the public face, events, what stays bitwise the same, what is refused."""

import copy
import gc
import inspect
import json
import weakref

import pytest
import torch
from torch import nn

import apoptosis
from apoptosis import Apoptosis, shrink_

KEYWORD, PLAIN = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD


def face(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_public_face():
    empty = inspect.Parameter.empty
    promised = [
        ("model", PLAIN, empty),
        ("optimizer", PLAIN, empty),
        ("example_input", PLAIN, empty),
        ("tolerance", KEYWORD, None),
        ("criterion", KEYWORD, "interpolative"),
        ("total_steps", KEYWORD, None),
        ("budget", KEYWORD, None),
        ("probe", KEYWORD, None),
        ("align", KEYWORD, 8),
        ("exclude", KEYWORD, ()),
        ("log", KEYWORD, None),
    ]
    assert face(Apoptosis)[: len(promised)] == promised
    promised = [
        ("model", PLAIN, empty),
        ("example_input", PLAIN, empty),
        ("batches", PLAIN, empty),
        ("tolerance", KEYWORD, None),
        ("criterion", KEYWORD, "interpolative"),
        ("optimizer", KEYWORD, None),
        ("probe", KEYWORD, None),
        ("align", KEYWORD, 1),
        ("exclude", KEYWORD, ()),
    ]
    assert face(shrink_)[: len(promised)] == promised
    for name in ("step", "groups", "pins", "plan", "ledger", "follow", "state_dict", "load_state_dict", "close"):
        assert callable(getattr(Apoptosis, name)), name
    assert [name for name, *_ in face(apoptosis.save)] == ["path", "model", "optimizer", "apo", "extra"]
    assert face(apoptosis.load) == [
        ("path", PLAIN, empty),
        ("model", PLAIN, empty),
        ("optimizer", PLAIN, None),
        ("apo", PLAIN, None),
    ]


def test_events_happen_and_are_printable(runs):
    net = runs.mlp()
    optimizer, log = runs.adam(net), []
    before = sum(p.numel() for p in net.parameters())
    identities = [id(p) for p in net.parameters()]
    apo = runs.start(net, optimizer, log=log.append)
    events = runs.train(net, optimizer, apo)
    assert events
    assert all(events)
    after = sum(p.numel() for p in net.parameters())
    assert after < before
    assert [id(p) for p in net.parameters()] == identities
    assert events[0].parameters[0] == before
    assert events[-1].parameters[1] == after
    assert "->" in str(events[0])
    assert "training inputs" in str(events[0])
    assert net[0].out_features == net[2].in_features == net[0].weight.shape[0] < 32
    assert [r["kind"] for r in log] == ["event"] * len(log)
    assert len([r for r in log if not r["rolled_back"]]) == len(events)
    assert json.loads(json.dumps(log)) == json.loads(json.dumps(log))
    text = str(apo.ledger())
    assert f"{before:,} -> {after:,} parameters" in text
    assert "on training inputs" in text
    json.dumps(apo.ledger().as_dict())
    assert all(state["exp_avg"].shape == p.shape for p, state in optimizer.state.items())


def test_each_site_stays_within_the_tolerance_and_the_stated_sum(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer, tolerance=0.1)
    events = runs.train(net, optimizer, apo)
    assert events
    total = {}
    for event in events:
        for c in event.certificates:
            if c.kind == "empirical":
                assert c.value <= event.tolerance * (1 + 1e-9)
                total[c.subject] = total.get(c.subject, 0.0) + c.value
    ledger = apo.ledger()
    assert ledger.site_cost == pytest.approx(total)
    assert max(total.values()) <= ledger.site_limit == pytest.approx(0.8)


def test_the_sum_over_events_ends_further_removal(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)
    state = apo.state_dict()
    limit = apo.ledger().site_limit
    state["memory"]["site_cost"] = {site.key: limit for group in apo.groups() for site in group.sites}
    apo.load_state_dict(state)
    assert runs.train(net, optimizer, apo) == []
    assert net[0].out_features == 32


def test_close_is_final_and_may_come_twice(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)
    runs.train(net, optimizer, apo, steps=6)
    assert runs.num_hooks(net) > 0
    apo.close()
    apo.close()
    assert runs.num_hooks(net) == 0
    assert runs.train(net, optimizer, apo) == []
    assert apo.step() is None


def test_plan_says_when_there_are_no_statistics_and_changes_nothing(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)
    assert "not observed" in str(apo.plan())
    runs.train(net, optimizer, apo, steps=6)
    assert runs.num_hooks(net) > 0
    assert "not observed" in str(apo.plan())  # the window is open and nothing was seen yet
    runs.train(net, optimizer, apo, first=6, steps=7)
    before = runs.everything(net, optimizer)
    plan = apo.plan()
    assert runs.same(runs.everything(net, optimizer), before)
    assert plan.widths
    assert all(kept < width for width, kept in plan.widths.values())
    json.dumps(plan.as_dict())


def test_same_seed_and_calibration_same_widths(runs):
    def run():
        net = nn.Sequential(*runs.cnn(), nn.Dropout(0.2))
        torch.manual_seed(3)
        optimizer = runs.adam(net)
        apo = runs.start(net, optimizer, runs.inputs(4, 1, (2, 6, 6)), seed=7, tolerance=0.3)
        events = runs.train(net, optimizer, apo, shape=(2, 6, 6))
        assert events
        return runs.everything(net, optimizer), [event.groups for event in events]

    assert runs.same(run(), run())


def test_groups_and_pins_are_printable_and_exclude_is_said(runs):
    net = runs.mlp()
    apo = Apoptosis(net, runs.adam(net), runs.inputs(4, 0), exclude=("0",))
    assert [g.name for g in apo.groups()] == ["2"]
    reasons = {pin.group: str(pin) for pin in apo.pins()}
    assert "exclude" in reasons["0"]
    assert "output" in reasons["4"]
    assert "2" in repr(apo.groups())
    everything = Apoptosis(net, runs.adam(net), runs.inputs(4, 0), exclude=("*",))
    assert everything.groups() == ()
    assert everything.decision.reason == "no group can be pruned"
    assert runs.train(net, runs.adam(net), everything) == []


def test_nan_activations_skip_the_event_and_the_next_window_works(runs):
    net = runs.mlp(width=64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)  # a step over NaN would spoil the weights
    apo = runs.start(net, optimizer)
    poisoned = runs.inputs(4200, 1)  # more rows than are buffered: the moments see NaN inside the forward pass
    poisoned[0, 0] = float("nan")
    for _ in range(6):
        assert apo.step() is None
    net.train()
    net(poisoned).sum().backward()
    with pytest.warns(RuntimeWarning, match="NaN"):
        assert apo.step() is None
    assert runs.num_hooks(net) == 0
    assert apo.ledger().attempts == 0
    assert runs.train(net, optimizer, apo, first=7)


def test_a_window_that_sees_nothing_gives_up_with_a_warning(runs):
    net = runs.mlp().eval()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer, total_steps=1000)

    def idle():
        for _ in range(220):
            net(runs.inputs(8, 0)).sum().backward()
            apo.step()

    with pytest.warns(RuntimeWarning, match="training mode"):
        idle()
    assert runs.num_hooks(net) == 0


def test_a_branch_that_is_not_trained_does_not_hold_the_window_open(runs):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.side = runs.mlp(), runs.mlp(seed=1)

        def forward(self, x):
            out = self.main(x)
            return out if self.training else out + self.side(x)

    net = Branches()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer, total_steps=200)
    events = runs.train(net, optimizer, apo, steps=200)
    assert events
    assert all(name.startswith("main") for event in events for name in event.groups)


def test_a_literal_width_is_pinned_at_construction_and_others_shrink(runs):
    class Literal(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x):
            h = torch.relu(self.b(torch.relu(self.a(x)).view(-1, 32)))
            return self.d(torch.relu(self.c(h)))

    torch.manual_seed(0)
    net = Literal()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)
    assert "broke the forward pass" in {pin.group: pin for pin in apo.pins()}["a"].reason
    events = runs.train(net, optimizer, apo)
    assert events
    assert apo.ledger().rolled_back == 0
    assert all("a" not in event.groups for event in events)
    assert net.a.out_features == net.b.in_features == 32
    assert net.c.out_features < 32


@pytest.mark.parametrize("kind", ["roll", "flip"])
def test_channels_picked_by_literal_positions(runs, kind):
    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x):
            h = torch.relu(self.a(x))
            h = h.roll(16, 1) if kind == "roll" else h.flip(1)
            return self.d(torch.relu(self.c(torch.relu(self.b(h)))))

    torch.manual_seed(0)
    net = Moved()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)
    events = runs.train(net, optimizer, apo)
    assert any("c" in event.groups for event in events)
    if kind == "roll":  # every shape stays valid, but columns would read other channels
        assert net.a.out_features == 32
        assert "literal positions" in {pin.group: pin for pin in apo.pins()}["a"].reason
    else:
        assert net.a.out_features < 32


def test_beyond_the_sanity_limit_everything_is_rolled_back_bitwise_and_the_tolerance_halved(runs):
    net = runs.mlp(width=48)
    optimizer, log = runs.adam(net), []
    apo = runs.start(net, optimizer, tolerance=0.97, criterion="magnitude", log=log.append)
    kept = []
    runs.train(net, optimizer, apo, after=lambda step: kept.append((net[0].out_features, copy.deepcopy(net))))
    undone = [record for record in log if record["rolled_back"]]
    assert undone
    assert "sanity limit" in undone[0]["reason"]
    assert f"changed by {undone[0]['measured']['output_rms']:.3g} " in undone[0]["reason"]
    assert apo.ledger().rolled_back == len(undone)
    twin = runs.mlp(width=48)
    twin_optimizer = runs.adam(twin)
    step = undone[0]["step"]
    runs.train(twin, twin_optimizer, None, steps=step)
    assert kept[step - 1][0] == 48
    assert runs.same(
        {k: v for k, v in kept[step - 1][1].state_dict().items()}, {k: v for k, v in twin.state_dict().items()}
    )
    tolerances = [apo.decision.tolerance]
    assert tolerances[0] == 0.0 or tolerances[0] == pytest.approx(0.97 * 0.5 ** len(undone))


def test_zero_tolerance_takes_exact_duplicates_and_nothing_else(runs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    runs.doubled(net, 0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    apo = runs.start(net, optimizer, runs.inputs(4, 0).double(), tolerance=0.0)
    x = runs.inputs(64, 5).double()
    before = net(x).detach()
    net.train()
    events = []
    for step in range(runs.STEPS):
        net(runs.inputs(128, step).double()).sum().backward()
        optimizer.step()
        if event := apo.step():
            events.append(event)
    assert [event.groups for event in events] == [{"0": (16, 8)}]
    assert torch.allclose(net(x), before, rtol=0, atol=1e-9)
    ledger = apo.ledger()
    assert 0.0 <= max(ledger.site_cost.values()) <= ledger.site_limit < 1e-5


@pytest.mark.filterwarnings("ignore:apoptosis. after 3 steps of the first window")  # it is too short for an event
def test_hooks_go_with_the_last_step_of_the_run(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer, total_steps=8)
    runs.train(net, optimizer, apo, steps=1)
    for step in range(1, 8):
        assert runs.num_hooks(net) > 0
        net(runs.inputs(4, step)).sum().backward()  # far too few examples for an event
        assert apo.step() is None
    assert runs.num_hooks(net) == 0


def test_nothing_of_a_window_is_kept_alive(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)
    kept = []
    for step in range(runs.STEPS):
        x = runs.inputs(runs.BATCH, step)
        kept.append(weakref.ref(x))
        loss = nn.functional.cross_entropy(net(x), runs.labels(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        apo.step()
    del x, loss
    gc.collect()
    assert apo.ledger().events
    assert not any(reference() is not None for reference in kept)


def test_a_window_over_wide_layers_ends_before_it_is_stale_and_the_next_one_sees_all_rows_if_they_were_too_few(runs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 160), nn.Tanh(), nn.Linear(160, 4))  # 480 rows wanted: 60 steps of 8
    with torch.no_grad():
        net[0].weight[140:] = net[0].weight[:20]
        net[0].bias[140:] = net[0].bias[:20]
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    apo = runs.start(net, optimizer, runs.inputs(4, 0, (64,)), total_steps=100_000, align=8, tolerance=0.01)
    opened, closed, events = [], [], []
    for step in range(1, 2600):
        x = runs.inputs(8, step, (64,))
        watched = runs.num_hooks(net) > 0
        if watched or step == apo.decision.at_step:
            loss = nn.functional.cross_entropy(net(x), runs.labels(x))
            optimizer.zero_grad()
            loss.backward()
        event = apo.step()
        events += [(len(closed), event)] if event else []
        if watched != (runs.num_hooks(net) > 0):
            (closed if watched else opened).append(step)
    lengths = [last - first for first, last in zip(opened, closed, strict=False)]
    assert lengths[:2] == [48, 60]
    (number, event), *_ = events
    assert number == 1  # 384 rows cannot tell that 140 channels suffice, 480 can
    assert next(iter(event.groups.values())) == (160, 144)
