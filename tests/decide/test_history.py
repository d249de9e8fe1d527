"""Every attempt leaves a record: what was tried, why nothing was removed, and what to do about it."""

import json

import pytest
import torch
from torch import nn

from apoptosis import Apoptosis
from apoptosis.decide.ledger import Attempt, lines_of


def run(runs, net, apo, optimizer, steps, *, rows=128, shape=(6,)):
    for step in range(steps):
        x = runs.inputs(rows, step, shape)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), runs.labels(x)).backward()
        optimizer.step()
        apo.step()


def started(runs, net, **arguments):
    log = []
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    return runs.start(net, optimizer, log=log.append, **arguments), optimizer, log


def test_epochs_given_as_steps_are_told_at_construction_and_once_beyond_the_end(runs):
    net = runs.mlp()
    with pytest.warns(RuntimeWarning, match=r"total_steps=3 is too short.*not epochs: give epochs \* len\(loader\)"):
        apo, optimizer, log = started(runs, net, total_steps=3)
    with pytest.warns(RuntimeWarning, match=r"step 4 is beyond total_steps=3.*not epochs") as told:
        run(runs, net, apo, optimizer, 40, rows=16)
    assert len(told) == 1
    said = str(apo.ledger())
    assert (
        "nothing was removed: the run has made 40 steps of total_steps=3. total_steps= counts optimizer steps" in said
    )
    assert [(r["kind"], r["step"], r["outcome"], r["cause"]) for r in log] == [("attempt", 3, "skipped", "rows")]
    assert "the run was over before '2' had seen 32 of the 256 rows" in log[0]["reason"]


def test_nothing_redundant_is_told_with_the_tolerance_and_every_group(runs):
    net = runs.mlp(activation=nn.Tanh)
    apo, optimizer, log = started(runs, net, tolerance=1e-4)
    run(runs, net, apo, optimizer, runs.STEPS)
    assert log
    assert all(r["kind"] == "attempt" and r["outcome"] == "nothing" and r["cause"] == "tolerance" for r in log)
    assert set(log[0]["groups"]) == {"0", "2"}
    assert "fewer than 32 channels would change what reads it by more than " in log[0]["groups"]["0"]
    ledger = apo.ledger()
    assert (ledger.events, ledger.attempts) == (0, len(log)) == (0, len(ledger.history))
    assert "nothing removed: '0' and 1 more: fewer than 32 channels would change" in str(ledger)
    assert "nothing was removed: no further window opens: " in str(ledger)
    assert "A larger tolerance= allows more" in str(ledger)
    json.dumps(ledger.as_dict())


def test_align_is_blamed_only_where_it_is_to_blame(runs):
    net = runs.mlp()
    apo, optimizer, log = started(runs, net, tolerance=0.1, align=32)
    run(runs, net, apo, optimizer, runs.STEPS)
    assert log
    assert {r["cause"] for r in log} == {"align"}
    assert (
        "its 32 channels can only be removed 32 at a time, so no narrower width is possible: an align= below 32"
        in log[0]["reason"]
    )
    net = runs.mlp(activation=nn.Tanh)
    apo, optimizer, log = started(runs, net, tolerance=1e-4, align=1)
    run(runs, net, apo, optimizer, runs.STEPS)
    assert log
    assert not any("align" in text for record in log for text in record["groups"].values())


def test_too_small_a_gain_is_told_in_numbers(runs):
    net = runs.mlp()
    apo, optimizer, log = started(runs, net, calibration=1e15)
    run(runs, net, apo, optimizer, runs.STEPS)
    assert [(r["outcome"], r["cause"]) for r in log] == [("nothing", "gain")]
    assert "of the multiply-adds saves" in log[0]["reason"]
    assert "and costs as much time as 1e+15" in log[0]["reason"]
    assert "no further window opens: an event is expected to save" in str(apo.ledger())


def test_too_few_rows_are_told_with_the_site_and_the_numbers(runs):
    net = nn.Sequential(nn.Linear(6, 400), nn.ReLU(), nn.Linear(400, 4))
    apo, optimizer, log = started(runs, net, total_steps=100, tolerance=0.001)
    run(runs, net, apo, optimizer, 99, rows=8)
    assert log[0]["cause"] == "rows"
    assert "rows were observed at '2'" in log[0]["reason"]
    assert "are needed to tell that" in log[0]["reason"]
    assert "of 400 channels suffice: use more or larger batches" in log[0]["reason"]


def test_before_the_first_window_the_ledger_says_when_it_comes(runs):
    net = runs.mlp()
    apo, optimizer, _ = started(runs, net, total_steps=1000)
    assert "nothing was removed: step() has not been called: call it once after every optimizer.step()" in str(
        apo.ledger()
    )
    run(runs, net, apo, optimizer, 20)
    assert "nothing was removed: the first window opens at step 150, and the run has made 20." in str(apo.ledger())
    apo.close()
    assert "nothing was removed: close() was called at step 20, before the first attempt." in str(apo.ledger())


def test_an_open_window_and_pins_are_told(runs):
    net = runs.mlp()
    apo, optimizer, _ = started(runs, net, total_steps=60)
    run(runs, net, apo, optimizer, 7, rows=16)
    assert apo.watching
    assert "nothing was removed: the window that opened at step 6 still waits for rows at step 7." in str(apo.ledger())
    pinned, optimizer, _ = started(runs, net, exclude=("*",))
    assert "nothing was removed: no group can be pruned: pins() lists the reasons" in str(pinned.ledger())


def test_records_survive_a_checkpoint_and_one_without_them_is_read(runs):
    net = runs.mlp()
    apo, optimizer, _ = started(runs, net)
    run(runs, net, apo, optimizer, runs.STEPS)
    state = apo.state_dict()
    assert json.loads(json.dumps(state["memory"]["attempts"])) == [a.as_dict() for a in apo.ledger().history]
    again = runs.start(net, optimizer)
    again.load_state_dict(state)
    assert again.ledger().history == apo.ledger().history
    del state["memory"]["attempts"]
    older = runs.start(net, optimizer)
    older.load_state_dict(state)
    assert [(a.step, a.outcome) for a in older.ledger().history] == [
        (a.step, a.outcome) for a in apo.ledger().history if a.outcome in ("event", "rolled back", "nothing")
    ]
    assert older.ledger().attempts == apo.ledger().attempts


def test_several_attempts_with_one_cause_share_a_line():
    made = [Attempt(step=s, opened=s - 5, outcome="nothing", cause="tolerance", reason=f"r{s}") for s in (10, 20, 30)]
    back = Attempt(step=40, opened=35, outcome="rolled back", cause="measured", reason="outputs moved")
    event = Attempt(step=50, opened=45, outcome="event")
    assert lines_of([*made, back, event, made[0]]) == [
        "steps 10 to 30, 3 attempts: nothing removed: r30",
        "step 40: rolled back: outputs moved",
        "step 10: nothing removed: r10",
    ]
    assert str(event) == "step 50: shapes changed"


def test_unknown_length_says_how_to_begin_sooner(runs):
    net = runs.mlp()
    apo = Apoptosis(net, runs.adam(net), runs.inputs(4, 0))
    apo.step()
    assert "total_steps= lets short runs begin sooner" in str(apo.ledger())


def test_a_window_that_the_run_is_too_short_for_is_told_while_it_is_open(runs):
    net = runs.mlp()
    apo, optimizer, log = started(runs, net, total_steps=40)
    with pytest.warns(
        RuntimeWarning, match="after 3 steps of the first window '.' had seen 6 of the ... rows and 6 of"
    ):
        run(runs, net, apo, optimizer, 12, rows=2)
    assert apo.watching
    run(runs, net, apo, optimizer, 28, rows=2)  # once
    assert [(r["outcome"], r["cause"]) for r in log] == [("skipped", "rows")]


class OneByOne(nn.Module):
    """Runs on a batch one image after the other."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 32, 3), nn.Conv2d(32, 4, 3)

    def forward(self, x):
        return torch.cat([self.b(torch.relu(self.a(one[None]))).mean((2, 3)) for one in x])


def test_what_is_seen_enough_is_not_said_to_lack(runs):
    net = OneByOne()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    apo = Apoptosis(net, optimizer, torch.zeros(2, 6, 12, 12), total_steps=60, calibration=0.0)
    with pytest.warns(RuntimeWarning, match="'b' had seen .* of the 256 examples that it needs; at this pace"):
        run(runs, net, apo, optimizer, 60, rows=6, shape=(6, 12, 12))
    reason = apo.ledger().history[0].reason
    assert reason.endswith("of the 256 examples that it needs")
    assert "rows" not in reason
