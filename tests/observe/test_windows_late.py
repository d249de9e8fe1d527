"""Groups that see few rows a step do not hold up the others: they are left out once, and waited for the next time."""

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from apoptosis.decide.policy import PastEvent, Telemetry, decide, delay_of, is_due, worth_waiting
from apoptosis.graph import analyse
from apoptosis.observe import Observer
from apoptosis.planner import with_tied

POSITIONS, WIDTH, POOLED = 64, 48, 128


class Pooled(nn.Module):
    """A layer that reads every position, and a head that reads one row of every example."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 6)
        self.pooler, self.classes = nn.Linear(6, POOLED), nn.Linear(POOLED, 3)
        with torch.no_grad():
            for layer in (self.first, self.pooler):  # a quarter of all channels twice
                layer.weight[: len(layer.weight) // 4] = layer.weight[-(len(layer.weight) // 4) :]
                layer.bias[: len(layer.bias) // 4] = layer.bias[-(len(layer.bias) // 4) :]

    def forward(self, x):
        h = x + self.second(torch.tanh(self.first(x)))
        return self.classes(torch.tanh(self.pooler(h[:, 0])))


def batch(step, rows=16):
    draws = torch.Generator().manual_seed(step)
    return torch.randn(rows, POSITIONS, 6, generator=draws), torch.randint(0, 3, (rows,), generator=draws)


def train(runs, net, apo, optimizer, first, last):
    """Return the step after which each window ended, and the groups that it changed."""
    ended = []
    for step in range(first, last):
        x, y = batch(step)
        watching = apo.watching
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        event = apo.step()
        if watching and not apo.watching:
            ended.append((step + 1, {} if event is None else dict(event.groups)))
    return ended


def started(runs, **arguments):
    net, log = Pooled(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    arguments = {"total_steps": 240, "tolerance": 1e-3, "log": log.append, **arguments}
    return net, optimizer, runs.start(net, optimizer, batch(99)[0], **arguments), log


def test_the_others_go_and_the_late_group_goes_the_next_time(runs):
    net, optimizer, apo, log = started(runs)
    opens = apo.decision.at_step
    (first, changed), (_, later), *_ = train(runs, net, apo, optimizer, 0, 120)
    assert first == opens + 16  # 384 rows are 24 steps of 16: until then everything waited for the head
    assert set(changed) == {"first"}
    assert later["pooler"][0] == POOLED
    assert later["pooler"][1] < 112
    assert apo.ledger().history[0].step == first
    assert set(log[0]["groups"]) == {"first"}
    assert log[0]["notes"][0].startswith("pooler: left for the next event: the other groups do not wait")


def test_an_attempt_that_finds_nothing_says_what_was_left_for_the_next_one(runs):
    net, optimizer, apo, log = started(runs, tolerance=0.0)
    with torch.no_grad():
        net.first.weight.normal_()
    train(runs, net, apo, optimizer, 0, 45)
    assert log[0]["cause"] in ("tolerance", "waiting")
    assert log[0]["groups"]["pooler"] == (
        "left for the next event: the other groups do not wait until it has enough rows: "
        "'classes' had seen 256 of the 384 rows that it needs"
    )


def test_a_late_group_that_holds_much_is_waited_for(runs):
    """The same rows, but the network's work lies in the head."""

    class Heavy(Pooled):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 1), nn.Linear(1, 6)

    net = Heavy()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    apo = runs.start(net, optimizer, batch(99)[0], total_steps=240, tolerance=1e-3)
    opens = apo.decision.at_step
    (first, changed), *_ = train(runs, net, apo, optimizer, 0, 60)
    assert first == opens + 24
    assert changed["pooler"][1] <= 96


@pytest.mark.parametrize("cut", [30, 42, 50, 60])
def test_a_run_broken_off_in_or_between_windows_goes_on_the_same(runs, cut):
    net, optimizer, apo, _ = started(runs)
    whole = train(runs, net, apo, optimizer, 0, 80)
    one, optimizer_one, apo_one, _ = started(runs)
    found = train(runs, one, apo_one, optimizer_one, 0, cut)
    state = apo_one.state_dict()
    apo_one.close()
    again = runs.start(one, optimizer_one, batch(99)[0], total_steps=240, tolerance=1e-3)
    again.load_state_dict(state)
    found += train(runs, one, again, optimizer_one, cut, 80)
    assert found == whole
    assert runs.same(runs.everything(one)["tensors"], runs.everything(net)["tensors"])


def test_a_checkpoint_that_knows_of_no_late_groups_is_read(runs):
    net, optimizer, apo, _ = started(runs)
    train(runs, net, apo, optimizer, 0, 44)
    state = apo.state_dict()
    assert state["memory"].pop("behind") == ["pooler"]
    again = runs.start(net, optimizer, batch(99)[0], total_steps=240, tolerance=1e-3)
    again.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(runs, net, again, optimizer, 44, 80)


def test_what_a_window_lacks_is_told_in_steps(runs):
    net = Pooled()
    groups = [g for g in analyse(net, (batch(0)[0],)).groups if g.pin is None]
    observer = Observer(net, groups, seed=0)
    observer.open()
    assert observer.lacking() == {"first": 64, "pooler": 64}  # a window that sees nothing ends then
    for step in range(16):
        net(batch(step)[0]).sum().backward()
        assert not observer.end_step()
    assert observer.lacking() == {"pooler": 8.0}
    assert observer.seen_by("pooler") == ["'classes' had seen 256 of the 384 rows that it needs"]
    for step in range(16, 24):
        net(batch(step)[0]).sum().backward()
        over = observer.end_step()
    assert over
    assert observer.lacking() == {}
    observer.close()


def test_gradients_that_are_still_to_come_are_waited_for(runs):
    """The loss looks at one of 64 positions: without the rows of its gradients it would have no say in the event."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 6))
    groups = [g for g in analyse(net, (batch(0)[0],)).groups if g.pin is None]
    observer = Observer(net, groups, seed=0, gradients=True)
    observer.open()
    for step in range(16):
        net(batch(step)[0])[:2, 0].sum().backward()
        over = observer.end_step()
    assert over  # all rows are there
    assert observer.lacking() == {}
    assert observer.lacking(gradients=True) == {"0": 4.0}  # 32 of 40
    observer.close()


def test_groups_of_one_width_wait_together(runs):
    groups = [g for g in analyse(Pooled(), (batch(0)[0],)).groups if g.pin is None]
    tied = [replace(groups[0], tied_groups=("pooler",)), *groups[1:]]
    assert with_tied(["pooler"], tied) == {"first", "pooler"}
    assert with_tied(["first"], tied) == {"first", "pooler"}
    assert with_tied(["first"], groups) == {"first"}
    assert with_tied([], tied) == set()


def test_turns_that_come_soon_may_leave_a_group_out_again():
    now = Telemetry(step=150, total_steps=1000, macs=1.0, batch_rows=1.0, event_macs=1.0, overhead_macs=0.0,
                    tolerance=0.1, num_backoffs=0)  # fmt: skip
    assert is_due(now, 75)  # the next turn is at 225
    assert not is_due(now, 76)
    assert is_due(replace(now, step=900), 500)  # the last chance


positive = st.floats(1e-3, 1e6)


@given(positive, st.lists(st.tuples(positive, st.floats(1.0, 1e4)), max_size=5), st.integers(0, 10_000))
def test_waiting_pays_by_what_the_groups_hold(ready, waiting, delay):
    found = worth_waiting(ready, waiting, delay)
    assert worth_waiting(0.0, waiting, delay) == bool(waiting)
    assert not worth_waiting(ready, [], delay)
    assert not worth_waiting(ready, [(macs, float("inf")) for macs, _ in waiting], delay)
    assert worth_waiting(ready, waiting, delay + 1) >= found
    assert worth_waiting(2 * ready, waiting, delay) <= found
    if found:
        assert worth_waiting(ready, [(2 * macs, steps) for macs, steps in waiting], delay)
        assert worth_waiting(ready, [(macs, steps / 2) for macs, steps in waiting], delay)


def test_a_group_that_is_left_comes_a_turn_later_or_never():
    now = Telemetry(step=150, total_steps=1000, macs=1.0, batch_rows=1.0, event_macs=1.0, overhead_macs=0.0,
                    tolerance=0.1, num_backoffs=0)  # fmt: skip
    assert delay_of(now, 16) == 75 + 16
    assert delay_of(replace(now, step=900), 16) == 100  # no turn is left
    assert delay_of(replace(now, step=1200), 16) == 0
    assert delay_of(replace(now, event_macs=1e9), 16) == 850  # no other event will pay
    assert delay_of(replace(now, total_steps=None), 16) == 150 + 16
    assert delay_of(replace(now, total_steps=None, event_macs=1e9), 16) == 150


def test_what_was_not_tried_may_still_save_as_much_as_anything_at_first():
    past = PastEvent(step=150, macs_before=100.0, macs_after=99.0)
    now = Telemetry(step=160, total_steps=1000, macs=1.0, batch_rows=1.0, event_macs=100.0, overhead_macs=0.0,
                    tolerance=0.1, num_backoffs=0, history=(past,))  # fmt: skip
    assert decide(now).at_step is None
    assert decide(replace(now, untried=0.5)).at_step == 300  # a turn is skipped after a poor event, as ever
